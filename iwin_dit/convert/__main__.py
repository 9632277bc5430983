"""Official file in, safetensors out: ``python -m iwin_dit.convert dit DiT-XL-2.pt out --config dit.json``."""

import sys

from iwin_dit.commands.convert import main
from iwin_dit.runtime.errors import run_script

if __name__ == "__main__":
    sys.argv[0] = "python -m iwin_dit.convert"  # what --help calls it
    run_script(main)
