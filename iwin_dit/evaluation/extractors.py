"""Networks that turn images into the features that metrics compare.

An extractor is called with uint8 images ``(B, 3, H, W)`` and returns ``{layer: (B, D)}`` in float32.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from iwin_dit.convert import load_official
from iwin_dit.runtime.errors import CheckpointError

# of torch-fidelity's file, whose name holds the first eight digits: the network that FID is defined by
INCEPTION_SHA256_PREFIX = "6726825d"
SPATIAL_CHANNELS = 7  # of 17 x 17 features, as ADM's evaluator takes them for sFID: D = 2,023


class Inception(nn.Module):
    """The Inception network of 2015, ported from TensorFlow by torch-fidelity.

    Layers: ``pool`` (B, 2048) for FID, KID, precision and recall; ``logits`` (B, 1008) for the Inception
    Score; ``spatial`` (B, 2023) for sFID, the first seven channels of TensorFlow's ``mixed_6/conv``.

    Args:
        weights: torch-fidelity's file. Default: from its address, once.

    Raises:
        CheckpointError: where it is not there, or not that network.
    """

    def __init__(self, weights: Path | None = None):
        super().__init__()
        path = _download() if weights is None else weights
        if not path.is_file():
            raise CheckpointError(
                f"{path} is not there; expected Inception's weights, from {URL_INCEPTION_V3}"
            )
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        published = self.sha256.startswith(INCEPTION_SHA256_PREFIX)
        self.name = "inception" if published else f"inception-{self.sha256[:8]}"
        try:
            load_official(
                path
            )  # tensors alone: then torch-fidelity, which would unpickle all, may read it too
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except Exception as error:  # torch.load raises many kinds
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} does not hold Inception's weights: {reason}") from None
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].flatten(1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images)
        return {"pool": pool, "logits": logits, "spatial": self._spatial.float()}


def _download() -> Path:
    """torch-fidelity's file, in PyTorch's own cache, its hash checked while it comes."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256_PREFIX)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"Inception's weights cannot be fetched ({error}); get {URL_INCEPTION_V3} and give "
                "--inception-weights FILE"
            ) from None
    return path
