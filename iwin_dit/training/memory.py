"""How many images fit into memory, found by trying."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.utils import find_executable_batch_size

from iwin_dit.runtime.errors import ConfigError


def largest_that_fits(attempt: Callable[[int], None], most: int) -> int:
    """The largest divisor of ``most`` for which ``attempt(images)`` does not run out of memory.

    Raises:
        ConfigError: where not even one image fits.
    """
    divisors = [images for images in range(most, 0, -1) if most % images == 0]
    tried = iter([*divisors[1:], 0])

    def run(images: int) -> int:
        attempt(images)
        return images

    try:
        return find_executable_batch_size(run, most, reduce_batch_size_fn=lambda: next(tried))()
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        raise ConfigError(
            "not even one image fits into memory; set train.gradient_checkpointing 1, ema.on_cpu true or "
            "train.sharding fsdp2, or take a smaller model"
        ) from None
