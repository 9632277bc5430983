"""Draws images: ``python sample.py --class 207 "golden retriever" --num-images 8 --out grid.png``.

A model of clips draws clips: film strips as PNG, GIF and MP4.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from iwin_dit.runtime import files
from iwin_dit.runtime.errors import ConfigError, run_script

GRIDS = (".png", ".gif", ".mp4")
OTHERS = (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".apng", ".webm", ".avi", ".mkv", ".mov")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--class",
        dest="labels",
        nargs="+",
        required=True,
        metavar="ID|NAME",
        help="ids or names; id:2 and name:2 say which",
    )
    add("--checkpoint", help="a run, a pipeline folder or a hub id (the run in runs/ that was begun last)")
    add("--num-images", type=int, default=4, help="images, or clips, per class (4)")
    add("--seed", type=int, default=0, help="image k depends on seed, class and k alone (0)")
    add("--batch-size", type=int, default=16, help="images of one forward pass (16)")
    add("--sampler", help="euler, heun, dpm++, unipc; of DDPM ddim, ddpm, dpm++ (the model's own)")
    add("--steps", type=int, default=50, help="steps of the sampler (50)")
    add("--guidance-scale", type=float, default=2.0, help="1 is without guidance (2)")
    low_high = dict(nargs=2, type=float, default=(0.0, 1.0), metavar=("LOW", "HIGH"))
    add("--guidance-interval", **low_high, help="times in which guidance acts; 1 is noise (0 1)")
    add("--guidance-channels", type=int, help="guide the first so many latent channels only (all)")
    add("--guide", metavar="CHECKPOINT", help="autoguidance: a smaller or less trained model guides")
    add("--ema", help="the average of this decay of a run; none: the weights themselves (the first average)")
    add("--ema-std", type=float, help="average the weights anew, to this relative standard deviation")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels (the model's own)")
    add("--num-frames", type=int, help="of a clip (the model's own)")
    add("--fps", type=float, default=8, help="frames per second of a clip (8)")
    add("--out", default="samples.png", help="x.png is a grid, else a folder (samples.png)")
    add("--device", help="cuda, cpu, ... (a GPU where there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    add("--compile", action="store_true", help="compile the model first: worth it for many images")
    arguments = parser.parse_args()
    for name in ("num_images", "batch_size", "steps", "num_frames"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if not 0.01 <= arguments.fps <= 1000:
        raise ConfigError(f"--fps is {arguments.fps}, expected 0.01 to 1000")
    out = Path(arguments.out)
    if not arguments.out or out.suffix.lower() in OTHERS:
        expected = "x.png for a grid (clips also .gif, .mp4), or a folder"
        raise ConfigError(f"--out is {arguments.out!r}, expected {expected}")
    arguments.out, arguments.is_grid = out, out.suffix.lower() in GRIDS
    if not (files.can_write_file if arguments.is_grid else files.can_write_folder)(out):
        raise ConfigError(f"--out {out} cannot be written; take a path in a folder that is yours")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from iwin_dit.build.samples import sample

    sample(arguments)


if __name__ == "__main__":
    run_script(main)
