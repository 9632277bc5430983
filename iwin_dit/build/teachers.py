"""Networks of images that teach a generator's tokens: where ``alignment.teacher`` becomes one.

Legend: B batch, Z channels of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2.functional import normalize

from iwin_dit.build.classifier_network import load_classifier
from iwin_dit.config.schema import Config
from iwin_dit.convert import load_official
from iwin_dit.data.codec import weights_sha256
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
        grid: tokens per axis.

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
        grid: tuple[int, ...],
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
        """uint8 images ``(B, 3, H, W)`` to features ``(B, *grid, Z)`` in float32, bilinear between places."""
        x = normalize(resize(images, self.image_size) / 255, self.mean, self.std)
        options = {"norm": True, "output_fmt": "NCHW", "intermediates_only": True, "stop_early": True}
        (features,) = self.model.forward_intermediates(x, indices=self.indices, **options)
        features = functional.interpolate(features.float(), self.grid, mode="bilinear", antialias=True)
        return features.movedim(1, -1)


def load_teacher(config: Config) -> ImageTeacher:
    """The network that ``alignment.teacher`` names, on the CPU.

    Raises:
        CheckpointError: where its weights are not to be had, or of another network.
        ConfigError: where timm does not know it.
    """
    options, grid = config.alignment, config.model.grid
    kind, _, source = (options.teacher or "").partition(":")
    found: Any
    if kind == "timm":
        model = _of_timm(source, options.teacher_weights, grid)
        facts = resolve_model_data_config(model)
        size, mean, std = facts["input_size"][1:], facts["mean"], facts["std"]
        if isinstance(model, VisionTransformer):
            size = model.patch_embed.img_size
    else:
        if kind == "iwin":
            found = load_classifier(source)
        else:
            found = efficientnet_lite0(
                None if options.teacher_weights is None else Path(options.teacher_weights)
            )
        model, size, mean, std = found.model, found.image_size, found.mean, found.std
    return ImageTeacher(model, (int(size[0]), int(size[1])), mean, std, options.teacher_block, grid)


def _of_timm(name: str, weights: str | None, grid: tuple[int, ...]) -> nn.Module:
    """A network of timm's; a vision transformer of the size whose patches are the grid, as REPA has it."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ConfigError(f"alignment.teacher timm:{name} is not one of timm's; such as {', '.join(near)}")
    options: dict[str, Any] = {}  # of its own classes: with others timm would not miss weights
    with torch.device("meta"):
        plain = timm.create_model(name)
    if isinstance(plain, VisionTransformer):
        patch = plain.patch_embed.patch_size
        options["img_size"] = (patch[0] * grid[0], patch[1] * grid[1])
    if weights is not None:
        options["pretrained_cfg_overlay"] = {"state_dict": dict(load_official(weights))}
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # of the network, of a file of another network, or that there is none
        where = "are not to be had" if weights is None else f"are not in {weights}"
        raise CheckpointError(
            f"the weights of timm's {name} {where}: {reason(error)}; give a file by alignment.teacher_weights"
        ) from None
