"""The Inflated Inception network (I3D), by whose logits the Frechet video distance (FVD) is defined.

Sources: Carreira and Zisserman 2017, "Quo Vadis, Action Recognition?", figure 3, for the network; Szegedy et
al. 2015, "Going deeper with convolutions", table 1, for its widths; Unterthiner et al. 2018, "Towards
accurate generative models of video", for FVD.

Legend: B clips, C channels, T frames, H x W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from iwin_dit.convert.official_files import find_tensors, load, load_official
from iwin_dit.evaluation.extractors import reading
from iwin_dit.evaluation.images import Extractor
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import DataError

SIZE = 224  # pixels: 7 x 7 after the five strides
NUM_CLASSES = 400  # of Kinetics
MIN_FRAMES = 9  # the last pooling spans 2 of the ceil(T / 8) times that are left
Triple = tuple[int, int, int]
# in, and out of: 1x1x1; 1x1x1 and 3x3x3 after it; the same once more; 1x1x1 after pooling
MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around ``(B, C, T, H, W)`` as TensorFlow's "SAME" puts them, the odd one at the end.

    A convolution or pooling without padding then makes ``ceil(n / stride)`` of every length n.
    """
    pads: list[int] = []
    for length, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-length // s) - 1) * s + k - length, 0)
        pads = [total // 2, total - total // 2, *pads]  # functional.pad takes the last axis first
    return functional.pad(x, pads) if any(pads) else x


class Pool(nn.MaxPool3d):
    """Maxima, with "SAME" padding; by zeros, as good as none for the rectified features that come here."""

    kernel_size: Triple
    stride: Triple

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_same(x, self.kernel_size, self.stride))


class Unit(nn.Module):
    """Convolution with "SAME" padding, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Triple = (1, 1, 1), stride: Triple = (1, 1, 1)):
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return self.bn(x).relu_()


class Mixed(nn.Module):
    """Four branches side by side; arguments as in :data:`MIXED`."""

    def __init__(self, channels: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int):
        super().__init__()
        self.b0 = Unit(channels, b0)
        self.b1a = Unit(channels, b1a)
        self.b1b = Unit(b1a, b1b, (3, 3, 3))
        self.b2a = Unit(channels, b2a)
        self.b2b = Unit(b2a, b2b, (3, 3, 3))
        self.b3a = Pool((3, 3, 3), (1, 1, 1))
        self.b3b = Unit(channels, b3b)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))
        return torch.cat(branches, 1)


class InflatedInception(nn.Sequential):
    """The network alone: ``(B, 3, T, 224, 224)`` in [-1, 1] to logits ``(B, 400, ceil(T / 8) - 1, 1, 1)``.

    Its parameters have the names of the PyTorch port that is in wide use (``rgb_imagenet.pt``). For inference
    alone: there is no dropout.
    """

    def __init__(self) -> None:
        steps: list[tuple[str, nn.Module]] = [
            ("Conv3d_1a_7x7", Unit(3, 64, (7, 7, 7), (2, 2, 2))),
            ("MaxPool3d_2a_3x3", Pool((1, 3, 3), (1, 2, 2))),
            ("Conv3d_2b_1x1", Unit(64, 64)),
            ("Conv3d_2c_3x3", Unit(64, 192, (3, 3, 3))),
            ("MaxPool3d_3a_3x3", Pool((1, 3, 3), (1, 2, 2))),
            *_mixed(3),
            ("MaxPool3d_4a_3x3", Pool((3, 3, 3), (2, 2, 2))),
            *_mixed(4),
            ("MaxPool3d_5a_2x2", Pool((2, 2, 2), (2, 2, 2))),
            *_mixed(5),
            ("avg_pool", nn.AvgPool3d((2, 7, 7), stride=1)),
            ("logits", nn.Sequential(OrderedDict(conv3d=nn.Conv3d(1024, NUM_CLASSES, 1)))),
        ]
        super().__init__(OrderedDict(steps))


def _mixed(stage: int) -> list[tuple[str, nn.Module]]:
    return [(name, Mixed(*widths)) for name, widths in MIXED.items() if name.startswith(f"Mixed_{stage}")]


class I3D(Extractor):
    """Clips to ``logits`` (B, 400), float32, for FVD.

    What is computed: frames, uint8, resized to 224 x 224 as :func:`torch.nn.functional.interpolate` does by
    ``bilinear``, without ``align_corners`` or ``antialias``; ``x / 127.5 - 1``; the network, in float32 (on
    a GPU, TF32 where PyTorch is set to it); the mean over time of its logits, before any softmax. FVD's own
    code differs in the grid of the resizing (TensorFlow 1 has pixel i at ``i * scale``, without half pixels):
    not at all for clips of 224 x 224.

    Figures of different files of weights do not compare: the result carries ``sha256``. A TorchScript file is
    code, and refused.

    Args:
        weights: a state dict of 400 classes, such as ``rgb_imagenet.pt``.

    Raises:
        CheckpointError: where it is not there, or not that network.
    """

    name = "i3d"
    layers = ("logits",)
    preprocessing = "224 x 224, bilinear; x / 127.5 - 1"

    def __init__(self, weights: Path):
        super().__init__()
        self.network = InflatedInception()
        own = self.network.state_dict().items()
        counts = {name: tensor for name, tensor in own if name.endswith("num_batches_tracked")}
        with reading(weights, "I3D's", "such as rgb_imagenet.pt"):
            self.sha256 = files.fingerprint(weights)["sha256"]
            found = find_tensors(load_official(weights))
            load(self.network, counts | found, lambda name: name)  # old files lack the counts
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Logits of uint8 clips ``(B, 3, T, H, W)``; of 9 frames or more.

        Raises:
            DataError: where they are not clips, or too short.
        """
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.dtype != torch.uint8:
            raise DataError(
                f"I3D looks at uint8 clips (B, 3, frames, height, width), found {clips.dtype} of shape "
                f"{tuple(clips.shape)}; give clips, not images"
            )
        if (frames := clips.shape[2]) < MIN_FRAMES:
            raise DataError(
                f"I3D needs clips of {MIN_FRAMES} frames or more, found {frames}; take longer ones"
            )
        x = clips.movedim(2, 1).flatten(0, 1).float()  # (B T, 3, H, W)
        x = functional.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
        x = x.unflatten(0, (-1, frames)).movedim(1, 2) / 127.5 - 1  # (B, 3, T, 224, 224)
        return {"logits": self.network(x).mean((2, 3, 4))}
