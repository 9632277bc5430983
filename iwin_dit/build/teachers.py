"""Networks of images that teach a generator's tokens: where ``alignment.teacher`` becomes one.

Legend: B batch, Z channels of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import EncoderOutput
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from iwin_dit.build.classifier_network import load_classifier
from iwin_dit.convert import load_official
from iwin_dit.data.codec import weights_sha256
from iwin_dit.diffusion.alignment import on_grid
from iwin_dit.evaluation.efficientnet import efficientnet_lite0
from iwin_dit.evaluation.extractors import resize
from iwin_dit.runtime.errors import CheckpointError, ConfigError, reason


class ImageTeacher(nn.Module):
    """The features of a frozen network, on the grid of a generator's tokens.

    width: Z; sha256: of its weights.

    Args:
        model: in timm's interface: its ``forward_intermediates`` returns maps of features.
        image_size: (H, W) that it takes; images of another size are resized.
        mean, std: of each colour, of values in [0, 1].
        block: which of its maps: that after so many blocks or stages. Default: the last.
        grid: tokens per axis. Default: those of its map.

    Raises:
        ConfigError: where it has no such map.
    """

    def __init__(
        self,
        model: Any,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        block: int | None,
        grid: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self.model, self.image_size, self.grid = model.eval().requires_grad_(False), image_size, grid
        self.mean, self.std = list(mean), list(std)
        self.indices = 1 if block is None else [block - 1]  # an index alone is of so many, from the last
        self.sha256 = weights_sha256(model)
        try:
            self.width = self(torch.zeros(1, 3, *image_size, dtype=torch.uint8)).shape[-1]
        except (AttributeError, AssertionError, IndexError, NotImplementedError) as error:
            raise ConfigError(
                f"alignment.teacher has no map of features after block {block or 'the last'} "
                f"({reason(error)}); set another alignment.teacher_block, or teacher"
            ) from None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in 0..255 to features ``(B, *grid, Z)`` in float32."""
        x = normalize(resize(images, self.image_size) / 255, self.mean, self.std)
        options = {"norm": True, "output_fmt": "NCHW", "intermediates_only": True, "stop_early": True}
        (features,) = self.model.forward_intermediates(x, indices=self.indices, **options)
        return on_grid(features, self.grid or features.shape[2:])


class FeatureEncoder(nn.Module):
    """A teacher in the place of an autoencoder: extraction writes its features as if they were latents."""

    spatial_compression_ratio, dtype, config = 1, torch.float32, FrozenDict()

    def __init__(self, teacher: ImageTeacher):
        super().__init__()
        self.teacher = teacher

    @property
    def device(self) -> torch.device:
        """Where it computes, as of diffusers' models."""
        return next(self.parameters()).device

    def encode(self, pixels: Tensor) -> EncoderOutput:
        """Pixels in [-1, 1], ``(B, 3, H, W)``, to maps ``(B, Z, h, w)``."""
        images = ((pixels + 1) * 127.5).round()
        return EncoderOutput(self.teacher(images).movedim(-1, 1))


def load_teacher(
    name: str,
    weights: str | None = None,
    block: int | None = None,
    grid: tuple[int, ...] | None = None,
    size: tuple[int, int] | None = None,
) -> ImageTeacher:
    """The network that ``alignment.teacher`` names, on the CPU.

    Args:
        weights, grid, block: as :class:`ImageTeacher`; the weights are a file.
        size: of the images that a vision transformer sees. Default: such that its patches are the grid, as
            REPA has it.

    Raises:
        CheckpointError: where its weights are not to be had, or of another network.
        ConfigError: where there is no such network.
    """
    kind, _, source = name.partition(":")
    found: Any
    if kind == "timm":
        model = _of_timm(source, weights, grid, size)
        facts = resolve_model_data_config(model)
        taken = (
            model.patch_embed.img_size if isinstance(model, VisionTransformer) else facts["input_size"][1:]
        )
        mean, std = facts["mean"], facts["std"]
    elif kind in ("iwin", "efficientnet-lite0"):
        file = None if weights is None else Path(weights)
        found = load_classifier(source) if kind == "iwin" else efficientnet_lite0(file)
        model, taken, mean, std = found.model, found.image_size, found.mean, found.std
    else:
        raise ConfigError(f"{name} is no network of images: give iwin:RUN, timm:NAME or efficientnet-lite0")
    return ImageTeacher(model, (int(taken[0]), int(taken[1])), mean, std, block, grid)


def _of_timm(
    name: str, weights: str | None, grid: tuple[int, ...] | None, size: tuple[int, int] | None
) -> nn.Module:
    """A network of timm's; arguments as :func:`load_teacher`."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ConfigError(f"the teacher timm:{name} is not one of timm's; such as {', '.join(near)}")
    options: dict[str, Any] = {}  # of its own classes: with others timm would not miss weights
    with torch.device("meta"):
        plain = timm.create_model(name)
    if isinstance(plain, VisionTransformer):
        patch = plain.patch_embed.patch_size
        options["img_size"] = size if grid is None else (patch[0] * grid[0], patch[1] * grid[1])
    if weights is not None:
        options["pretrained_cfg_overlay"] = {"state_dict": dict(load_official(weights))}
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # of the network, of a file of another network, or that there is none
        where = "are not to be had" if weights is None else f"are not in {weights}"
        raise CheckpointError(
            f"the weights of timm's {name} {where}: {reason(error)}; give a file of them"
        ) from None
