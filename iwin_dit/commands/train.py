"""Trains a class-conditional diffusion transformer, of images or of clips.

Run as ``iwin-dit train [--config FILE] [--key value]``; in a checkout, ``accelerate launch train_dit.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from iwin_dit.config.parse import parse_arguments
from iwin_dit.config.schema import Config
from iwin_dit.runtime import files

QUICKSTART = "quickstart"


def main() -> int:
    config, dry_run = parse_arguments(sys.argv[1:], default=QUICKSTART)
    if dry_run:
        from iwin_dit.build.budget import Budget
        from iwin_dit.build.describe import describe_run

        budget = Budget(config)
        print(describe_run(budget), flush=True)
        budget.check()
        return 0
    files.check_writable(Path(config.output_dir), "output_dir")
    return train(config)


def train(config: Config) -> int:
    from iwin_dit.build import generator, trainer

    return trainer.train(config, generator.open_data, generator.Generator)
