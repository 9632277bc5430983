"""Draws images: ``python sample.py --class 207 "golden retriever" --num-images 8 --out grid.png``.

A model of clips draws clips: film strips as PNG, GIF and MP4.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from iwin_dit.runtime import files
from iwin_dit.runtime.errors import FULL, ConfigError, run_script

GRIDS = (".png", ".gif", ".mp4")
OTHERS = (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".apng", ".webm", ".avi", ".mkv", ".mov")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--class", dest="labels", nargs="+", required=True, metavar="ID|NAME", help="class ids or names")
    add("--checkpoint", help="a run, a pipeline folder or a hub id (the newest run)")
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

    import torch

    from iwin_dit.build_pipeline import choose_sampler, compile_models, load_guide, load_pipeline, newest_run
    from iwin_dit.data.codec import weights_sha256
    from iwin_dit.pipelines.sampling import open_folder, sample_classes, write_grid, write_samples

    checkpoint = arguments.checkpoint or str(newest_run())
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(checkpoint, device, getattr(torch, arguments.dtype), arguments.ema_std)
    choose_sampler(pipeline, arguments.sampler)
    guide = None if arguments.guide is None else load_guide(arguments.guide, pipeline)
    height, width = arguments.size or (None, None)
    options = dict(
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        guidance_interval=tuple(arguments.guidance_interval),
        guidance_channels=arguments.guidance_channels,
        height=height,
        width=width,
    )
    is_video = pipeline.transformer.rank == 3
    if is_video:
        options["num_frames"] = arguments.num_frames
    elif arguments.num_frames is not None or arguments.out.suffix.lower() in GRIDS[1:]:
        raise ConfigError(f"--num-frames, .gif and .mp4 are for clips, but {checkpoint} draws images")
    count, seed, out, fps = arguments.num_images, arguments.seed, arguments.out, arguments.fps
    try:
        labels = list(dict.fromkeys(pipeline.get_label_ids(arguments.labels)))
        recipe = {"checkpoint": checkpoint, "weights_sha256": weights_sha256(pipeline.transformer)}
        recipe |= {"classes": labels, "num_images": count, "seed": seed, **options}
        recipe |= {"dtype": arguments.dtype, "ema_std": arguments.ema_std, "sampler": arguments.sampler}
        recipe |= {"guide": arguments.guide, "guide_sha256": weights_sha256(guide) if guide else None}
        if arguments.compile:
            compile_models(pipeline.transformer, guide)
        drawn = set() if arguments.is_grid else open_folder(out, recipe)
        options["guide"] = guide
        samples = sample_classes(pipeline, labels, count, seed, arguments.batch_size, drawn, **options)
        if arguments.is_grid:
            samples = list(samples)
            made, written = len(samples), write_grid(samples, out, recipe, pipeline.id2label, fps)
        else:
            made, written = write_samples(samples, out, fps), [out]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from None
    kept = f", {len(drawn)} were there" if drawn else ""
    print(f"{made} {'clips' if is_video else 'images'} in {', '.join(map(str, written))}{kept}")


if __name__ == "__main__":
    run_script(main)
