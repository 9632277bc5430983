"""The largest of every number of a recipe, and the words that another library reads.

What is above is a slip of the keyboard: it would not return, exhaust the machine, or end deep in a library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from iwin_dit.runtime.errors import ConfigError

MAX_NUMBER = 1e30  # of any number; more is infinite in float32 soon
MAX_TOKENS = 2**24
MAX_BLOCKS = 1_000
MAX_OPTION = 1_000_000
AT_MOST = {  # by the name of the key, in whatever section
    "depth": 128,
    "width": 65_536,
    "heads": 65_536,
    "patch_size": 1_024,
    "sample_size": 65_536,
    "sample_frames": 65_536,
    "in_channels": 65_536,
    "num_classes": 10_000_000,
    "mlp_ratio": 64,
    "label_embedding_std": 1e3,
    "window_size": 65_536,
    "kernel_size": 1_023,
    "frame_stride": 1_000_000,
    "max_bad_images": 10**9,
    "frames": 4_096,
    "views": 1_000,
    "image_size": 8_192,
    "logit_std": 1e3,
    "cosine_weight": 1e6,
    "warmup_steps": 10**9,
    "snapshot_every_steps": 10**9,
    "max_steps": 10**9,
    "batch_images": 10**7,
    "micro_batch": 10**7,
    "gradient_checkpointing": MAX_BLOCKS,
    "num_workers": 1_024,
    "worker_timeout_seconds": 10**6,
    "max_skipped_steps": 10**9,
    "keep_checkpoints": 10**9,
    "log_every_steps": 10**9,
    "health_every_steps": 10**9,
    "sample_every_steps": 10**9,
    "evaluate_every_steps": 10**9,
    "save_every_steps": 10**9,
    "num_inference_steps": 100_000,
    "guidance_scale": 1e6,
    "guidance_channels": 65_536,
    "num_per_class": 1_000,
    "num_images": 10**9,
    "color_jitter": 10,
    "mixup": 1e6,
    "cutmix": 1e6,
    "layer_decay": 1,
    "backbone_lr_scale": 1e6,
    "seed": 2**63 - 1,
}


def check_bounds(section: Any, prefix: str = "") -> None:
    """Every number of a recipe is at most what the table says.

    Raises:
        ConfigError: naming the key.
    """
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            check_bounds(value, f"{prefix}{f.name}.")
            continue
        most = AT_MOST.get(f.name, MAX_NUMBER)
        if any(abs(number) > most for number in numbers(value)):
            raise ConfigError(f"{prefix}{f.name} is {value}, expected at most {most:,}")


def numbers(value: Any) -> Iterator[int | float]:
    """All numbers in a value, at any depth."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def check_options(options: dict[str, Any], key: str) -> None:
    """Arguments of a constructor of timm's that make it load nothing, and no more blocks than there are.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in options.items():
        if name in ("checkpoint_path", "cache_dir") or name.startswith("pretrained"):
            raise ConfigError(
                f"{key} has {name}, which makes timm load a file that this recipe does not vouch for; remove "
                "it, and give weights by init_from"
            )
        if any(abs(number) > MAX_OPTION for number in numbers(value)):
            raise ConfigError(f"{key} has {name} {value}, expected numbers of at most {MAX_OPTION:,}")
        if name in ("depth", "depths", "layers", "num_layers") and sum(numbers(value)) > MAX_BLOCKS:
            raise ConfigError(f"{key} has {name} {value}, expected at most {MAX_BLOCKS:,} blocks")


_RAND_AUGMENT = re.compile(
    r"rand(-(m([0-9]|10)|n[1-9]|p(0(\.[0-9]+)?|1(\.0+)?)|mstd[0-9]+(\.[0-9]+)?|mmax[1-9]|inc[01]|t(weights|3aw?)))*"
)


def check_rand_augment(words: str) -> None:
    """timm's words for RandAugment, or ``none``.

    Raises:
        ConfigError: where timm would not know them, or Pillow would refuse what they ask for.
    """
    if words == "none":
        return
    if words.startswith("rand") and "mmax" not in words:
        raise ConfigError(
            f"augment.rand_augment {words} may reach magnitude 10, where Pillow refuses to posterize; "
            "add -mmax9"
        )
    if not _RAND_AUGMENT.fullmatch(words):
        raise ConfigError(
            f"augment.rand_augment is {words}, expected none or timm's words for RandAugment, such as "
            "rand-m9-mstd0.5-inc1-mmax9 (m magnitude to 10, n 1 to 9 operations, p probability, mstd, mmax 1 "
            "to 9, inc 0 or 1, tweights)"
        )
