"""Measures images against real ones: ``python evaluate_fid.py --generated RUN --reference FOLDER``."""

from iwin_dit.commands.evaluate import main
from iwin_dit.runtime.errors import run_script

if __name__ == "__main__":
    run_script(main)
