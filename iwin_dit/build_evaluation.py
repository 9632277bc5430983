"""Where the arguments of ``evaluate_fid.py`` become objects, and figures a result that can be repeated."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from iwin_dit.build_classifier import load_classifier
from iwin_dit.build_pipeline import choose_sampler, compile_models, load_guide, load_pipeline
from iwin_dit.data.codec import weights_sha256
from iwin_dit.evaluation.clips import open_clips
from iwin_dit.evaluation.evaluate import (
    extract_features,
    features_key,
    read_features,
)
from iwin_dit.evaluation.export import Export, open_export
from iwin_dit.evaluation.extractors import Classifier, DINOv2, Inception
from iwin_dit.evaluation.i3d import I3D
from iwin_dit.evaluation.images import BROKEN_NPZ, Images, SampledImages, label_plan, open_images
from iwin_dit.evaluation.metrics import METRICS, Features, check_counts, compute
from iwin_dit.evaluation.rules import holds_images, name_figures
from iwin_dit.evaluation.statistics import identity, read_statistics, write_statistics
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.runtime import files
from iwin_dit.runtime.cpu import keep_freed_memory, use_all_cores
from iwin_dit.runtime.errors import FULL, ConfigError, DataError
from iwin_dit.runtime.lock import hold
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
    metrics, out = arguments.metrics.split(","), Path(arguments.out)
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
        keep_freed_memory()
    reference = open_reference(arguments.reference, metrics, arguments.extractor)
    generated = _generated(arguments, accelerator.device)
    with accelerator.local_main_process_first():  # which may fetch the weights
        extractor = build_extractor(arguments.extractor, arguments.inception_weights).to(accelerator.device)
    real = None if isinstance(reference, Path) else reference
    check_counts(metrics, len(generated), None if real is None else len(real))
    other = read_statistics(reference, metrics, extractor) if isinstance(reference, Path) else None
    if reference is not None:
        check_fit(generated, real or other, extractor, accelerator.device)
    work, export = out.with_suffix(".work"), None
    if accelerator.is_main_process:
        work.mkdir(parents=True, exist_ok=True)
        held = hold(work)  # noqa: F841  to the end: another evaluation would remove what lies there
    if arguments.save_images is not None:
        parts = work / f"images-{generated.fingerprint[:32]}"
        with accelerator.main_process_first():
            export = open_export(Path(arguments.save_images), generated, parts)
    batch = arguments.batch_size
    folder = extract(generated, extractor, work, batch, accelerator, "generated", export)
    own = read_features(folder, len(generated), metrics)
    if export is not None and accelerator.is_main_process:
        export.finish()
    if real is not None:
        other = read_reference(real, extractor, metrics, batch, accelerator)
        if arguments.save_reference is not None and accelerator.is_main_process:
            write_statistics(Path(arguments.save_reference), other, extractor, _describe(real))
    kind = arguments.extractor.partition(":")[0]
    result = {
        "figures": name_figures(compute(metrics, own, other), kind),
        "generated": generated.description | {"sha256": generated.fingerprint},
        "reference": _describe(reference),
        "extractor": identity(extractor),
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("repeat", "sweep")},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS},
    }
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _warn_of_few_images(metrics, own)
        files.replace(out, files.to_json(result))
        shutil.rmtree(work, ignore_errors=True)
    return result


def build_extractor(name: str, inception_weights: str | None) -> nn.Module:
    """The network that ``--extractor`` names, on the CPU.

    Raises:
        CheckpointError: where its weights are not there, or of another network.
    """
    kind, _, source = name.partition(":")
    if kind == "iwin":
        loaded = load_classifier(source)
        return Classifier(loaded.model, loaded.image_size, loaded.mean, loaded.std, loaded.sha256)
    if kind == "dinov2":
        return DINOv2(Path(source) if source else None)
    if kind == "i3d":
        return I3D(Path(source))
    return Inception(None if inception_weights is None else Path(inception_weights))


def check_fit(
    generated: Images, reference: Images | Features, extractor: nn.Module, device: torch.device
) -> None:
    """Sizes of images; or, of statistics, the number of features. Looks at one image."""
    first = generated.read(0, 1)
    if isinstance(reference, Features):
        found = extractor(first.to(device))
        for layer, moments in reference.moments.items():
            if (count := found[layer].shape[1]) != len(moments.mean):
                raise DataError(
                    f"the reference's statistics are of {len(moments.mean)} features, {extractor.name} has "
                    f"{count}; take the extractor that they were made with"
                )
        return
    sides = [tuple(images.shape[2:]) for images in (first, reference.read(0, 1))]
    if sides[0] != sides[1]:
        raise DataError(
            f"the generated images have {sides[0]} pixels, the reference's have {sides[1]}; "
            "take a reference of the same size"
        )


def _warn_of_few_images(metrics: list[str], generated: Features) -> None:
    for name in metrics:
        moments = generated.moments.get(METRICS[name].layer)
        if not METRICS[name].every_sample and moments.count < len(moments.mean):
            say(
                f"{name} of {moments.count} images, fewer than the {len(moments.mean)} features: it comes "
                "out too high, and compares with figures of the same number of images alone"
            )


def extract(
    images: Images,
    extractor: nn.Module,
    folder: Path,
    batch_size: int,
    accelerator: Accelerator,
    title: str,
    export: Export | None = None,
) -> Path:
    """Writes the features of a set that are not there already, by all processes; returns their folder."""
    folder = folder / features_key(images, extractor)
    extract_features(
        images,
        extractor,
        extractor.layers,
        folder,
        batch_size,
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
        title,
        export,
    )
    return folder


def read_reference(
    images: Images, extractor: nn.Module, metrics: list[str], batch_size: int, accelerator: Accelerator
) -> Features:
    """Features of real images, from the cache; each set's are kept under a key of its content."""
    with reference_cache() as cache:
        folder = extract(images, extractor, cache, batch_size, accelerator, "reference")
        return read_features(folder, len(images), metrics)


@contextlib.contextmanager
def reference_cache() -> Iterator[Path]:
    """The folder of the references' features, which is made.

    Raises:
        ConfigError: where it cannot be made or, in the context, written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "iwin-dit" / "references"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield cache
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(
            f"features of the reference cannot be kept in {cache}: {error.strerror}; "
            "set XDG_CACHE_HOME to a folder that is yours"
        ) from None


def open_reference(location: str | None, metrics: list[str], extractor: str) -> Images | Path | None:
    """Images, clips or a file of statistics; None where no metric needs one.

    Args:
        extractor: as ``--extractor`` names it; ``i3d:FILE`` takes clips.
    """
    needing = [name for name in metrics if METRICS[name].needs_reference]
    if location is None:
        if needing:
            raise ConfigError(f"{', '.join(needing)} compares with real images: give --reference")
        return None
    path = Path(location)
    if path.suffix == ".safetensors" or (path.suffix == ".npz" and _holds(path, "mu.npy")):
        return path
    with reference_cache():
        pass  # made now: where it cannot be, that shows before images are drawn
    return open_set(location, extractor)


def open_set(location: str, extractor: str) -> Images:
    """Clips for an extractor of clips; images for the others."""
    return open_clips(location) if extractor.startswith("i3d:") else open_images(location)


def _holds(path: Path, name: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return name in archive.namelist()
    except BROKEN_NPZ:  # to be told when it is read
        return False


def _describe(reference: Images | Path | None) -> dict[str, Any] | None:
    if reference is None:
        return None
    if isinstance(reference, Path):
        return {"statistics": str(reference), "sha256": files.fingerprint(reference)["sha256"]}
    return reference.description | {"sha256": reference.fingerprint}


def _generated(arguments: argparse.Namespace, device: torch.device) -> Images:
    """A folder or ``.npz`` of images; or what a run or pipeline draws."""
    if holds_images(arguments.generated):
        return open_set(arguments.generated, arguments.extractor)
    pipeline = load_pipeline(arguments.generated, device)
    draws_clips = pipeline.transformer.rank == 3
    if draws_clips != arguments.extractor.startswith("i3d:"):
        what = "clips, which i3d:FILE alone compares" if draws_clips else "images, i3d compares clips"
        raise ConfigError(f"{arguments.generated} draws {what}; take another --extractor, or other samples")
    if draws_clips and arguments.save_images is not None:
        raise ConfigError("--save-images is for images; sample.py writes clips to a folder")
    choose_sampler(pipeline, arguments.sampler)
    guide = None if arguments.guide is None else load_guide(arguments.guide, pipeline)
    options = dict(
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        guidance_interval=tuple(arguments.guidance_interval),
        guidance_channels=arguments.guidance_channels,
    )
    num_classes = pipeline.transformer.config.num_classes
    settings = {name: value for name, value in pipeline.scheduler.config.items() if name[0] != "_"}
    recipe = options | {
        "model": arguments.generated,
        "weights_sha256": weights_sha256(pipeline.transformer),
        "vae_sha256": weights_sha256(pipeline.vae),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_settings": settings,
        "latents_mean": pipeline.config.latents_mean,
        "latents_std": pipeline.config.latents_std,
        "plan": arguments.plan,
    }
    if guide is not None:
        recipe |= {"guide": arguments.guide, "guide_sha256": weights_sha256(guide)}
        options["guide"] = guide
    if arguments.compile:
        compile_models(pipeline.transformer, guide)
    labels = label_plan(arguments.plan, arguments.num_images, num_classes, arguments.seed)
    return SampledImages(drawer(pipeline, options), labels, arguments.seed, recipe, arguments.draw_batch)


def drawer(
    pipeline: ClassConditionalPipeline, options: dict[str, Any]
) -> Callable[[list[int], list[torch.Generator]], Tensor]:
    """``draw(labels, generators)``: uint8 images ``(B, 3, H, W)``, or clips ``(B, 3, T, H, W)``.

    They are rounded as saving a PNG rounds them.

    Raises, when called:
        ConfigError: where the pipeline refuses the options.
        DataError: where the model draws what is not finite.
    """

    def draw(labels: list[int], generators: list[torch.Generator]) -> Tensor:
        try:
            (images,) = pipeline(labels, generator=generators, output_type="pt", return_dict=False, **options)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if images.ndim == 5:  # (B, T, 3, H, W)
            images = images.transpose(1, 2)
        if not torch.isfinite(images).all():
            raise DataError("the model draws images that are not finite; its weights are not usable")
        return (images.float() * 255).round().to(torch.uint8)

    return draw
