"""Where a model, trained or imported, becomes a pipeline, and what it draws while it trains."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iwin_dit.build.data import load_autoencoder, read_statistics
from iwin_dit.build.network import build_model, build_objective
from iwin_dit.config.schema import Config
from iwin_dit.data.codec import latent_channels
from iwin_dit.data.examples import Data
from iwin_dit.data.sources import IMAGENET_NAMES
from iwin_dit.data.video import write_gif
from iwin_dit.diffusion.sampling import published_scheduler
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.base import ClassConditionalPipeline, export_pipeline
from iwin_dit.pipelines.media import IwinDiTPipeline, IwinDiTVideoPipeline
from iwin_dit.pipelines.sampling import (
    FPS,
    draw_animation,
    draw_grid,
    is_out_of_memory,
    sample_classes,
)
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.signals import StopRequest
from iwin_dit.training.attention import any_attention
from iwin_dit.training.state import Run


def build_pipeline(
    config: Config, model: IwinDiTTransformer2DModel, dataset: Data
) -> ClassConditionalPipeline:
    """The pipeline that samples this model: the VAE of its data, the scheduler of its objective."""
    kind = IwinDiTPipeline if config.model.sample_frames is None else IwinDiTVideoPipeline
    return kind(
        transformer=model,
        vae=load_autoencoder(dataset.vae_path).to(next(model.parameters()).device),
        scheduler=build_objective(config).scheduler(config.sample.sampler, config.sample.shift),
        id2label=dict(enumerate(dataset.class_names)),
        latents_mean=dataset.mean,
        latents_std=dataset.std,
    )


def model_of(config: Config, tensors: dict[str, Tensor]) -> IwinDiTTransformer2DModel:
    """The network with these very tensors as its weights, without what training alone has."""
    with torch.device("meta"):
        model = build_model(config)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("projector.")}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def sampling_options(config: Config) -> dict[str, Any]:
    """The pipeline's arguments that the config fixes."""
    options = asdict(config.sample)
    del options["sampler"], options["shift"], options["num_per_class"]
    return options


BATCH = 40  # images of a preview that are drawn together, or as many as memory has room for


@any_attention
def draw_preview(
    config: Config, dataset: Data, run: Run, ema: dict[str, Tensor], step: int, stop: StopRequest
) -> None:
    """Writes ``samples/step-00001000.png``, and gives it to the trackers.

    It shows the first ten classes with fixed seeds; clips are film strips, and a GIF beside them. Nothing is
    written once ``stop`` is true.
    """
    try:
        pipeline = pipeline_of(config, dataset, run.accelerator.device, ema)
        labels = range(min(10, config.model.num_classes))
        number, options = config.sample.num_per_class, sampling_options(config)
        drawn = sample_classes(pipeline, labels, number, config.seed, BATCH, **options)
        samples = list(itertools.takewhile(lambda sample: not stop, drawn))
    except Exception as error:  # training goes on, and says itself where it diverges or does not fit
        if not (isinstance(error, DataError) or is_out_of_memory(error)):
            raise
        warnings.warn(f"no samples of step {step}: {error}", stacklevel=1)
        return
    if stop:
        return
    show(run, "samples", draw_grid(samples, pipeline.id2label), step)
    if config.model.sample_frames:
        path = run.files.samples / f"step-{step:08d}.gif"
        write_gif(draw_animation(samples, pipeline.id2label), path, FPS)


def pipeline_of(
    config: Config, dataset: Data, device: torch.device, weights: dict[str, Tensor]
) -> ClassConditionalPipeline:
    """The pipeline of these weights on a device, which draws without a bar of its own."""
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    pipeline = build_pipeline(config, model_of(config, weights), dataset)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def show(run: Run, name: str, picture: Image.Image, step: int) -> None:
    """Writes a picture of a step to ``samples/``, and gives it to the trackers under this name."""
    picture.save(run.files.samples / f"step-{step:08d}.png")
    for tracker in run.accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: np.asarray(picture)[None]}, step=step, **options)


def import_pipeline(
    model: IwinDiTTransformer2DModel, vae: str, statistics: Path | None, folder: Path, source: Path
) -> None:
    """Writes the pipeline of an imported model; a model of 1,000 classes gets ImageNet's names.

    Args:
        vae: the autoencoder of its latents: a preset, a folder, a hub id or an original file.
        statistics: mean and standard deviation of the latents that it was trained on, as LightningDiT's
            ``latents_stats.pt``. Default: those that the autoencoder's own config says.
        source: the official file, whose hash the recipe keeps.

    Raises:
        DataError: where the autoencoder or the statistics are not there, or of other latents.
    """
    autoencoder = load_autoencoder(vae)
    channels, found = model.config.in_channels, latent_channels(autoencoder)
    if found != channels:
        raise DataError(f"--vae {vae} has {found} latent channels, the model has {channels}; take its own")
    mean, std = (None, None) if statistics is None else read_statistics(statistics, channels)
    names = IMAGENET_NAMES if model.config.num_classes == len(IMAGENET_NAMES) else ()
    pipeline = IwinDiTPipeline(
        transformer=model,
        vae=autoencoder,
        scheduler=published_scheduler(model.config.prediction_type),
        id2label=dict(enumerate(names)),
        latents_mean=mean,
        latents_std=std,
    )
    recipe: dict[str, Any] = {"imported_from": source.name, **files.fingerprint(source), "vae": vae}
    export_pipeline(pipeline, folder, recipe)
