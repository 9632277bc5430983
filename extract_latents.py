"""Turns images or videos into latents: ``python extract_latents.py --images FOLDER --vae NAME --out DIR``."""

from iwin_dit.commands.extract import main
from iwin_dit.runtime.errors import run_script

if __name__ == "__main__":
    run_script(main)
