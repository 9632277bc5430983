"""Trains a classifier: ``accelerate launch train_classifier.py [--config FILE] [--key value]``."""

from iwin_dit.commands.train_classifier import main
from iwin_dit.runtime.errors import run_script

if __name__ == "__main__":
    run_script(main)
