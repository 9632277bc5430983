"""Where the arguments of ``evaluate_fid.py`` become objects, and figures a result that can be repeated."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from iwin_dit.build import load_pipeline
from iwin_dit.data.codec import weights_sha256
from iwin_dit.evaluation.evaluate import (
    extract_features,
    features_key,
    read_features,
    stored_statistics,
)
from iwin_dit.evaluation.extractors import Inception
from iwin_dit.evaluation.images import Images, SampledImages, label_plan, open_images
from iwin_dit.evaluation.metrics import METRICS, Features, compute
from iwin_dit.pipelines.image import IwinDiTPipeline
from iwin_dit.runtime import files
from iwin_dit.runtime.cpu import keep_freed_memory, use_all_cores
from iwin_dit.runtime.errors import ConfigError, DataError

LAYERS = ("pool", "logits", "spatial")
VERSIONS = ("torch", "torchvision", "diffusers", "torch-fidelity", "numpy")


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one set of images, with all that is needed to repeat them.

    The main process writes the result to ``arguments.out``.

    Returns:
        the result, on every process.
    """
    metrics, out = arguments.metrics.split(","), Path(arguments.out)
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
        keep_freed_memory()
    weights = arguments.inception_weights
    extractor = Inception(None if weights is None else Path(weights)).to(accelerator.device)
    generated = _generated(arguments, accelerator.device)
    reference = _reference(arguments.reference, metrics)
    if not isinstance(reference, Path | None):
        sides = [tuple(images.read(0, 1).shape[2:]) for images in (generated, reference)]
        if sides[0] != sides[1]:
            raise DataError(
                f"the generated images have {sides[0]} pixels, the reference's have {sides[1]}; "
                "take a reference of the same size"
            )
    work = out.with_suffix(".work")
    batch = arguments.batch_size
    own = _features(generated, extractor, metrics, work, batch, accelerator, "generated")
    other = None
    if isinstance(reference, Path):
        other = stored_statistics(reference, metrics)
    elif reference is not None:
        other = _features(reference, extractor, metrics, _cache(), batch, accelerator, "reference")
    result = {
        "figures": compute(metrics, own, other),
        "generated": generated.description | {"sha256": generated.fingerprint},
        "reference": _describe(reference),
        "extractor": {"name": extractor.name, "sha256": extractor.sha256},
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("repeat", "sweep")},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS},
    }
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files.replace(out, files.to_json(result))
        shutil.rmtree(work, ignore_errors=True)
    return result


def _features(
    images: Images,
    extractor: Inception,
    metrics: list[str],
    folder: Path,
    batch_size: int,
    accelerator: Accelerator,
    title: str,
) -> Features:
    """Features of a set, from files where they are there already."""
    folder = folder / features_key(images, extractor)
    extract_features(
        images,
        extractor,
        LAYERS,
        folder,
        batch_size,
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
        title,
    )
    return read_features(folder, len(images), metrics)


def _cache() -> Path:
    """Where features of references are kept; each under a key of its content and of the extractor's."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "iwin-dit" / "references"


def _reference(location: str | None, metrics: list[str]) -> Images | Path | None:
    """Images, or a file of statistics; None where no metric needs one."""
    needing = [name for name in metrics if METRICS[name].needs_reference]
    if location is None:
        if needing:
            raise ConfigError(f"{', '.join(needing)} compares with real images: give --reference")
        return None
    path = Path(location)
    if path.suffix == ".npz" and zipfile.is_zipfile(path) and "mu.npy" in zipfile.ZipFile(path).namelist():
        return path
    return open_images(location)


def _describe(reference: Images | Path | None) -> dict[str, Any] | None:
    if reference is None:
        return None
    if isinstance(reference, Path):
        return {"statistics": str(reference)}
    return reference.description | {"sha256": reference.fingerprint}


def _generated(arguments: argparse.Namespace, device: torch.device) -> Images:
    """A folder or ``.npz`` of images; or what a run or pipeline draws."""
    path = Path(arguments.generated)
    is_model = any((path / name).is_file() for name in ("config.yaml", "model_index.json"))
    if path.exists() and not is_model:
        return open_images(arguments.generated)
    pipeline = load_pipeline(arguments.generated, device)
    options = dict(
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        guidance_interval=tuple(arguments.guidance_interval),
        guidance_channels=arguments.guidance_channels,
    )
    num_classes = pipeline.transformer.config.num_classes
    recipe = options | {
        "model": arguments.generated,
        "weights_sha256": weights_sha256(pipeline.transformer),
        "vae_sha256": weights_sha256(pipeline.vae),
        "scheduler": type(pipeline.scheduler).__name__,
        "plan": arguments.plan,
    }
    labels = label_plan(arguments.plan, arguments.num_images, num_classes, arguments.seed)
    return SampledImages(drawer(pipeline, options), labels, arguments.seed, recipe)


def drawer(
    pipeline: IwinDiTPipeline, options: dict[str, Any]
) -> Callable[[list[int], list[torch.Generator]], Tensor]:
    """``draw(labels, generators)``: uint8 images, rounded as saving a PNG rounds them.

    Raises, when called:
        DataError: where the model draws what is not finite.
    """

    def draw(labels: list[int], generators: list[torch.Generator]) -> Tensor:
        images = pipeline(labels, generator=generators, output_type="pt", **options).images.float()
        if not torch.isfinite(images).all():
            raise DataError("the model draws images that are not finite; its weights are not usable")
        return (images * 255).round().to(torch.uint8)

    return draw
