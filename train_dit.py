"""Trains a class-conditional diffusion transformer.

Run as ``accelerate launch train_dit.py [--config FILE] [--key value]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from iwin_dit.config import Config, parse_arguments
from iwin_dit.runtime.errors import run_script

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main() -> int:
    config, dry_run = parse_arguments(sys.argv[1:], default=QUICKSTART)
    if dry_run:
        from iwin_dit.report import describe_run

        print(describe_run(config))
        return 0
    return train(config)


def train(config: Config) -> int:
    from iwin_dit import build, build_data
    from iwin_dit.pipelines.export import export_pipeline
    from iwin_dit.report import draw_loss_curve
    from iwin_dit.training import loop

    accelerator = build.build_accelerator(config)
    main_process = accelerator.is_main_process
    build.check_output(config)
    dataset = build_data.build_dataset(config, accelerator)
    run = build.build_run(config, dataset) if main_process else None
    loader, micro_batches = build.build_loader(config, dataset, accelerator)
    state = build.build_state(config, accelerator)
    objective = build.build_objective(config)
    encode = build_data.build_encoder(dataset, accelerator)
    preview = build.build_preview(config, dataset, run)

    step = loop.train(config, accelerator, run, state, objective, encode, loader, micro_batches, preview)

    if step < config.train.max_steps:
        if main_process:
            print(f"stopped at step {step} with a checkpoint; run the same command again to go on")
        return 143
    if main_process:
        pipeline = build.build_pipeline(config, state.ema, dataset)
        export_pipeline(pipeline, run.pipeline, {"step": step, "config": config.to_dict()})
        draw_loss_curve(run)
        if step > config.train.max_steps:
            print(f"{run.path} was trained further than train.max_steps {config.train.max_steps} before")
        print(f"trained to step {step}; try: python sample.py --checkpoint {run.path} --class 0")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_script(main)
