"""Trains a class-conditional diffusion transformer, of images or of clips.

Run as ``iwin-dit train [--config FILE] [--key value]``; in a checkout, ``accelerate launch train_dit.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from iwin_dit.config.parse import parse_arguments
from iwin_dit.config.schema import Config
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, run_script
from iwin_dit.runtime.progress import say

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def main() -> int:
    config, dry_run = parse_arguments(sys.argv[1:], default=QUICKSTART)
    if dry_run:
        from iwin_dit.build import budget
        from iwin_dit.build.describe import describe_run

        print(describe_run(config), flush=True)
        budget.check(config)
        return 0
    if not files.can_write_folder(Path(config.output_dir)):
        raise ConfigError(f"output_dir {config.output_dir} cannot be written; take a folder that is yours")
    return train(config)


def train(config: Config) -> int:
    from iwin_dit.build import data, loading, pipeline, trainer
    from iwin_dit.build.budget import training_flops
    from iwin_dit.pipelines.export import export_pipeline
    from iwin_dit.training import attention, loop
    from iwin_dit.training.curve import draw_loss_curve
    from iwin_dit.training.replicas import check_data
    from iwin_dit.training.state import full_ema

    accelerator = trainer.build_accelerator(config)
    main_process = accelerator.is_main_process
    dataset = data.build_dataset(config, accelerator)
    images = data.build_images(config, dataset)
    identity = dataset.identity | (images.identity if images is not None else {})
    check_data(accelerator, identity)
    run = trainer.build_run(config, identity) if main_process else None
    trainer.start_trackers(config, accelerator, run)
    state = trainer.build_state(config, accelerator, loading.build_denoiser(config))
    loss, random_batch = trainer.build_loss(config, dataset, accelerator)
    examples = trainer.build_examples(config, dataset, images)
    evaluate = None
    if config.train.evaluate_every_steps:
        from iwin_dit.build.monitor import build_monitor  # and all that evaluates

        evaluate = build_monitor(config, dataset, state, accelerator)
    preview = pipeline.build_preview(config, dataset, run, accelerator)

    with attention.attention_backend(config):
        micro_batch = trainer.find_micro_batch(config, accelerator, state, loss, random_batch)
        step = loop.train(
            config,
            accelerator,
            run,
            state,
            loss,
            trainer.build_loader(config, examples, accelerator, micro_batch),
            config.train.batch_images // (micro_batch * accelerator.num_processes),
            preview,
            evaluate,
            training_flops(config),
        )

    averaged = full_ema(state)
    accelerator.end_training()
    if step < config.train.max_steps:
        if main_process:
            say(f"stopped at step {step} with a checkpoint; run the same command again to go on")
        return 143
    if main_process:
        pipeline = pipeline.build_pipeline(config, pipeline.model_of(config, averaged), dataset)
        export_pipeline(pipeline, run.pipeline, {"step": step, "config": config.to_dict()})
        draw_loss_curve(run)
        if step > config.train.max_steps:
            print(f"{run.path} was trained further than train.max_steps {config.train.max_steps} before")
        print(f"trained to step {step}; try: python sample.py --checkpoint {run.path} --class 0")
    return 0


if __name__ == "__main__":
    run_script(main)
