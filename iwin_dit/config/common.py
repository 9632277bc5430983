"""The sections of a recipe that every trainer has.

Imports no torch, so that ``--help`` and an error in a config answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from iwin_dit.config.bounds import (
    ABOVE_ZERO,
    BELOW_ONE,
    FREE,
    MAX_BLOCKS,
    ZERO_OR_MORE,
    Count,
    CountFromZero,
    Free,
    Images,
    Rule,
    at_most,
    each,
)

Size = Annotated[int | tuple[int, int], ABOVE_ZERO]  # a side, or height and width


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class SourceConfig:
    """Where images or clips come from, whatever is trained on them.

    Args:
        path: a folder of class folders, .tar or .parquet files, or hf:NAME, as for extract_latents.py; of
            clips, a folder of class folders with video files and folders of frames.
        labels: for a flat folder of images, a CSV with the columns file and label.
        follow_links: links in a folder of images, or clips, may lead out of it.
        split: of Hugging Face data; by default train.
        image_column: of Hugging Face data with several columns of images.
        label_column: of Hugging Face data with several columns of labels, or none of class labels.
        allow_odd_classes: take classes without images, a single class, or folders that are named as splits.
        background: of images: what shows through transparent pixels: white, black or R,G,B; null drops the
            transparency, as earlier versions did.
        prepare: make the data first where they are missing: ``digits`` are scikit-learn's handwritten digits,
            ``moving_digits`` clips of them. Of images, ``path`` ends with ``train``, which is made.
        frame_stride: of videos: take every n-th frame. Latents have extract_latents.py's --frame-stride.
    """

    path: Free[str]
    labels: str | None = None
    follow_links: Free[bool] = False
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    allow_odd_classes: Free[bool] = False
    background: str | None = "white"
    prepare: Literal["digits", "moving_digits"] | None = None
    frame_stride: Annotated[int, ABOVE_ZERO, at_most(1_000_000)] = 1


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser.

    Args:
        name: ``adamw``; or ``muon``, which orthogonalises the steps of the matrices inside blocks, and leaves
            everything else to AdamW. Its steps are as large as AdamW's.
        learning_rate: after the warm-up.
        warmup_steps: linear warm-up.
        schedule: after it, constant, or half a cosine or a line that end with ``train.max_steps``.
        min_learning_rate: at the end of the cosine or line; a constant rate has none.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: a step shrinks matrices and kernels by this times the learning rate.
        max_grad_norm: gradients are clipped to this norm; null for never.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, ABOVE_ZERO] = 2e-4
    warmup_steps: CountFromZero = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    min_learning_rate: Annotated[float, ZERO_OR_MORE] = 0.0
    betas: Annotated[tuple[float, float], BELOW_ONE] = (0.9, 0.95)
    eps: Annotated[float, ABOVE_ZERO] = 1e-8
    weight_decay: Annotated[float, ZERO_OR_MORE] = 0.0
    max_grad_norm: Annotated[float | None, ABOVE_ZERO] = 1.0


SOME = Rule(lambda numbers: len(numbers) > 0, "at least one, which sampling uses")
ONCE = Rule(lambda numbers: len({*numbers}) == len(numbers), "no number twice")
BELOW_FLAT = each(
    lambda std: 0 < std < 12**-0.5, f"numbers above 0 and below {12**-0.5:.3g}, a flat average's"
)


@dataclass(frozen=True)
class EmaConfig:
    """Averages of the weights. The first of ``decays`` is the one that sampling uses.

    Args:
        decays: exponential averages, one for each decay.
        power_stds: power-function averages of these relative standard deviations (Karras et al. 2024), from
            which any other can be reconstructed after training; 0.05 and 0.1 are the paper's.
        snapshot_every_steps: keep the power-function averages of these steps for that; 0 for none.
        on_cpu: hold the averages in the CPU's memory; each step then copies the weights there.
    """

    decays: Annotated[list[float], BELOW_ONE, SOME, ONCE] = field(default_factory=lambda: [0.9999])
    power_stds: Annotated[list[float], BELOW_FLAT, ONCE] = field(default_factory=list)
    snapshot_every_steps: Free[CountFromZero] = 0
    on_cpu: Free[bool] = False

    @property
    def averages(self) -> int:
        """How many."""
        return len(self.decays) + len(self.power_stds)


@dataclass(frozen=True)
class TrainConfig:
    """The run.

    Args:
        max_steps: optimiser steps; a finished run goes on when this grows, unless its learning rate comes
            down, which ends here.
        batch_images: images of a step, over all processes.
        micro_batch: images of one forward pass on one process; gradients accumulate. ``auto`` takes the
            largest that fits into memory. Default: all at once.
        precision: ``fp32``; ``tf32``, the same, but a GPU's tensor cores round the factors of matrix products
            to 10 bits (a CPU does not); or ``bf16`` (autocast; weights, EMA and optimiser stay in float32).
        sharding: ``fsdp2`` splits weights, gradients, optimiser and EMA over the processes.
        gradient_checkpointing: compute every n-th block twice to save memory; 1 for all, 0 for none, which is
            all that a classifier knows.
        compile: torch.compile for the blocks.
        attention_backend: kernel of scaled dot-product attention in training; ``auto`` lets PyTorch choose.
        kernels: Iwin's own ones, in Triton: ``auto`` takes them on a GPU where they are faster, ``torch``
            takes PyTorch's operations everywhere.
        num_workers: processes that read data.
        worker_timeout_seconds: a batch that takes longer to read is an error.
        on_nonfinite: a loss or gradient that is not finite stops the run, or the step is skipped.
        max_skipped_steps: so many skipped steps in a row, of ``on_nonfinite skip``, stop the run.
        spike_factor: a logged loss above so many times the recent median goes back to the last checkpoint,
            and on with other data; checkpoints then come with lines of the log. Default: never.
        log_every_steps: a line in log.jsonl.
        health_every_steps: root mean squares of each block's output and weights in these lines; 0 for none.
        sample_every_steps: a grid of samples; 0 for none.
        evaluate_every_steps: figures of the EMA in the log, and at the end; 0 for none.
        save_every_steps: a checkpoint.
        save_every_minutes: a checkpoint after so much time without one; 0 for none. The clock is that of the
            first process.
        compare_weights_every_steps: several processes compare their copies of the weights in these steps and
            before each checkpoint; 0 for never.
        keep_checkpoints: the newest so many stay.
        trackers: where the log and the samples go too; wandb stays offline unless WANDB_MODE says otherwise.
    """

    max_steps: Free[Count] = 400_000
    batch_images: Images = 256
    micro_batch: Annotated[int | Literal["auto"] | None, ABOVE_ZERO, at_most(10**7), FREE] = None
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    sharding: Free[Literal["none", "fsdp2"]] = "none"
    gradient_checkpointing: Annotated[int, ZERO_OR_MORE, at_most(MAX_BLOCKS), FREE] = 0
    compile: Free[bool] = False
    attention_backend: Free[Literal["auto", "flash", "efficient", "cudnn", "math"]] = "auto"
    kernels: Free[Literal["auto", "triton", "torch"]] = "auto"
    num_workers: Annotated[int, ZERO_OR_MORE, at_most(1_024), FREE] = 4
    worker_timeout_seconds: Annotated[int, ABOVE_ZERO, at_most(10**6), FREE] = 600
    on_nonfinite: Free[Literal["stop", "skip"]] = "stop"
    max_skipped_steps: Free[Count] = 10
    spike_factor: Annotated[float | None, each(lambda n: n > 1, "above 1, such as 3"), FREE] = None
    log_every_steps: Free[Count] = 100
    health_every_steps: Free[CountFromZero] = 0
    sample_every_steps: Free[CountFromZero] = 5_000
    evaluate_every_steps: Free[CountFromZero] = 0
    save_every_steps: Free[Count] = 5_000
    save_every_minutes: Annotated[float, ZERO_OR_MORE, FREE] = 0.0
    compare_weights_every_steps: Free[CountFromZero] = 1_000
    keep_checkpoints: Free[Count] = 2
    trackers: Free[list[Literal["tensorboard", "wandb"]]] = field(default_factory=list)


def lists(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {key: lists(item) for key, item in value.items()}
    return [lists(item) for item in value] if isinstance(value, (list, tuple)) else value
