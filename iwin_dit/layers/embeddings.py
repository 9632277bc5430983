"""From latents, timesteps and labels to vectors of the model's width, and from tokens back to latents.

Legend: B batch, C latent channels, D width, p patch size; a grid is (H/p, W/p) of images, (T, H/p, W/p) of
clips: each frame of a latent has tokens of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Each patch of p x p latents becomes one token: ``(B, C, [T,] H, W) -> (B, [T,] H/p, W/p, D)``.

    Args:
        bottleneck: channels that a patch passes through first, by a projection without a bias (JiT, arXiv
            2511.13720). Default: one projection.
    """

    def __init__(self, in_channels: int, width: int, patch_size: int, bottleneck: int | None = None):
        super().__init__()
        self.patch_size = patch_size
        numbers = in_channels * patch_size**2
        self.bottleneck = None if bottleneck is None else nn.Linear(numbers, bottleneck, bias=False)
        self.proj = nn.Linear(numbers if bottleneck is None else bottleneck, width)

    def forward(self, latents: Tensor) -> Tensor:
        p = self.patch_size
        patches = rearrange(latents, "b c ... (h p) (w q) -> b ... h w (c p q)", p=p, q=p)
        return self.proj(patches if self.bottleneck is None else self.bottleneck(patches))


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """Tokens of channels (p, q, channel) to latents: ``(B, [T,] H/p, W/p, p p C) -> (B, C, [T,] H, W)``."""
    return rearrange(tokens, "b ... h w (p q c) -> b c ... (h p) (w q)", p=patch_size, q=patch_size)


class TimestepEmbedder(nn.Module):
    """256 sinusoidal features of ``scale * timestep + shift``, then an MLP: ``(B,) -> (B, D)``.

    Cosines first, period 10,000. The linear map brings a model trained in another time convention into ours.
    """

    def __init__(self, width: int, scale: float = 1.0, shift: float = 0.0, num_features: int = 256):
        super().__init__()
        self.scale, self.shift, self.num_features = scale, shift, num_features
        self.linear_1 = nn.Linear(num_features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        time = self.scale * timestep.float() + self.shift  # (B,)
        features = sinusoid(time, self.num_features)  # (B, 256)
        return self.linear_2(F.silu(self.linear_1(features.to(dtype))))


def sinusoid(x: Tensor, num_features: int) -> Tensor:
    """Sinusoidal features: ``(N,) -> (N, num_features)``, float32.

    They are ``cos(x w_i)``, then ``sin(x w_i)``, with ``w_i = 10000^(-2 i / num_features)``.
    """
    half = num_features // 2
    frequencies = torch.exp(
        -math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=x.device)
    )
    angles = x.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(grid: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """DiT's fixed position embedding: first half by column, second by row, sines first: ``(*grid, D)``.

    Of clips, :func:`frame_positions` are added.
    """
    *frames, height, width_ = grid
    rows, columns = (_sines_first(torch.arange(side, device=device), width // 2) for side in (height, width_))
    places = torch.cat(
        [columns[None, :, :].expand(height, -1, -1), rows[:, None, :].expand(-1, width_, -1)], dim=-1
    )  # (H/p, W/p, D)
    return places + frame_positions(frames[0], width, device) if frames else places


def frame_positions(frames: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of the frame, less those of the first, which is an image: ``(T, 1, 1, D)``."""
    times = _sines_first(torch.arange(frames, device=device), width)  # (T, D)
    return (times - times[0])[:, None, None]


def _sines_first(x: Tensor, num_features: int) -> Tensor:
    cos, sin = sinusoid(x, num_features).chunk(2, dim=-1)
    return torch.cat([sin, cos], dim=-1)


def rope_angles(grid: tuple[int, ...], head_width: int, device: torch.device) -> Tensor:
    """Angles of the 2-D rotary embedding, one per pair of channels: ``(H, W, head_width / 2)``, float32.

    The first half of the width turns by row, the second by column, theta 10,000 (EVA-02; LightningDiT).
    """
    quarter = head_width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    rows, columns = (
        torch.arange(side, dtype=torch.float32, device=device)[:, None] * frequencies for side in grid
    )
    return torch.cat(
        [rows[:, None, :].expand(-1, grid[1], -1), columns[None, :, :].expand(grid[0], -1, -1)], dim=-1
    )


def apply_rope(angles: Tensor, *queries_and_keys: Tensor) -> list[Tensor]:
    """Rotates interleaved channel pairs of ``(..., N, d)``, angles broadcastable to ``(..., N, d / 2)``."""
    cos, sin = angles.cos(), angles.sin()
    rotated = []
    for x in queries_and_keys:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        rotated.append(pairs.flatten(-2).to(x.dtype))
    return rotated
