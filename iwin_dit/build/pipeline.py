"""Where a recipe and a model become a pipeline, and the previews that it draws while it trains."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

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
from iwin_dit.runtime.run import RunDirectory
from iwin_dit.training.attention import any_attention


def build_pipeline(config: Config, model: nn.Module, dataset: Data) -> ClassConditionalPipeline:
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


def build_preview(
    config: Config, dataset: Data, run: RunDirectory | None, accelerator: Accelerator
) -> Callable[[dict[str, Tensor], int, Any], None]:
    """``preview(ema, step, stop)`` writes ``samples/step-00001000.png``, and gives it to the trackers.

    The first ten classes with fixed seeds, clips as film strips and GIF; nothing is written once ``stop`` is
    true.
    """

    def draw(ema: dict[str, Tensor], stop: Any) -> tuple[list[Sample], dict[int, str]]:
        weights = {name: tensor.to(accelerator.device) for name, tensor in ema.items()}
        pipeline = build_pipeline(config, model_of(config, weights), dataset)
        pipeline.set_progress_bar_config(disable=True)
        labels = range(min(10, config.model.num_classes))
        number, options = config.sample.num_per_class, sampling_options(config)
        drawn = sample_classes(pipeline, labels, number, config.seed, BATCH, **options)
        return list(itertools.takewhile(lambda sample: not stop, drawn)), pipeline.id2label

    @any_attention
    def preview(ema: dict[str, Tensor], step: int, stop: Any) -> None:
        try:
            samples, names = draw(ema, stop)
        except Exception as error:  # training goes on, and says itself where it diverges or does not fit
            if not (isinstance(error, DataError) or is_out_of_memory(error)):
                raise
            warnings.warn(f"no samples of step {step}: {error}", stacklevel=1)
            return
        if stop:
            return
        grid = draw_grid(samples, names)
        path = run.samples / f"step-{step:08d}.png"
        grid.save(path)
        if config.model.sample_frames:
            write_gif(draw_animation(samples, names), path.with_suffix(".gif"), FPS)
        for tracker in accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **options)

    return preview
