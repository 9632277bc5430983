"""Trains a classifier of images, an Iwin Transformer or any of timm's models for comparison; or of clips.

Run as ``iwin-dit train-classifier [--config FILE] [--key value]``; in a checkout, ``accelerate launch
train_classifier.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.config.parse import parse_arguments
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, run_script
from iwin_dit.runtime.progress import say

QUICKSTART = Path(__file__).parents[2] / "configs" / "classifier" / "digits.yaml"


def main() -> int:
    config, dry_run = parse_arguments(sys.argv[1:], default=QUICKSTART, kind=ClassifierConfig)
    if dry_run:
        from iwin_dit.build.describe import describe_classifier

        print(describe_classifier(config), flush=True)
        return 0
    if not files.can_write_folder(Path(config.output_dir)):
        raise ConfigError(f"output_dir {config.output_dir} cannot be written; take a folder that is yours")
    return train(config)


def train(config: ClassifierConfig) -> int:
    from iwin_dit.build import classifier, labelled, trainer
    from iwin_dit.build.classifier_export import export
    from iwin_dit.training import attention, loop
    from iwin_dit.training.curve import draw_loss_curve
    from iwin_dit.training.replicas import check_data

    accelerator = trainer.build_accelerator(config)
    images, held_out = labelled.build_images(config, accelerator)
    check_data(accelerator, images.identity)
    run = trainer.build_run(config, images.identity) if accelerator.is_main_process else None
    trainer.start_trackers(config, accelerator, run)
    state = trainer.build_state(
        config, accelerator, classifier.build_trained(config), classifier.parameter_groups(config)
    )
    loss, random_batch = classifier.build_loss(config)
    together = 2 if config.mixes else 1  # images that are mixed two by two stay in one micro-batch

    with attention.attention_backend(config):
        micro_batch = trainer.find_micro_batch(config, accelerator, state, loss, random_batch, together)
        examples = labelled.build_examples(config, images, micro_batch)
        step = loop.train(
            config,
            accelerator,
            run,
            state,
            loss,
            trainer.build_loader(config, examples, accelerator, micro_batch),
            config.train.batch_images // (micro_batch * accelerator.num_processes),
            classifier.build_preview(config, held_out, run, accelerator),
            classifier.build_evaluation(config, held_out, state, accelerator),
            6 * classifier.multiply_adds(config),
        )

    accelerator.end_training()
    if step < config.train.max_steps:
        if accelerator.is_main_process:
            say(f"stopped at step {step} with a checkpoint; run the same command again to go on")
        return 143
    if accelerator.is_main_process:
        draw_loss_curve(run)
        exported = export(config, state, run)
        found = [record for record in run.read_log() if "top1" in record]
        accuracy = f", top-1 {found[-1]['top1']} %, top-5 {found[-1]['top5']} %" if found else ""
        kind = "for timm" if config.data.frames is None else "weights"
        print(f"trained to step {step}{accuracy}; curves in {run.path}/loss.png, {kind} in {exported}")
    return 0


if __name__ == "__main__":
    run_script(main)
