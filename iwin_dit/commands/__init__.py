"""The command ``iwin-dit``: a module for each of its commands, which the scripts of a checkout call, too."""

from __future__ import annotations

import sys
from importlib import import_module

from iwin_dit import __version__
from iwin_dit.runtime.errors import ConfigError, did_you_mean, run_script

COMMANDS = {
    "train": "train a diffusion transformer, of images or of clips",
    "train-classifier": "train a classifier of images or of clips",
    "sample": "draw images or clips",
    "extract": "turn images or videos into the latents that training reads",
    "evaluate": "measure images against real ones: FID and other figures",
    "extrapolate": "move a model away from what its own samples teach it (Neon), and measure",
    "convert": "turn official weights into safetensors, or into a pipeline",
    "demo": "train on handwritten digits and draw some, in a few minutes on a CPU",
}


def main() -> None:
    """Runs the command that the first argument names, and ends the process."""
    run_script(run)


def run() -> int | None:
    """Runs the command of ``sys.argv``, and returns its exit code.

    Raises:
        ConfigError: where there is no such command.
    """
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: iwin-dit {{{','.join(COMMANDS)}}} ...\n\ncommands:")
        for command, does in COMMANDS.items():
            print(f"  {command:18}{does}")
        print("\niwin-dit COMMAND --help explains its options; --version says which version this is.")
        return 0
    if name == "--version":
        print(f"iwin-dit {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f"expected one of {', '.join(COMMANDS)}")
        raise ConfigError(f"iwin-dit has no command {name}; {hint}")
    sys.argv = [f"iwin-dit {name}", *rest]  # what --help calls it
    result: int | None = import_module(f"{__name__}.{name.replace('-', '_')}").main()
    return result
