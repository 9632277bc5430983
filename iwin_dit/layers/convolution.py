"""Depthwise convolutions of tokens whose channels are last.

Legend: B batch, T frames, H, W sides of the grid, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConvolution(nn.Module):
    """Convolves each channel by itself over the grid, zero padding: ``(B, H, W, C) -> (B, H, W, C)``.

    Tokens have their channels last, so the view that the convolution sees is in the channels-last memory
    format: no copy, and on a CPU three times faster than the contiguous one.

    Args:
        kernel: its sides.
    """

    def __init__(self, width: int, kernel: tuple[int, ...]):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding=[side // 2 for side in kernel], groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)


class DepthwiseConvolution3D(nn.Module):
    """The same over time, too: ``(B, T, H, W, C) -> (B, T, H, W, C)``.

    Computed as the sum of 2-D convolutions of all frames, one for each frame of the kernel, moved in time: on
    a CPU the backward pass is three times as fast as that of PyTorch's 3-D convolution, and a single frame is
    an image, bit for bit.
    """

    def __init__(self, width: int, kernel: tuple[int, ...]):
        super().__init__()
        self.conv = nn.Conv3d(width, width, kernel, padding=[side // 2 for side in kernel], groups=width)

    def forward(self, x: Tensor) -> Tensor:
        weight, length = self.conv.weight, x.shape[1]
        frames = x.flatten(0, 1).movedim(-1, 1)  # (B T, C, H, W)
        total = None
        for step in range(-(weight.shape[2] // 2), weight.shape[2] // 2 + 1):
            if abs(step) >= length:  # it meets zeros only
                continue
            slice_ = weight[:, :, weight.shape[2] // 2 + step]
            bias = self.conv.bias if step == 0 else None
            y = F.conv2d(frames, slice_, bias, padding=self.conv.padding[1:], groups=weight.shape[0])
            y = y.movedim(1, -1).view(x.shape)
            if step:
                y = y[:, max(step, 0) : length + min(step, 0)]
                y = F.pad(y, (0, 0, 0, 0, 0, 0, max(-step, 0), max(step, 0)))
            total = y if total is None else total + y
        return total


DEPTHWISE: dict[int, type[nn.Module]] = {2: DepthwiseConvolution, 3: DepthwiseConvolution3D}  # by rank
