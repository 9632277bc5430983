"""Where the arguments of ``sample.py`` become a pipeline, and its pictures files."""

from __future__ import annotations

import argparse

import torch

from iwin_dit.build.loading import choose_sampler, compile_models, load_guide, load_pipeline, newest_run
from iwin_dit.data.codec import weights_sha256
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.sampling import check_grid, open_folder, sample_classes, write_grid, write_samples
from iwin_dit.runtime.errors import FULL, ConfigError

GRIDS = (".png", ".gif", ".mp4")


def sample(arguments: argparse.Namespace) -> None:
    """Runs ``sample.py``; the last line says what was drawn, and where it is.

    Raises:
        ConfigError, CheckpointError, DataError: for what does not fit the model, or cannot be written.
    """
    checkpoint, out = arguments.checkpoint or str(newest_run()), arguments.out
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    averages = arguments.ema_std, arguments.ema
    pipeline = load_pipeline(checkpoint, device, getattr(torch, arguments.dtype), *averages)
    choose_sampler(pipeline, arguments.sampler)
    is_video = pipeline.transformer.rank == 3
    if not is_video and (arguments.num_frames is not None or out.suffix.lower() in GRIDS[1:]):
        raise ConfigError(f"--num-frames, .gif and .mp4 are for clips, but {checkpoint} draws images")
    try:
        made, kept, written = _draw(arguments, checkpoint, pipeline)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from None
    there = f", {kept} were there" if kept else ""
    print(f"{made} {'clips' if is_video else 'images'} in {', '.join(map(str, written))}{there}")


def _draw(
    arguments: argparse.Namespace, checkpoint: str, pipeline: ClassConditionalPipeline
) -> tuple[int, int, list]:
    """Returns how many samples were drawn, how many were there, and the paths."""
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
    if pipeline.transformer.rank == 3:
        options["num_frames"] = arguments.num_frames
    count, seed, out = arguments.num_images, arguments.seed, arguments.out
    labels = list(dict.fromkeys(pipeline.get_label_ids(arguments.labels)))
    named = [pipeline.id2label.get(label) for label in labels]
    recipe = {"checkpoint": checkpoint, "weights_sha256": weights_sha256(pipeline.transformer)}
    recipe |= {"classes": labels, "class_names": named, "num_images": count, "seed": seed, **options}
    recipe |= {"dtype": arguments.dtype, "ema_std": arguments.ema_std, "ema": arguments.ema}
    recipe |= {"sampler": arguments.sampler}
    recipe |= {"guide": arguments.guide, "guide_sha256": weights_sha256(guide) if guide else None}
    if arguments.is_grid:
        check_grid(out)
    if arguments.compile:
        compile_models(pipeline.transformer, guide)
    drawn = set() if arguments.is_grid else open_folder(out, recipe)
    options["guide"] = guide
    samples = sample_classes(pipeline, labels, count, seed, arguments.batch_size, drawn, **options)
    if arguments.is_grid:
        samples = list(samples)
        return len(samples), 0, write_grid(samples, out, recipe, pipeline.id2label, arguments.fps)
    return write_samples(samples, out, arguments.fps), len(drawn), [out]
