"""Draws images: ``python sample.py --class 207 "golden retriever" --num-images 8 --out grid.png``."""

from iwin_dit.commands.sample import main
from iwin_dit.runtime.errors import run_script

if __name__ == "__main__":
    run_script(main)
