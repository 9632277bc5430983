"""Trains a classifier and a generator of handwritten digits, and draws some: a few minutes on a CPU.

In a checkout, a report tells how many of the samples are recognised, and how far from real digits they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from iwin_dit.runtime.errors import Parser

CHECKOUT = Path(__file__).parents[2]
STEPS = (
    "train-classifier",
    "train",
    "sample --checkpoint runs/quickstart --class 0 1 2 3 4 5 6 7 8 9 --num-images 8 "
    "--out runs/quickstart/samples.png",
)
OF_REPORT = "train --output_dir runs/quickstart_50_steps --train.max_steps 50"


def main() -> int:
    """Runs each step in a process of its own, as one would by hand; the exit code of the one that fails."""
    Parser(__doc__).parse_args()
    has_report = (CHECKOUT / "studies" / "digits_report.py").is_file()
    commands = [f"iwin_dit.commands {step}" for step in STEPS]
    if has_report:
        commands.insert(1, f"iwin_dit.commands {OF_REPORT}")
        commands.append("studies.digits_report runs/quickstart")
    paths = [*([str(CHECKOUT)] if has_report else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    for command in commands:
        print(f"$ python -m {command}", flush=True)
        if code := subprocess.run([sys.executable, "-m", *command.split()], env=environment).returncode:
            return code
    return 0
