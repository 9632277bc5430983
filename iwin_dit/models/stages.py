"""What the hierarchical Iwin Transformer is made of: patches, downsampling, blocks and stages.

Legend: B batch, C channels of the image, D width of a stage; tokens ``(B, *grid, D)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import checkpoint_seq, register_notrace_module
from torch import Tensor, nn

from iwin_dit.layers import windows
from iwin_dit.layers.iwin import InterleavedAttention, IwinMixer
from iwin_dit.layers.specs import BlockSpec, per_axis

CONVOLUTIONS: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}


class PatchEmbedding(nn.Module):
    """Each patch becomes one token; zeros fill up the last ones: ``(B, C, *size) -> (B, *grid, D)``."""

    def __init__(self, in_chans: int, width: int, patch_size: tuple[int, ...], norm: bool):
        super().__init__()
        self.patch_size = patch_size
        self.proj = CONVOLUTIONS[len(patch_size)](in_chans, width, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        missing = []
        for axis in range(1, 1 + len(self.patch_size)):  # F.pad takes the last axis first
            patch = self.patch_size[-axis]
            missing += [0, (patch - x.shape[-axis] % patch) % patch]
        return self.norm(self.proj(F.pad(x, missing)).movedim(1, -1))


class Downsample(nn.Module):
    """Half the rows and columns, other channels: ``(B, [T,] H, W, D) -> (B, [T,] ceil(H/2), ceil(W/2), D')``.

    Layer norm, then a 3 x 3 convolution of stride 2 over the grid with a further row and column of zeros at
    the bottom and right, after an odd side has become even. Two serve both: the stride skips the second one
    of an even side.
    """

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, out_width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        images = self.norm(x).flatten(0, -4).movedim(-1, 1)
        return self.conv(F.pad(images, [0, 2, 0, 2])).movedim(1, -1).unflatten(0, x.shape[:-3])


class PaddedAttention(InterleavedAttention):
    """Zeros fill up rows and columns that are fewer than the window's, and take part in attention."""

    def forward(self, x: Tensor, rope: Tensor | None = None, qkv: Tensor | None = None) -> Tensor:
        *frames, height, width = grid = x.shape[1:-1]
        *_, rows, columns = per_axis(self.mixer_spec.window_size, 2)
        sides = ((height, rows), (width, columns))
        padded = (*frames, *(max(n, m) if isinstance(m, int) else n for n, m in sides))
        qkv = None if qkv is None else windows.pad(qkv, padded)
        return windows.crop(super().forward(windows.pad(x, padded), rope, qkv), grid)


class PaddedIwinMixer(IwinMixer):
    """The mixer of the official dense backbones, whose windows are never clipped to the grid."""

    attention_type = PaddedAttention


for _leaf in (IwinMixer, PaddedIwinMixer):
    register_notrace_module(_leaf)  # windows depend on the grid, which torch.fx does not know


class IwinBlock(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``, each branch with stochastic depth."""

    def __init__(self, spec: BlockSpec, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width)
        self.mixer = mixer
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(spec.width)
        self.mlp = Mlp(spec.width, spec.mlp_hidden)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class IwinStage(nn.Module):
    """Downsampling, unless it is the first stage, then the blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[IwinBlock]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
