"""Runs the commands of docs/extending.md where test_extending.py has put a changed copy of the package.

Standard input holds ``{title: commands}``, the last line of the output ``{title: error or None}``.
"""

import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path

import yaml
from accelerate.state import AcceleratorState
from diffusers import AsymmetricAutoencoderKL
from evaluation_stub import Stub, make_sets
from PIL import Image

import iwin_dit
from iwin_dit.evaluation import extractors

RECIPE = {
    "output_dir": "run",
    "model": {"depth": 2, "width": 32, "heads": 2, "patch_size": 1, "sample_size": 8, "in_channels": 4}
    | {"num_classes": 3, "mixer": {"window_size": 4}},
    "train": {
        "max_steps": 2,
        "batch_images": 4,
        "precision": "fp32",
        "num_workers": 0,
        "sample_every_steps": 2,
    },
    "sample": {"num_inference_steps": 2, "num_per_class": 1},
    "optimizer": {"eps": 1e-6},
}


def prepare(latents: str) -> None:
    """The folders that the page names, at toy size."""
    assert Path(iwin_dit.__file__).is_relative_to(Path.cwd()), "the copy is imported"
    make_sets(Path())
    Path("other").rename("samples")
    for label in ("a", "b"):
        Path("photos", label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (16, 16), (40 * i, 99, 200 * (label == "a"))).save(f"photos/{label}/{i}.png")
    AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained("my-vae")
    Path("toy.yaml").write_text(yaml.safe_dump(RECIPE | {"data": {"path": latents}}))
    extractors.Inception = Stub


def run(command: list[str], number: int) -> None:
    """``python SCRIPT ...`` or ``accelerate launch SCRIPT ...``; training by the toy recipe."""
    script, *arguments = command[1:] if command[0] == "python" else command[2:]
    if script == "train_dit.py":
        arguments = ["--config", "toy.yaml", "--output_dir", f"runs/{number}", *arguments]
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{command} ended with {ended.code}") from None
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def main() -> None:
    todo, outcome, number = json.load(sys.stdin), {}, 0
    prepare(sys.argv[1])
    for title, commands in todo.items():
        told = io.StringIO()
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                for command in commands:
                    number += 1
                    run(command, number)
            outcome[title] = None
        except Exception:
            outcome[title] = f"{told.getvalue()[-3000:]}\n{traceback.format_exc()}"
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
