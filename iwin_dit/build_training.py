"""What training takes of pipelines: the weights that a run begins with, and pictures while it goes on."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from iwin_dit.build import any_attention, build_model
from iwin_dit.build_pipeline import build_pipeline, load_transformer, model_of, sampling_options
from iwin_dit.config import Config
from iwin_dit.data.examples import Data
from iwin_dit.data.video import write_gif
from iwin_dit.models.inflation import inflate
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.sampling import (
    FPS,
    Sample,
    draw_animation,
    draw_grid,
    is_out_of_memory,
    sample_classes,
)
from iwin_dit.runtime import checkpoint
from iwin_dit.runtime.errors import CheckpointError, DataError
from iwin_dit.runtime.run import RunDirectory, has_begun

BATCH = 40  # images of a preview that are drawn together, or as many as memory has room for


def build_denoiser(config: Config) -> IwinDiTTransformer2DModel:
    """The network as it is trained: with the weights it begins with, and gradient checkpointing.

    A run that goes on has its own weights, and does not need those that it began with any more.

    Raises:
        CheckpointError: where ``model.init_from`` is not there, or of another network.
    """
    model = build_model(config)
    if config.model.init_from is not None and not has_begun(config.output_dir):
        begin_from(model, config.model.init_from)
    if every := config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        model.checkpoint_every = every
    return model


def begin_from(model: IwinDiTTransformer2DModel, source: str) -> None:
    """Copies the weights of a run, a pipeline or an imported model into a model.

    Those of a model of images serve one of clips, too.

    The label embeddings of another number of classes stay as they are drawn.

    Raises:
        CheckpointError: where they are not there, or of another network.
    """
    tensors = inflate(load_transformer(source).state_dict(), model.state_dict())
    own, labels = model.state_dict(), "label_embedding.weight"
    if tensors[labels].shape[0] != own[labels].shape[0]:
        tensors[labels] = own[labels]
    odd = sorted(
        name
        for name in {*own, *tensors}
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if odd:
        raise CheckpointError(
            f"model.init_from {source} is another network than the config's: "
            f"{checkpoint.listed(odd)} differ; take its sizes, patch size, channels and kinds of norm, MLP "
            "and modulation, and where its blocks have no convolution set model.mixer.convolution false, "
            "with a model.position_embedding"
        )
    model.load_state_dict(tensors)


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
