"""Networks that turn images into the features that metrics compare.

An extractor is called with uint8 images ``(B, 3, H, W)`` and returns ``{layer: (B, D)}`` in float32, for each
of its ``layers``. What its features depend on are its ``name``, ``sha256`` and ``preprocessing``.
"""

from __future__ import annotations

import contextlib
import http.client
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchvision.transforms.v2.functional import normalize

from iwin_dit.convert import load_official
from iwin_dit.evaluation.images import Extractor
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import CheckpointError, reason

# of torch-fidelity's file, whose name holds the first eight digits: the network that FID is defined by
INCEPTION_SHA256_PREFIX = "6726825d"
SPATIAL_CHANNELS = 7  # of 17 x 17 features, as ADM's evaluator takes them for sFID: D = 2,023

URL_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
DINOV2_SHA256 = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
DINOV2_SIZE, DINOV2_PATCH = 224, 14  # pixels
RESIZED = "bicubic as Pillow resizes"


class Inception(Extractor):
    """The Inception network of 2015, ported from TensorFlow by torch-fidelity.

    Layers: ``pool`` (B, 2048) for FID, KID, precision and recall; ``logits`` (B, 1008) for the Inception
    Score; ``spatial`` (B, 2023) for sFID, the first seven channels of TensorFlow's ``mixed_6/conv``.

    Args:
        weights: torch-fidelity's file. Default: from its address, once.

    Raises:
        CheckpointError: where it is not there, or not that network.
    """

    layers = ("pool", "logits", "spatial")
    preprocessing = "299 x 299, bilinear as TensorFlow 1 resizes; (x - 128) / 128"

    def __init__(self, weights: Path | None = None):
        super().__init__()
        hint = "--inception-weights FILE"
        path = _download(URL_INCEPTION_V3, INCEPTION_SHA256_PREFIX, "Inception's", hint, weights)
        with reading(path, "Inception's", f"from {URL_INCEPTION_V3}"):
            self.sha256 = files.fingerprint(path)["sha256"]
            load_official(path)  # tensors alone: then torch-fidelity, which would unpickle all, may read it
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        published = self.sha256.startswith(INCEPTION_SHA256_PREFIX)
        self.name = "inception" if published else f"inception-{self.sha256[:8]}"
        self._spatial = torch.empty(0)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].flatten(1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images)
        return {"pool": pool, "logits": logits, "spatial": self._spatial.float()}


def vit_large() -> nn.Module:
    """The architecture of DINOv2 ViT-L/14 without registers, for 224 x 224 pixels: 303 M parameters."""
    return timm.create_model(
        "vit_large_patch14_dinov2", pretrained=False, img_size=DINOV2_SIZE, num_classes=0
    )


class DINOv2(Extractor):
    """DINOv2 ViT-L/14 (Oquab et al. 2023), for FD-DINOv2 as Stein et al. 2023 define it ("Exposing flaws of
    generative model evaluation metrics and their unfair treatment of diffusion models"; ``dgm-eval``).

    Layer: ``pool`` (B, 1024), the class token after the last normalisation, of images at 224 x 224.

    ``torch.hub.load`` of the original repository would run code that was just downloaded; here the
    architecture is timm's and only tensors are read from the original file.

    Args:
        weights: ``dinov2_vitl14_pretrain.pth``. Default: from its address, once.
        build: makes the architecture, for 224 x 224 pixels.

    Raises:
        CheckpointError: where it is not there, or not that network.
    """

    layers = ("pool",)
    preprocessing = f"224 x 224, {RESIZED}; ImageNet's mean and deviation"

    def __init__(self, weights: Path | None = None, build: Callable[[], nn.Module] | None = None):
        super().__init__()
        path = _download(URL_DINOV2, DINOV2_SHA256, "DINOv2's", "--extractor dinov2:FILE", weights)
        with torch.device("meta"):
            self.network = (build or vit_large)().eval().requires_grad_(False)
        with reading(path, "DINOv2's", f"from {URL_DINOV2}"):
            self.sha256 = files.fingerprint(path)["sha256"]
            state = {
                name: t for name, t in load_official(path).items() if name != "mask_token"
            }  # of training
            state["pos_embed"] = resize_positions(state["pos_embed"], DINOV2_SIZE // DINOV2_PATCH)
            self.network.load_state_dict({name: t.float() for name, t in state.items()}, assign=True)
        self.name = "dinov2" if self.sha256 == DINOV2_SHA256 else f"dinov2-{self.sha256[:8]}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = resize(images, (DINOV2_SIZE, DINOV2_SIZE)) / 255
        return {"pool": self.network(normalize(x, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))}


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """DINOv2's position embedding ``(1, 1 + n n, D)`` for ``grid x grid`` patches, as its own code makes it.

    Bicubic without antialiasing, by the factor ``(grid + 0.1) / n`` and not by the size: the weights were
    trained with that (``interpolate_pos_encoding`` of DINOv2, ``interpolate_offset`` 0.1).
    """
    side = math.isqrt(positions.shape[1] - 1)
    if side == grid:
        return positions
    patches = positions[:, 1:].float().unflatten(1, (side, side)).movedim(-1, 1)  # (1, D, n, n)
    factor = (grid + 0.1) / side
    patches = functional.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([positions[:, :1].float(), patches.flatten(2).transpose(1, 2)], 1)


class Classifier(Extractor):
    """A classifier in the interface of timm: of the user's own, for figures named "FD (iwin)", or another.

    Layers: ``pool``, the features before its last layer; ``logits``, of its classes.

    Args:
        model: with ``forward_features``, ``forward_head(x, pre_logits=True)`` and ``get_classifier()``.
        image_size: (H, W) that it takes; images of another size are resized.
        mean, std: of each colour, of values in [0, 1].
        sha256: of its weights.
        name: of its features.
    """

    layers = ("pool", "logits")

    def __init__(
        self,
        model: nn.Module,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        sha256: str,
        name: str = "iwin",
    ):
        super().__init__()
        self.name = name
        self.model: Any = model.eval().requires_grad_(False)  # timm's interface, which no class states
        self.image_size, self.sha256 = (int(image_size[0]), int(image_size[1])), sha256
        self.mean, self.std = list(mean), list(std)
        size = " x ".join(map(str, self.image_size))
        self.preprocessing = f"{size}, {RESIZED}; mean {self.mean}, deviation {self.std}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = normalize(resize(images, self.image_size) / 255, self.mean, self.std)
        x = self.model.forward_features(x)
        pool = self.model.forward_head(x, pre_logits=True)
        return {"pool": pool.float(), "logits": self.model.get_classifier()(pool).float()}


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images ``(B, 3, H, W)`` in 0..255 as float32 of another size, by Pillow's bicubic, on any device.

    Pillow resizes rows, then columns, and rounds to 8 bits after each.
    """
    x = images.float()
    for sides in ((x.shape[2], size[1]), size):
        if tuple(x.shape[2:]) != sides:
            x = functional.interpolate(x, sides, mode="bicubic", antialias=True).round().clamp(0, 255)
    return x


@contextlib.contextmanager
def reading(path: Path, whose: str, source: str) -> Iterator[None]:
    """Says of what goes wrong with a file whose weights it should hold.

    Args:
        source: where they come from, such as ``from URL``.

    Raises:
        CheckpointError: where the file is not there, or for what goes wrong in the context.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; expected {whose} weights, {source}")
    try:
        yield
    except Exception as error:  # whatever tensors of another network lead to
        raise CheckpointError(f"{path} does not hold {whose} weights: {reason(error)}") from None


def _download(url: str, sha256: str, whose: str, option: str, given: Path | None) -> Path:
    """The given file; else the published one, in PyTorch's own cache, its hash checked as it comes."""
    if given is not None:
        return given
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise CheckpointError(
                f"{whose} weights cannot be fetched ({reason(error)}); get {url} and give {option}"
            ) from None
    return path
