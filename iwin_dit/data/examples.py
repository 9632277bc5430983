"""What training sees at each position of its stream, as a pure function of (seed, position).

Position ``p`` of an endless stream is image ``order[p mod N]`` of pass ``p div N``; step s reads the
positions ``[s B, (s + 1) B)`` of the global batch B. Nothing depends on the number of processes, on the split
of the batch or on when the run was interrupted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from iwin_dit.runtime.seeds import generator

T = TypeVar("T")


class Drawn(Protocol):
    """Latents, or images that the step encodes, with labels."""

    latent_shape: tuple[int, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the data the same to a run that is resumed."""

    def __len__(self) -> int: ...

    def draw(
        self, indices: Sequence[int], mirrored: Sequence[bool], rngs: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[int]]:
        """These images or their mirror images, one generator for each, and their labels."""


class Data(Drawn, Protocol):
    """What can be trained on, and drawn again afterwards."""

    class_names: list[str]
    mean: list[float]  # per latent channel
    std: list[float]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """A latent or an image, and its label."""

    @property
    def vae_path(self) -> str:
        """The autoencoder: a preset, a folder, a file or a hub id."""


class Example(NamedTuple):
    """One image of a training step, or a batch of them.

    x0: latent (C, [T,] h, w), or pixels (3, [T,] H, W) uint8; label: class, or the null label where it was
        dropped; noise: as the latent; u: uniform in [0, 1).
    """

    x0: Tensor
    label: Tensor
    noise: Tensor
    u: Tensor


class Place(NamedTuple):
    """What of a position is drawn before its noise, and the generator that goes on to draw that."""

    image: int
    mirrored: bool
    dropped: bool
    u: float
    rng: torch.Generator


class TrainingExamples(Dataset):
    """``examples[position] -> Example``.

    Args:
        data: the images.
        seed: of order, flips, label drops, noise and times.
        random_flip: mirror half of the images.
        label_dropout: share of labels replaced by ``null_label``.
    """

    def __init__(
        self, data: Drawn, seed: int, random_flip: bool, label_dropout: float, null_label: int | None
    ):
        self.data, self.seed, self.random_flip = data, seed, random_flip
        if label_dropout > 0 and null_label is None:
            raise ValueError(f"label_dropout is {label_dropout}, but there is no null label")
        self.label_dropout = label_dropout
        self.null_label = -1 if null_label is None else null_label  # never taken without dropout

    def __getitem__(self, position: int) -> Example:
        return Example(*(part[0] for part in self.__getitems__([position])))

    def __getitems__(self, positions: Sequence[int]) -> Example:
        """A batch at once, as a DataLoader asks for it: the shards are read together."""
        noise = torch.empty(len(positions), *self.data.latent_shape)
        places = [self.place(position) for position in positions]
        for place, out in zip(places, noise, strict=True):
            torch.randn(out.shape, generator=place.rng, out=out)
        indices, mirrored, dropped, times, rngs = zip(*places, strict=True)
        x0, labels = self.data.draw(indices, mirrored, rngs)
        labels = [self.null_label if drop else label for drop, label in zip(dropped, labels, strict=True)]
        return Example(x0, torch.tensor(labels), noise, torch.tensor(times))

    def place(self, position: int) -> Place:
        """Image, flip, label drop and time of a position."""
        epoch, offset = divmod(position, len(self.data))
        rng = generator(self.seed, "example", position)
        u, flip, drop = torch.rand(3, generator=rng)
        index = int(epoch_order(self.seed, epoch, len(self.data))[offset])
        mirrored, dropped = self.random_flip and bool(flip < 0.5), bool(drop < self.label_dropout)
        return Place(index, mirrored, dropped, float(u), rng)


class TaughtExamples(Dataset):
    """``examples[position] -> (*Example, features)``: beside each what a teacher has made of its image.

    Args:
        features: maps ``(Z, h, w)`` of the same images, and of mirrored ones: a set like one of latents.
    """

    def __init__(self, examples: TrainingExamples, features: Any):
        self.examples, self.features = examples, features

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([position]))

    def __getitems__(self, positions: Sequence[int]) -> tuple[Tensor, ...]:
        """A batch of one step."""
        places = [self.examples.place(position) for position in positions]
        found = torch.empty(len(positions), *self.features.latent_shape)
        for flip in (False, True):
            chosen = [b for b, place in enumerate(places) if place.mirrored == flip]
            if chosen:
                found[chosen] = self.features.read_raw([places[b].image for b in chosen], flip)
        return *self.examples.__getitems__(positions), found


class ImagesAsClips:
    """Latents of images, as data of clips of one frame."""

    def __init__(self, images: Data):
        self.images = images
        self.identity = {"mixed_in": images.identity}
        channels, *_, height, width = images.latent_shape
        self.latent_shape: tuple[int, ...] = (channels, 1, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def draw(
        self, indices: Sequence[int], mirrored: Sequence[bool], rngs: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[int]]:
        x0, labels = self.images.draw(indices, mirrored, rngs)
        return x0.view(-1, *self.latent_shape), labels


class MixedExamples(Dataset):
    """Steps of clips and steps of images, each by itself: ``examples[position] -> Example``.

    Args:
        clips, images: of the same kind, but for the number of frames.
        seed: with the number of the step, tells which of the two it is.
        image_share: share of the steps that are of images.
        batch_images: examples of a step.
    """

    def __init__(
        self,
        clips: TrainingExamples,
        images: TrainingExamples,
        seed: int,
        image_share: float,
        batch_images: int,
    ):
        self.clips, self.images, self.seed = clips, images, seed
        self.image_share, self.batch_images = image_share, batch_images

    def __getitem__(self, position: int) -> Example:
        return Example(*(part[0] for part in self.__getitems__([position])))

    def __getitems__(self, positions: Sequence[int]) -> Example:
        """A batch of one step."""
        drawn = torch.rand((), generator=generator(self.seed, "mixed", positions[0] // self.batch_images))
        return (self.images if drawn < self.image_share else self.clips).__getitems__(positions)


def whole(batch: T) -> T:
    """How a DataLoader joins what ``__getitems__`` returns: it is a batch already."""
    return batch


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> Tensor:
    """The permutation of one pass through the data."""
    return torch.randperm(length, generator=generator(seed, "order", epoch))


class StepSampler(Sampler[list[int]]):
    """The positions of this process, one list per micro-batch: its share of each step, in order, without end.

    Args:
        batch_images: images of a step, over all processes.
        micro_batch: images of one forward pass on one process.
    """

    def __init__(
        self, start_step: int, batch_images: int, micro_batch: int, process: int, num_processes: int
    ):
        self.start_step, self.batch_images, self.micro_batch = start_step, batch_images, micro_batch
        self.local = batch_images // num_processes
        self.first = process * self.local

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.start_step):
            first = step * self.batch_images + self.first
            for start in range(first, first + self.local, self.micro_batch):
                yield list(range(start, start + self.micro_batch))
