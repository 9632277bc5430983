"""Trains a diffusion transformer: ``accelerate launch train_dit.py [--config FILE] [--key value]``."""

from iwin_dit.commands.train import main
from iwin_dit.runtime.errors import run_script

if __name__ == "__main__":
    run_script(main)
