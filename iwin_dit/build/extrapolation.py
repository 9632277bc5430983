"""Neon: away from what a model becomes when it learns from its own samples.

Source: Alemohammad et al. 2025, arXiv 2510.03597: ``(1 + w) theta - w theta_s``, where ``theta_s`` are the
weights ``theta`` after a short training on samples that they have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from iwin_dit.config.alignment import AlignmentConfig
from iwin_dit.config.rules import check
from iwin_dit.config.schema import Config
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.sampling import draw_in_parts
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import CheckpointError, ConfigError, DataError, reason
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.seeds import generator

SAMPLES_OF_A_FILE = 1000


class OwnSamples:
    """Samples of a pipeline as data to train on, see :class:`iwin_dit.data.examples.Data`.

    Args:
        latents: ``(N, C, [T,] h, w)``, normalised, as the pipeline draws them.
        labels: the class of each.
        pipeline: which drew them.
        vae_path: its autoencoder.
    """

    def __init__(
        self, latents: Tensor, labels: Sequence[int], pipeline: ClassConditionalPipeline, vae_path: str
    ):
        self.latents, self.labels, self.vae_path = latents, labels, vae_path
        self.latent_shape: tuple[int, ...] = tuple(latents.shape[1:])
        names = pipeline.id2label
        self.class_names = [names[label] for label in sorted(names)]
        channels = latents.shape[1]
        self.mean: list[float] = pipeline.config.latents_mean or [0.0] * channels
        self.std: list[float] = pipeline.config.latents_std or [1.0] * channels

    @cached_property
    def identity(self) -> dict[str, Any]:
        """A hash of the samples and of their labels."""
        content = hashlib.sha256(repr(list(self.labels)).encode())
        content.update(self.latents.contiguous().numpy().data)
        return {"own_samples_sha256": content.hexdigest()}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.latents[i], self.labels[i]

    def draw(
        self, indices: Sequence[int], mirrored: Sequence[bool], rngs: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[int]]:
        """These samples as they are: none has a mirror image."""
        return self.latents[list(indices)], [self.labels[i] for i in indices]


def draw_samples(
    pipeline: ClassConditionalPipeline,
    labels: Sequence[int],
    seed: int,
    batch_size: int,
    folder: Path,
    options: dict[str, Any],
) -> Tensor:
    """Normalised latents ``(N, C, [T,] h, w)`` of these classes, on the CPU.

    They are kept in ``folder``, a file for each thousand: a call that was stopped goes on.

    Raises:
        ConfigError: where the pipeline refuses the options.
        DataError: where it draws what is not finite, or where a file is damaged.
    """

    def draw(chosen: list[int], generators: list[torch.Generator]) -> Tensor:
        try:
            drawn = pipeline(chosen, generator=generators, output_type="latent", return_dict=False, **options)
            return drawn[0].float().cpu()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with progress(total=len(labels), unit="sample", desc="draw") as bar:
        for first in range(0, len(labels), SAMPLES_OF_A_FILE):
            path = folder / f"latents-{first:08d}.safetensors"
            numbers = range(first, min(len(labels), first + SAMPLES_OF_A_FILE))
            if not path.exists():
                drawn: list[Tensor] = []
                for start in range(numbers.start, numbers.stop, batch_size):
                    batch = numbers[start - first : start - first + batch_size]
                    seeds = [generator(seed, "own sample", number) for number in batch]
                    drawn += draw_in_parts(draw, [labels[number] for number in batch], seeds)
                    bar.update(len(batch))
                latents = torch.cat(drawn)
                if not latents.isfinite().all():
                    raise DataError("the model draws latents that are not finite; train it further first")
                files.replace(path, save({"latents": latents}))
            else:
                bar.update(len(numbers))
            parts.append(_read(path, len(numbers)))
    return torch.cat(parts)


def _read(path: Path, count: int) -> Tensor:
    try:
        latents = load_file(path)["latents"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path} is damaged ({reason(error)}); remove it, and it is drawn again") from None
    if len(latents) != count:
        raise DataError(f"{path} has {len(latents)} samples, expected {count}; remove it")
    return latents


def recipe_of_copy(config: Config, start: Path, out: Path, steps: int, rate: float | None) -> Config:
    """The recipe by which a copy of a model learns from its own samples.

    The objective, the batch and the optimiser are those of the run. The rate is constant, one process trains,
    and nothing is mirrored, averaged, aligned or shown.

    Args:
        start: the pipeline whose weights the copy begins with.
        steps: of training.
        rate: of learning; None takes the run's.

    Raises:
        ConfigError: where the rate or the steps cannot be.
    """
    train = replace(config.train, max_steps=steps, trackers=[], sample_every_steps=0, evaluate_every_steps=0)
    if train.micro_batch is None or train.sharding != "none":  # one process does what several did
        train = replace(train, micro_batch="auto", sharding="none")
    optimizer = replace(config.optimizer, schedule="constant", warmup_steps=0, min_learning_rate=0.0)
    dense_from = None if config.model.dense_from_step is None else 0  # as the run ended
    copy = replace(
        config,
        output_dir=str(out),
        data=replace(config.data, random_flip=False),
        model=replace(config.model, init_from=str(start), dense_from_step=dense_from),
        alignment=AlignmentConfig(),
        optimizer=optimizer if rate is None else replace(optimizer, learning_rate=rate),
        ema=replace(config.ema, decays=[0.0], power_stds=[], snapshot_every_steps=0),
        train=train,
    )
    check(copy)
    return copy


@torch.no_grad()
def extrapolate(model: dict[str, Tensor], copy: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """``(1 + w) theta - w theta_s``, tensor by tensor, computed in float32.

    Args:
        model: its tensors by name, theta.
        copy: those of the copy that has learnt from samples of the model, theta_s.
        scale: w, how far to move away; 0 leaves the model as it is.

    Raises:
        CheckpointError: where the two are not of one network.
    """
    if {name: t.shape for name, t in model.items()} != {name: t.shape for name, t in copy.items()}:
        raise CheckpointError("the model and the copy that has learnt from its samples are other networks")
    return {
        name: theta.float().lerp(copy[name].float(), -scale).to(theta.dtype)
        if theta.is_floating_point()
        else theta
        for name, theta in model.items()
    }
