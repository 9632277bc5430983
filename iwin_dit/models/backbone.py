"""The hierarchical Iwin Transformer (arXiv 2507.18405, section 3), a timm model for images, and for clips.

Legend: B batch, C channels of the image, T frames of the grid, D width of a stage; the grid is the image's
sides over the patch size, halved from stage to stage. Tokens have their channels last: ``(B, *grid, D)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, to_ntuple
from timm.models import register_notrace_function
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys as Incompatible

from iwin_dit.layers.blindness import AXES, BlindSpots, blind_spots
from iwin_dit.layers.iwin import IwinMixer
from iwin_dit.layers.specs import BlockSpec, MixerSpec, per_axis
from iwin_dit.models.official_names import checkpoint_filter_fn, is_official, serves_later_stages, unwrap
from iwin_dit.models.stages import Downsample, IwinBlock, IwinStage, PaddedIwinMixer, PatchEmbedding

Convolution = bool | Literal["auto"]


class IwinTransformer(nn.Module):
    """Stages of Iwin blocks on ever coarser grids (arXiv 2507.18405), in timm's conventions.

    The defaults are Iwin-T for ImageNet-1K at 224 pixels. Any image size is valid input; ``img_size`` is what
    the model is made for, and decides which stages have a convolution.

    Args:
        img_size: side of the image, or (height, width).
        patch_size: pixels per side of a token.
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: pooling of the last grid, ``avg`` or another of timm's; an empty string leaves it out.
        embed_dim: width of the first stage; every further one doubles it.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: tokens per side of a window: a number, ``auto`` (see
            :class:`~iwin_dit.layers.specs.MixerSpec`), or one of them per stage. (rows, columns) is valid
            for a stage, and two numbers are such a pair for all stages.
        mlp_ratio: hidden width of the MLP over the width of its stage.
        convolution: whether blocks have the depthwise convolution, or one such value per stage; ``auto``
            leaves it out where one window covers the grid of an image of ``img_size``.
        mask_padding: hide padded keys where the window does not divide the grid. Official weights: False.
        clip_window: a window is never larger than the grid. Without, zeros fill up a smaller grid, which
            matters where padded keys are not hidden. The official dense backbones: False.
        patch_norm: layer norm after the patch embedding.
        pos_embed: a learned position embedding, resized for other images. Published models have none.
        feature_norm: a layer norm for each map of ``forward_intermediates``, as in official dense backbones.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        device, dtype: of the parameters.

    Raises:
        ValueError: where numbers of stages differ, heads do not divide a width, or a window cannot be.
    """

    rank = 2
    output_fmt = "NHWC"
    _model_args: dict[str, Any]  # what an imported model is built from

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | str | Sequence[Any] = 7,
        mlp_ratio: float = 4.0,
        convolution: Convolution | Sequence[Convolution] = "auto",
        mask_padding: bool = True,
        clip_window: bool = True,
        patch_norm: bool = True,
        pos_embed: bool = False,
        feature_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        stages = len(depths)
        window_sizes = _window_per_stage(window_size, stages)
        convolutions = [convolution] * stages if isinstance(convolution, bool | str) else list(convolution)
        of_stages = {"num_heads": num_heads, "window_size": window_sizes, "convolution": convolutions}
        for name, values in of_stages.items():
            if len(values) != stages:
                raise ValueError(f"{name} {values} has {len(values)} stages, depths {depths} has {stages}")
        sides, patch = map(to_ntuple(self.rank), (img_size, patch_size))
        grid = tuple(-(-side // p) for side, p in zip(sides, patch, strict=True))
        widths = [embed_dim * 2**i for i in range(stages)]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))

        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.embed_dim, self.drop_rate = embed_dim, drop_rate
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            dict(num_chs=width, reduction=max(patch) * 2**i, module=f"layers.{i}")
            for i, width in enumerate(widths)
        ]
        with torch.device(device) if device is not None else nullcontext():
            self.patch_embed = PatchEmbedding(in_chans, embed_dim, patch, patch_norm)
            axes = grid if self.rank == 2 else (grid[0], 1, 1)  # it is the same along an axis of 1
            self.pos_embed = nn.Parameter(torch.empty(1, *axes, embed_dim)) if pos_embed else None
            make_mixer = IwinMixer if clip_window or mask_padding else PaddedIwinMixer
            layers, spots = [], []
            for i, width in enumerate(widths):
                window = window_sizes[i] if self.rank == 2 else ["all", *per_axis(window_sizes[i], 2)]
                kernel: int | list[int] = 3 if self.rank == 2 else [1, 3, 3]  # each frame by itself
                spec = BlockSpec(
                    width=width,
                    heads=num_heads[i],
                    mlp_ratio=mlp_ratio,
                    mixer=MixerSpec("iwin", window, kernel, convolutions[i], mask_padding),
                    norm="layer_norm",
                    mlp="gelu",
                )
                downsample = Downsample(widths[i - 1], width) if i > 0 else nn.Identity()
                if i > 0:
                    grid = (*grid[:-2], *(-(-side // 2) for side in grid[-2:]))
                blocks = [IwinBlock(spec, make_mixer(spec, grid), rate) for rate in rates[i].tolist()]
                layers.append(IwinStage(downsample, blocks))
                spots += [blind_spots(spec.mixer, grid, "none") for _ in blocks]
            self.layers = nn.Sequential(*layers)
            self.norm: nn.Module = nn.LayerNorm(self.num_features)
            self.feature_norms = nn.ModuleList(
                nn.LayerNorm(width) if feature_norm else nn.Identity() for width in widths
            )
            self.head = self._make_head()
            self.init_weights()
        self._warn_where_blind(spots)
        if dtype is not None:
            self.to(dtype)

    def _warn_where_blind(self, blocks: list[BlindSpots]) -> None:
        """Warns of axes along which no block, no downsampling and no embedding tells tokens apart."""
        downsampled = AXES[2] if len(self.layers) > 1 else ()
        embedded = () if self.pos_embed is None else AXES[self.rank] if self.rank == 2 else ("frames",)
        left = [axis for axis in AXES[self.rank] if axis not in downsampled]
        spots = BlindSpots(
            [axis for axis in left if all(axis in block.apart for block in blocks)],
            [axis for axis in left if axis not in embedded and all(axis in b.unordered for b in blocks)],
        )
        if spots and blocks:
            warnings.warn(f"this model is blind: {spots}; give it a convolution or pos_embed", stacklevel=3)

    def init_weights(self) -> None:
        """Truncated normal of deviation 0.02 for projections and positions, zeros for their biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _make_head(self) -> ClassifierHead:
        head = ClassifierHead(
            self.num_features, self.num_classes, self.global_pool, self.drop_rate, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.num_features * head.global_pool.feat_mult()
        return head

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from the first layer to the last, for layer-wise learning rates."""
        blocks = [
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:norm|feature_norms)\.", (99999,)),
        ]
        return dict(stem=r"^(?:patch_embed|pos_embed)", blocks=r"^layers\.(\d+)" if coarse else blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block twice instead of keeping what its gradient needs."""
        for module in self.modules():
            if isinstance(module, IwinStage):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; the pooling stays as it is unless one is given."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = next(self.patch_embed.parameters())
        self.head = self._make_head().to(device=like.device, dtype=like.dtype).train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Keeps what :meth:`forward_intermediates` needs for these indices, and returns them from zero up."""
        kept, last = feature_take_indices(len(self.layers), indices)
        prune_end = last < len(self.layers) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        self.layers = self.layers[: last + 1]
        self.feature_norms = nn.ModuleList(
            norm if i in kept else nn.Identity() for i, norm in enumerate(self.feature_norms[: last + 1])
        )
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return kept

    def forward_stem(self, x: Tensor) -> Tensor:
        """``(B, C, *size) -> (B, *grid, D)``, positions included."""
        x = self.patch_embed(x)
        return x if self.pos_embed is None else x + resize_positions(self.pos_embed, x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the stages, before they are halved for the next one.

        Args:
            x: ``(B, C, *size)``.
            indices: the last so many stages, these stages, or all.
            norm: apply the last norm to the last map.
            stop_early: leave out stages after the last of the indices.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: return the maps alone.

        Returns:
            the result of :meth:`forward_features` and the maps, ``(B, D, *grid)`` or ``(B, *grid, D)``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        kept, last = feature_take_indices(len(self.layers), indices)
        final = len(self.layers) - 1
        x, maps = self.forward_stem(x), []
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = stage(x)
            if i in kept:
                kept_map = self.norm(x) if norm and i == final else self.feature_norms[i](x)
                maps.append(kept_map if output_fmt == "NHWC" else kept_map.movedim(-1, 1).contiguous())
        if intermediates_only:
            return maps
        return (self.norm(x) if i == final else x), maps

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, C, *size) -> (B, *grid, D)`` of the last stage, after its norm."""
        return self.norm(self.layers(self.forward_stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``(B, *grid, D)`` to logits ``(B, num_classes)``, or to what the classifier reads, ``(B, D)``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Incompatible:
        """As ``nn.Module``, after ``checkpoint_filter_fn``: the authors' checkpoints load too."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict=strict, assign=assign)


class IwinTransformer3D(IwinTransformer):
    """The Iwin Transformer on clips ``(B, C, T, H, W)``, of any size: windows span all frames.

    It gives features ``(B, D, T, H, W)`` after the last norm, or logits where it has pooling and a
    classifier. A learned embedding tells the frames apart.

    Args:
        img_size: (frames, height, width) of the clips that the model is made for.
        patch_size: frames, rows and columns of a token.
        num_classes: classes; 0 leaves the classifier out, and needs no pooling.
        global_pool: pooling over space and time, such as ``avg``.
        pos_embed: whether there is an embedding per frame.
        options: further arguments of :class:`IwinTransformer`.
    """

    rank = 3

    def __init__(
        self,
        img_size: Sequence[int] = (32, 224, 224),
        patch_size: Sequence[int] = (2, 4, 4),
        num_classes: int = 0,
        global_pool: str = "",
        pos_embed: bool = True,
        **options: Any,
    ):
        options |= dict(num_classes=num_classes, global_pool=global_pool, pos_embed=pos_embed)
        super().__init__(img_size, patch_size, **options)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``(B, T, H, W, D)`` to logits, or to features ``(B, D, T, H, W)`` where there is no pooling."""
        if not self.global_pool:
            return x.movedim(-1, 1)
        return super().forward_head(x.flatten(1, 2), pre_logits)


class IwinFeatures(FeatureGetterNet):
    """timm's ``features_only`` model, which loads the authors' checkpoints too."""

    _model_args: dict[str, Any]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Incompatible:
        """As ``nn.Module``; of an official checkpoint, what was pruned is left out."""
        weights = unwrap(state_dict)
        if is_official(weights):
            assert isinstance(self.model, IwinTransformer)
            last, ours = len(self.model.layers) - 1, self.model.state_dict()
            weights = {name: weights[name] for name in weights if not serves_later_stages(name, last)}
            weights = checkpoint_filter_fn(weights, self.model)
            pruned = [name for name in weights if name.startswith(("norm.", "head.")) and name not in ours]
            weights = {f"model.{name}": weights[name] for name in weights if name not in pruned}
        return super().load_state_dict(weights, strict=strict, assign=assign)


def resize_positions(positions: Tensor, x: Tensor) -> Tensor:
    """A position embedding for the grid of x ``(B, *grid, D)``, interpolated; axes of 1 stay."""
    have = positions.shape[1:-1]
    grid = [1 if side == 1 else want for side, want in zip(have, x.shape[1:-1], strict=True)]
    if list(have) == grid:
        return positions
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    return F.interpolate(positions.movedim(-1, 1), size=grid, mode=mode).movedim(1, -1)


register_notrace_function(resize_positions)


def _window_per_stage(window_size: int | str | Sequence[Any], stages: int) -> list[Any]:
    if isinstance(window_size, int | str):
        return [window_size] * stages
    values = list(window_size)
    if len(values) == 2 and all(isinstance(side, int) for side in values):
        return [values] * stages
    return [
        list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for value in values
    ]
