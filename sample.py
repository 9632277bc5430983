"""Draws images: ``python sample.py --class 207 "golden retriever" --num-images 8 --out grid.png``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from iwin_dit.runtime.errors import ConfigError, run_script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--class", dest="labels", nargs="+", required=True, metavar="ID|NAME", help="class ids or names")
    add("--checkpoint", help="a run, a pipeline folder or a hub id; without it the newest run")
    add("--num-images", type=int, default=4, help="images per class")
    add("--seed", type=int, default=0, help="image k of a class depends on the seed, the class and k alone")
    add("--batch-size", type=int, default=16, help="images of one forward pass")
    add("--steps", type=int, default=50, help="steps of the sampler")
    add("--guidance-scale", type=float, default=2.0, help="1 is without guidance")
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="1 is noise",
    )
    add("--guidance-channels", type=int, help="guide the first so many latent channels only")
    add(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels; without it the model's own"
    )
    add(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="a .png is a grid, anything else a folder of images",
    )
    add("--device", help="without it a GPU where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    for name in ("num_images", "batch_size", "steps"):
        if getattr(arguments, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least 1"
            )
    return arguments


def check_writable(out: Path) -> None:
    """Finds out before any work that the result can be written."""
    folder = out.parent if out.suffix == ".png" else out
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK) or (out.suffix == ".png" and out.is_dir()):
        raise ConfigError(f"--out {out} cannot be written: {existing} is no folder that you may write to")


def main() -> None:
    arguments = parse_arguments()
    check_writable(arguments.out)

    import torch

    from iwin_dit import build
    from iwin_dit.pipelines.sampling import draw_grid, sample_classes, write_samples

    checkpoint = arguments.checkpoint or str(build.newest_run())
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = build.load_pipeline(checkpoint)
    try:
        pipeline.to(device, getattr(torch, arguments.dtype))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None
    pipeline.set_progress_bar_config(disable=True)
    height, width = arguments.size or (None, None)
    options = dict(
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        guidance_interval=tuple(arguments.guidance_interval),
        guidance_channels=arguments.guidance_channels,
        height=height,
        width=width,
    )
    try:
        labels = list(dict.fromkeys(pipeline.get_label_ids(arguments.labels)))
        samples = sample_classes(
            pipeline, labels, arguments.num_images, arguments.seed, arguments.batch_size, **options
        )
        samples = list(samples)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    recipe = {
        "checkpoint": checkpoint,
        "classes": labels,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        **options,
    }
    if arguments.out.suffix == ".png":
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(samples, pipeline.id2label).save(arguments.out)
        arguments.out.with_suffix(".json").write_text(json.dumps(recipe, indent=2) + "\n")
    else:
        write_samples(samples, arguments.out, recipe)
    print(f"{len(samples)} images in {arguments.out}")


if __name__ == "__main__":
    run_script(main)
