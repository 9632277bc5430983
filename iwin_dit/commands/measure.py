"""One evaluation: arguments of ``iwin-dit evaluate`` become objects, and figures a result to be repeated."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from iwin_dit.build.evaluation import build_extractor
from iwin_dit.build.loading import choose_sampler, compile_models, load_guide, load_pipeline, sampling_of
from iwin_dit.commands.drawing import describe_scheduler, settle
from iwin_dit.config.metrics import looks_at_clips, name_figures
from iwin_dit.data.codec import weights_sha256
from iwin_dit.evaluation.drawing import SampledImages, drawer, label_plan, open_export
from iwin_dit.evaluation.evaluate import extract_features, features_key, read_features
from iwin_dit.evaluation.images import Extractor, Images, Reading, open_set
from iwin_dit.evaluation.metrics import METRICS, Features, compute
from iwin_dit.evaluation.reference import Reference, open_reference, split
from iwin_dit.evaluation.rules import holds_images
from iwin_dit.evaluation.statistics import identity, write_statistics
from iwin_dit.runtime import files, scratch
from iwin_dit.runtime.colours import background
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.lock import hold
from iwin_dit.runtime.processes import (
    cores,
    group_timeout,
    keep_freed_memory,
    on_main,
    together,
    use_all_cores,
)
from iwin_dit.runtime.progress import say

VERSIONS = ("torch", "torchvision", "diffusers", "timm", "torch-fidelity", "numpy")


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one set of images, with all that is needed to repeat them.

    The main process writes the result to ``arguments.out``.

    Args:
        arguments: as :func:`iwin_dit.evaluation.rules.check_arguments` leaves them.

    Returns:
        the result, on every process.

    Raises:
        ConfigError, DataError, CheckpointError: for what is found to be of no use before images are drawn.
    """
    metrics = arguments.metrics.split(",")
    accelerator = Accelerator(kwargs_handlers=[group_timeout()])
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
        keep_freed_memory()
    size = arguments.size and (arguments.size[0], arguments.size[-1])
    workers = min(4, cores()) if arguments.workers is None else arguments.workers
    reading = Reading(size, background(arguments.background), arguments.follow_links, workers)
    reference = on_main(
        accelerator, lambda: open_reference(arguments.reference, metrics, arguments.extractor, reading)
    )
    keeps = reference.images is not None and reference.statistics is None and split(metrics)[1]
    if arguments.save_reference is not None and not keeps:
        raise ConfigError(
            "--save-reference keeps means and covariances of real images for fid, sfid, fd or fvd; give one "
            "of these metrics and a --reference of images, or leave it out"
        )
    generated = _generated(arguments, reading, accelerator)
    with accelerator.local_main_process_first():  # which may fetch the weights
        extractor = build_extractor(arguments.extractor, arguments.inception_weights).to(accelerator.device)
    reference.check_counts(metrics, len(generated))
    reference.check_fit(generated, metrics, extractor, accelerator.device)
    outputs = {name: getattr(arguments, name) for name in ("out", "save_images", "save_reference")}
    works = {name: scratch.beside(Path(path)) for name, path in outputs.items() if path is not None}
    # to the end: another evaluation with one of these outputs is refused
    held = together(accelerator, lambda: [hold(scratch.make(work)) for work in works.values()])
    export = None
    if arguments.save_images is not None:
        parts = works["save_images"] / f"images-{generated.fingerprint[:32]}"
        with accelerator.main_process_first():
            export = open_export(Path(arguments.save_images), generated, parts)
    # before images are drawn: what is wrong with one of them shows now
    reference.extract(extractor, arguments.batch_size, accelerator)
    folder = works["out"] / features_key(generated, extractor)
    extract_features(generated, extractor, folder, arguments.batch_size, accelerator, "generated", export)
    if export is not None:
        together(accelerator, export.finish)

    def finish() -> dict[str, Any]:
        own = read_features(folder, len(generated), metrics)
        figures = _figures(arguments, own, reference, extractor, accelerator.device)
        result = {
            "figures": figures,
            "generated": generated.description | {"sha256": generated.fingerprint},
            "reference": reference.describe(),
            "extractor": identity(extractor),
            "arguments": {k: value for k, value in vars(arguments).items() if k not in ("repeat", "sweep")},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS},
        }
        files.replace(Path(arguments.out), files.to_json(result))
        for made, lock in zip(works.values(), held or (), strict=True):
            scratch.remove(made)
            lock.close()
        return result

    return on_main(accelerator, finish)


def _figures(
    arguments: argparse.Namespace,
    own: Features,
    reference: Reference,
    extractor: Extractor,
    device: torch.device,
) -> dict[str, float]:
    """The metrics of generated samples by their features, named after the extractor."""
    metrics = arguments.metrics.split(",")
    other = reference.read(metrics, extractor)
    if arguments.save_reference is not None:
        write_statistics(Path(arguments.save_reference), other, extractor, reference.describe() or {})
    figures = compute(metrics, own, other, device)
    for name in metrics:
        moments = None if METRICS[name].every_sample else own.moments[METRICS[name].layer]
        if moments is not None and moments.count < len(moments.mean):
            say(
                f"{name} of {moments.count} images, fewer than the {len(moments.mean)} features: it comes "
                "out too high, and compares with figures of the same number of images alone"
            )
    return name_figures(figures, arguments.extractor.partition(":")[0])


def _generated(arguments: argparse.Namespace, reading: Reading, accelerator: Accelerator) -> Images:
    """A folder or ``.npz`` of images; or what a run or pipeline draws."""
    of_clips = looks_at_clips(arguments.extractor)
    if holds_images(arguments.generated):
        return on_main(accelerator, lambda: open_set(arguments.generated, of_clips, reading))
    averages = {"ema": arguments.ema, "ema_std": arguments.ema_std}
    pipeline = load_pipeline(arguments.generated, accelerator.device, **averages)
    draws_clips = pipeline.transformer.rank == 3
    if draws_clips != of_clips:
        what = "clips, which i3d:FILE alone compares" if draws_clips else "images, i3d compares clips"
        raise ConfigError(f"{arguments.generated} draws {what}; take another --extractor, or other samples")
    if draws_clips and arguments.save_images is not None:
        raise ConfigError("--save-images is for images; sample.py writes clips to a folder")
    choose_sampler(pipeline, arguments.sampler, arguments.shift)
    guide = None if arguments.guide is None else load_guide(arguments.guide, pipeline)
    options = settle(arguments, sampling_of(arguments.generated))
    num_classes = pipeline.transformer.config.num_classes
    recipe = (
        options
        | {
            "model": arguments.generated,
            "weights_sha256": weights_sha256(pipeline.transformer),
            "vae_sha256": weights_sha256(pipeline.vae),
            "latents_mean": pipeline.config.latents_mean,
            "latents_std": pipeline.config.latents_std,
            "plan": arguments.plan,
        }
        | describe_scheduler(pipeline)
        | {name: value for name, value in averages.items() if value is not None}
    )
    if guide is not None:
        recipe |= {"guide": arguments.guide, "guide_sha256": weights_sha256(guide)}
        options["guide"] = guide
    if arguments.compile:
        compile_models(pipeline.transformer, guide)
    labels = label_plan(arguments.plan, arguments.num_images, num_classes, arguments.seed)
    return SampledImages(drawer(pipeline, options), labels, arguments.seed, recipe, arguments.draw_batch)
