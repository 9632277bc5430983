"""What training sees at each position of its stream, as a pure function of (seed, position).

Position ``p`` of an endless stream is image ``order[p mod N]`` of pass ``p div N``; step s reads the
positions ``[s B, (s + 1) B)`` of the global batch B. Nothing depends on the number of processes, on the split
of the batch or on when the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from iwin_dit.data.latents import LatentDataset
from iwin_dit.runtime.seeds import generator


class Example(NamedTuple):
    """One image of a training step, or a batch of them.

    x0: latent (C, h, w); label: class, or the null label where it was dropped; noise: (C, h, w); u: uniform
        in [0, 1).
    """

    x0: Tensor
    label: int | Tensor
    noise: Tensor
    u: Tensor


class Draw(NamedTuple):
    """The random choices of one position."""

    index: int
    mirrored: bool
    label: int
    noise: Tensor
    u: Tensor
    rng: torch.Generator


class TrainingExamples(Dataset):
    """``examples[position] -> Example``.

    Args:
        latents: the images.
        seed: of order, flips, label drops, noise and times.
        random_flip: mirror half of the images.
        label_dropout: share of labels replaced by ``null_label``.
    """

    def __init__(
        self,
        latents: LatentDataset,
        seed: int,
        random_flip: bool,
        label_dropout: float,
        null_label: int | None,
    ):
        self.latents, self.seed, self.random_flip = latents, seed, random_flip
        self.label_dropout, self.null_label = label_dropout, null_label

    def __getitem__(self, position: int) -> Example:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[Example]:
        """A batch at once, as a DataLoader asks for it: the shards are read together."""
        draws = [self._draw(position) for position in positions]
        x0 = torch.empty(len(draws), *self.latents.latent_shape)
        for mirrored in (False, True):
            chosen = [i for i, draw in enumerate(draws) if draw.mirrored == mirrored]
            if chosen:
                x0[chosen] = self._latents([draws[i] for i in chosen], mirrored)
        return [Example(x0[i], draw.label, draw.noise, draw.u) for i, draw in enumerate(draws)]

    def _draw(self, position: int) -> Draw:
        epoch, offset = divmod(position, len(self.latents))
        rng = generator(self.seed, "example", position)
        u, flip, drop = torch.rand(3, generator=rng)
        index = int(epoch_order(self.seed, epoch, len(self.latents))[offset])
        label = self.null_label if drop < self.label_dropout else int(self.latents.labels[index])
        noise = torch.randn(self.latents.latent_shape, generator=rng)
        return Draw(index, self.random_flip and bool(flip < 0.5), label, noise, u, rng)

    def _latents(self, draws: list[Draw], mirrored: bool) -> Tensor:
        """The posterior's means, or samples of it where the shards hold its standard deviations."""
        indices = [draw.index for draw in draws]
        x0 = self.latents.read(indices, mirrored)
        if self.latents.has_posterior:
            noise = torch.stack([torch.randn(x0.shape[1:], generator=draw.rng) for draw in draws])
            x0 = x0 + self.latents.read_std(indices, mirrored) * noise
        return x0


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> Tensor:
    """The permutation of one pass through the data."""
    return torch.randperm(length, generator=generator(seed, "order", epoch))


class StepSampler(Sampler[list[int]]):
    """The positions of this process, one list per micro-batch: the process's share of each step, in order.

    Args:
        batch_images: images of a step, over all processes.
        micro_batch: images of one forward pass on one process.
    """

    def __init__(
        self,
        start_step: int,
        max_steps: int,
        batch_images: int,
        micro_batch: int,
        process: int,
        num_processes: int,
    ):
        self.steps, self.batch_images, self.micro_batch = (
            range(start_step, max_steps),
            batch_images,
            micro_batch,
        )
        self.local = batch_images // num_processes
        self.first = process * self.local

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.batch_images + self.first
            for start in range(first, first + self.local, self.micro_batch):
                yield list(range(start, start + self.micro_batch))

    def __len__(self) -> int:
        return len(self.steps) * (self.local // self.micro_batch)
