"""Where a recipe and a model become a pipeline, and the previews that it draws while it trains."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iwin_dit.build.data import load_autoencoder
from iwin_dit.build.network import build_model, build_objective
from iwin_dit.config.schema import Config
from iwin_dit.data.examples import Data
from iwin_dit.data.video import write_gif
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.image import IwinDiTPipeline
from iwin_dit.pipelines.sampling import (
    FPS,
    Sample,
    draw_animation,
    draw_grid,
    is_out_of_memory,
    sample_classes,
)
from iwin_dit.pipelines.video import IwinDiTVideoPipeline
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
        scheduler=build_objective(config).scheduler(config.sample.sampler),
        id2label=dict(enumerate(dataset.class_names)),
        latents_mean=dataset.mean,
        latents_std=dataset.std,
    )


def model_of(config: Config, tensors: dict[str, Tensor]) -> IwinDiTTransformer2DModel:
    """The network with these very tensors as its weights."""
    with torch.device("meta"):
        model = build_model(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def sampling_options(config: Config) -> dict[str, Any]:
    """The pipeline's arguments that the config fixes."""
    sample = config.sample
    return dict(
        num_inference_steps=sample.num_inference_steps,
        guidance_scale=sample.guidance_scale,
        guidance_interval=sample.guidance_interval,
        guidance_channels=sample.guidance_channels,
    )


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
        samples, names = _draw(config, dataset, run.accelerator.device, ema, stop)
    except Exception as error:  # training goes on, and says itself where it diverges or does not fit
        if not (isinstance(error, DataError) or is_out_of_memory(error)):
            raise
        warnings.warn(f"no samples of step {step}: {error}", stacklevel=1)
        return
    if stop:
        return
    grid = draw_grid(samples, names)
    show(run, "samples", grid, step)
    if config.model.sample_frames:
        path = run.files.samples / f"step-{step:08d}.gif"
        write_gif(draw_animation(samples, names), path, FPS)


def _draw(
    config: Config, dataset: Data, device: torch.device, ema: dict[str, Tensor], stop: StopRequest
) -> tuple[list[Sample], dict[int, str]]:
    """Samples of the first ten classes until ``stop`` is true, and the names of all."""
    pipeline = pipeline_of(config, dataset, device, ema)
    labels = range(min(10, config.model.num_classes))
    number, options = config.sample.num_per_class, sampling_options(config)
    drawn = sample_classes(pipeline, labels, number, config.seed, BATCH, **options)
    return list(itertools.takewhile(lambda sample: not stop, drawn)), pipeline.id2label


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
