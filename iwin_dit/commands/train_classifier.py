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

QUICKSTART = "digits"


def main() -> int:
    config, dry_run = parse_arguments(sys.argv[1:], default=QUICKSTART, kind=ClassifierConfig)
    if dry_run:
        from iwin_dit.build.describe import describe_classifier

        print(describe_classifier(config), flush=True)
        return 0
    files.check_writable(Path(config.output_dir), "output_dir")
    return train(config)


def train(config: ClassifierConfig) -> int:
    from iwin_dit.build import classifier, trainer

    return trainer.train(config, classifier.open_data, classifier.Classifier)
