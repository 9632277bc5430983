"""Metrics that compare samples one by one: the Inception Score, KID, precision and recall.

Features stay in the files that they were written to and are read in blocks, so that the memory does not grow
with the number of samples.

Legend: N generated, M real samples; D features; C classes; k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd
from tqdm import tqdm

from iwin_dit.runtime.progress import progress

BLOCK = 2048  # samples in memory at once: 32 MiB of 2,048 features in float64
SEED = 2020  # torch-fidelity's, of the order of samples
SCORE_PARTS = 10
KID_SUBSETS, KID_SUBSET = 100, 1000
NEIGHBOURS = 3
CPU = torch.device("cpu")
SAME = 1e-10  # of squared norms: closer features are the same ones, but for the rounding of float32


class Samples:
    """Features ``(N, D)`` of one layer, in parts that lie in files or in memory.

    Args:
        layer: their name in the files.
    """

    def __init__(self, layer: str):
        self.layer = layer
        self._parts: list[Path | Tensor] = []
        self._starts = [0]

    def add(self, part: Path | Tensor, count: int) -> None:
        """Adds ``(count, D)``: a tensor, or a file that holds it."""
        self._parts.append(part)
        self._starts.append(self._starts[-1] + count)

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, indices: NDArray[np.int64]) -> Tensor:
        """Features ``(n, D)`` of these samples, in this order, float32."""
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        parts = [
            self._part(number)[torch.from_numpy(indices[numbers == number] - self._starts[number])].float()
            for number in np.unique(numbers)
        ]
        order = np.argsort(np.argsort(numbers, kind="stable"))  # back from part by part
        return torch.cat(parts)[torch.from_numpy(order)]

    def _part(self, number: int) -> Tensor:
        part = self._parts[number]
        if isinstance(part, Tensor):
            return part
        with safe_open(part, "pt") as file:
            return file.get_tensor(self.layer)

    def blocks(self) -> Iterator[slice]:
        """Ranges of :data:`BLOCK` samples that cover all."""
        for start in range(0, len(self), BLOCK):
            yield slice(start, min(start + BLOCK, len(self)))

    def block(self, rows: slice, device: torch.device) -> Tensor:
        """Features of a range, float64, on the device."""
        return self.rows(np.arange(rows.start, rows.stop)).double().to(device)


def inception_score(logits: Samples) -> tuple[float, float]:
    """``exp(mean KL(p(y|x) || p(y)))`` of ten parts in random order (Salimans et al. 2016): mean, deviation.

    Args:
        logits: ``(N, C)``.
    """
    count = len(logits)
    order = np.random.RandomState(SEED).permutation(count)
    scores = []
    for i in range(SCORE_PARTS):
        part = order[i * count // SCORE_PARTS : (i + 1) * count // SCORE_PARTS]
        negative_entropy, total = 0.0, torch.zeros(())
        for start in range(0, len(part), BLOCK):
            log_p = logits.rows(part[start : start + BLOCK]).double().log_softmax(1)  # (n, C)
            negative_entropy += (log_p.exp() * log_p).sum().item()
            total = total + log_p.exp().sum(0)  # (C,)
        marginal = total / len(part)
        scores.append(math.exp(negative_entropy / len(part) - torch.xlogy(marginal, marginal).sum().item()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(generated: Samples, real: Samples) -> tuple[float, float]:
    """KID (Binkowski et al. 2018) of 100 random subsets of up to 1,000 samples: mean and deviation.

    The subsets and the kernel are torch-fidelity's.
    """
    size = min(KID_SUBSET, len(generated), len(real))
    rng = np.random.RandomState(SEED)
    distances = []
    for _ in progress(range(KID_SUBSETS), desc="kid", unit="subset"):
        a, b = (s.rows(rng.choice(len(s), size, replace=False)).numpy() for s in (generated, real))
        distances.append(kernel_mmd(a, b))
    return float(np.mean(distances)), float(np.std(distances))


def precision_and_recall(
    generated: Samples, real: Samples, device: torch.device = CPU
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2), with three neighbours.

    A sample is inside a set if it is no further from one of the set's samples than that sample's third
    nearest neighbour. Precision is the share of generated samples inside the real ones, recall the share of
    real samples inside the generated ones. In float64, where hardly any comparison depends on rounding.
    Memory: two blocks of features and three of distances, about 200 MiB with 2,048 features.
    """
    if device.type == "mps":  # which has no float64
        device = CPU
    pairs = [len(list(samples.blocks())) for samples in (generated, real)]
    total = pairs[0] * pairs[1] + sum(n * (n + 1) // 2 for n in pairs)
    inside_real = torch.zeros(len(generated), dtype=torch.bool, device=device)
    inside_generated = torch.zeros(len(real), dtype=torch.bool, device=device)
    with progress(total=total, desc="precision and recall", unit="block") as bar:
        reach = [_squared_reach(samples, device, bar) for samples in (generated, real)]
        for rows in generated.blocks():
            a = generated.block(rows, device)
            for columns in real.blocks():
                distances = _squared_distances(a, real.block(columns, device))
                inside_real[rows] |= (distances <= reach[1][columns]).any(1)
                inside_generated[columns] |= (distances <= reach[0][rows, None]).any(0)
                bar.update()
    return inside_real.double().mean().item(), inside_generated.double().mean().item()


def _squared_reach(samples: Samples, device: torch.device, bar: tqdm) -> Tensor:
    """Squared distance of each sample to its third nearest neighbour, ``(N,)``.

    Of two blocks one product serves both.
    """
    # the nearest of all is the sample itself
    nearest = torch.full((len(samples), NEIGHBOURS + 1), math.inf, dtype=torch.float64, device=device)

    def keep(rows: slice, distances: Tensor) -> None:
        both = torch.cat([nearest[rows], distances], 1)
        nearest[rows] = both.topk(NEIGHBOURS + 1, largest=False).values

    for rows in samples.blocks():
        a = samples.block(rows, device)
        for columns in samples.blocks():
            if columns.start < rows.start:
                continue
            distances = _squared_distances(a, a if columns == rows else samples.block(columns, device))
            keep(rows, distances)
            if columns != rows:
                keep(columns, distances.T)
            bar.update()
    return nearest.max(1).values


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """``|a_i - b_j|^2``, ``(n, m)``; 0 for features that are the same but for their rounding."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = torch.addmm(norms, a, b.T, alpha=-2)
    return squared.where(squared > SAME * norms, 0.0)
