"""Which kernels attention takes: those of PyTorch by name, and Iwin's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.nn.attention import SDPBackend, sdpa_kernel

from iwin_dit.config.classifier import Recipe
from iwin_dit.layers import kernels
from iwin_dit.runtime.errors import ConfigError

ATTENTION_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


# decorates what draws while a run trains, in float32, and so may not have the kernel that training takes
any_attention = sdpa_kernel(list(ATTENTION_BACKENDS.values()))


NO_KERNEL = ("No available kernel", "No viable backend")  # in the words of CUDA and of a CPU


@contextlib.contextmanager
def attention_backend(config: Recipe) -> Iterator[None]:
    """The context in which attention takes the kernels of the config, of PyTorch and of Iwin.

    Raises:
        ConfigError: in the first forward pass, where PyTorch has none of that name for this model here: that
            depends on device, precision, masks and the width of heads, and PyTorch alone knows how.
    """
    kernels.select(config.train.kernels)
    name = config.train.attention_backend
    try:
        with contextlib.nullcontext() if name == "auto" else sdpa_kernel(ATTENTION_BACKENDS[name]):
            yield
    except RuntimeError as error:
        if name == "auto" or not any(words in str(error) for words in NO_KERNEL):
            raise
        raise ConfigError(
            f"train.attention_backend {name} has no kernel for this model's attention here, in "
            f"{config.train.precision}: on a GPU flash and cudnn need bf16, and flash takes no masks (swin, "
            "swin_v2, neighborhood, padded windows); a CPU has flash and math; set auto"
        ) from None
