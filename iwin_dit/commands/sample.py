"""Draws images: ``iwin-dit sample --class 207 "golden retriever" --num-images 8 --out grid.png``.

A model of clips draws clips: film strips as PNG, GIF and MP4.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwin_dit.commands.drawing import add_drawing_options, describe_scheduler, settle
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import FULL, ConfigError, Parser

if TYPE_CHECKING:
    from iwin_dit.pipelines.base import ClassConditionalPipeline

GRIDS = (".png", ".gif", ".mp4")
OTHERS = (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".apng", ".webm", ".avi", ".mkv", ".mov")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
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
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels (the model's own)")
    add("--num-frames", type=int, help="of a clip (the model's own)")
    add("--fps", type=float, default=8, help="frames per second of a clip (8)")
    add("--out", default="samples.png", help="x.png is a grid, else a folder (samples.png)")
    add("--device", help="cuda, cpu, ... (a GPU where there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    add("--compile", action="store_true", help="compile the model first: worth it for many images")
    add_drawing_options(parser)
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
    files.check_writable(out, "--out", is_file=arguments.is_grid)
    return arguments


def main() -> None:
    """Draws what the command line asks for; the last line says what was drawn, and where it is.

    Raises:
        ConfigError, CheckpointError, DataError: for what does not fit the model, or cannot be written.
    """
    arguments = parse_arguments()
    import torch

    from iwin_dit.build.loading import choose_sampler, load_pipeline, newest_run

    checkpoint, out = arguments.checkpoint or str(newest_run()), arguments.out
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    averages = arguments.ema_std, arguments.ema
    pipeline = load_pipeline(checkpoint, device, getattr(torch, arguments.dtype), *averages)
    choose_sampler(pipeline, arguments.sampler, arguments.shift)
    is_video = pipeline.transformer.rank == 3
    if not is_video and (arguments.num_frames is not None or out.suffix.lower() in GRIDS[1:]):
        raise ConfigError(f"--num-frames, .gif and .mp4 are for clips, but {checkpoint} draws images")
    try:
        made, kept, written = draw(arguments, checkpoint, pipeline)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from None
    there = f", {kept} were there" if kept else ""
    print(f"{made} {'clips' if is_video else 'images'} in {', '.join(map(str, written))}{there}")


def draw(
    arguments: argparse.Namespace, checkpoint: str, pipeline: ClassConditionalPipeline
) -> tuple[int, int, list[Path]]:
    """Draws and writes the samples, with their recipe.

    Returns:
        how many samples were drawn, how many were there, and the paths.
    """
    from iwin_dit.build.loading import compile_models, load_guide, sampling_of
    from iwin_dit.data.codec import weights_sha256
    from iwin_dit.pipelines.sampling import check_grid, open_folder, sample_classes, write_grid, write_samples

    guide = None if arguments.guide is None else load_guide(arguments.guide, pipeline)
    height, width = arguments.size or (None, None)
    options = settle(arguments, sampling_of(checkpoint)) | {"height": height, "width": width}
    if pipeline.transformer.rank == 3:
        options["num_frames"] = arguments.num_frames
    count, seed, out = arguments.num_images, arguments.seed, arguments.out
    labels = list(dict.fromkeys(pipeline.get_label_ids(arguments.labels)))
    named = [pipeline.id2label.get(label) for label in labels]
    recipe: dict[str, Any] = {"checkpoint": checkpoint}
    recipe |= {"weights_sha256": weights_sha256(pipeline.transformer)}
    recipe |= {"classes": labels, "class_names": named, "num_images": count, "seed": seed, **options}
    recipe |= {"dtype": arguments.dtype, "ema_std": arguments.ema_std, "ema": arguments.ema}
    recipe |= {"sampler": arguments.sampler} | describe_scheduler(pipeline)
    recipe |= {"guide": arguments.guide, "guide_sha256": weights_sha256(guide) if guide else None}
    if arguments.is_grid:
        check_grid(out)
    if arguments.compile:
        compile_models(pipeline.transformer, guide)
    drawn = set() if arguments.is_grid else open_folder(out, recipe)
    options["guide"] = guide
    samples = sample_classes(pipeline, labels, count, seed, arguments.batch_size, drawn, **options)
    if arguments.is_grid:
        together = list(samples)
        return len(together), 0, write_grid(together, out, recipe, pipeline.id2label, arguments.fps)
    return write_samples(samples, out, arguments.fps), len(drawn), [out]
