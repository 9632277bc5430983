"""UPerNet (arXiv 1807.10221) on any encoder of timm, by segmentation-models-pytorch.

Legend: B batch, K classes, H and W of the image.
"""

from __future__ import annotations

import re
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import iwin_dit.models  # noqa: F401  registers Iwin's names in timm
from iwin_dit.build.classifier_network import begin_classifier
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.seeds import derive_seed

IGNORED = 255
AUXILIARY_WIDTH = 256


class UPerNet(smp.UPerNet):
    """smp's UPerNet, for any patch size and image size, with mmsegmentation's second head while it trains.

    The second head classifies the encoder's last map but one, and is left out of evaluation.
    """

    def __init__(self, encoder: str, stages: int, num_classes: int, **options: Any):
        super().__init__(
            f"tu-{encoder}", encoder_depth=stages + 1, classes=num_classes, upsampling=1, **options
        )
        width = min(AUXILIARY_WIDTH, self.encoder.out_channels[-2])
        self.auxiliary = nn.Sequential(
            nn.Conv2d(self.encoder.out_channels[-2], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, num_classes, 1),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images ``(B, 3, H, W)`` to logits ``(B, K, H, W)``, and while training the second head's."""
        maps = self.encoder(x)
        logits = [self.segmentation_head(self.decoder(maps))]
        if self.training:
            logits.append(self.auxiliary(maps[-2]))
        return [F.interpolate(found, x.shape[-2:], mode="bilinear") for found in logits]


def build_model(recipe: Any, num_classes: int) -> UPerNet:
    """The network of a recipe, its new weights drawn from the seed.

    Raises:
        ConfigError: where timm does not know the encoder, or not its options.
        CheckpointError: where ``init_from`` is not there, or of another network.
    """
    name, options = recipe.encoder, dict(recipe.encoder_options)
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3]) or "iwin_tiny_patch4_window7_224"
        raise ConfigError(f"encoder {name} is not one of timm's; such as {near}")
    if name.startswith(("iwin", "swin")):
        options.setdefault("img_size", recipe.image_size)
    if name.startswith("swin"):
        options.setdefault("strict_img_size", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "weights"))
        try:
            model = UPerNet(
                name,
                len(options.get("depths", range(4))),
                num_classes,
                encoder_weights=True if recipe.pretrained else None,
                decoder_channels=recipe.decoder_channels,
                **options,
            )
            if recipe.init_from is not None:
                begin_encoder(model.encoder.model, timm.create_model(name, **options), recipe.init_from)
        except (TypeError, ValueError, AssertionError, RuntimeError, FileNotFoundError) as error:
            raise ConfigError(f"encoder_options {options} do not make a {name}: {error}") from None
    return model


def begin_encoder(encoder: nn.Module, classifier: nn.Module, source: str) -> None:
    """Copies a classifier's weights, from its run or a file, into the encoder of the same options.

    Raises:
        CheckpointError: where they are not there, or not of this network.
    """
    begin_classifier(classifier, source)
    stored = classifier.state_dict()
    encoder.load_state_dict({name: stored[classifier_name(name)] for name in encoder.state_dict()})


def classifier_name(name: str) -> str:
    """Of a tensor of timm's ``features_only`` models, which wrap (``model.``) or flatten (``layers_0.``)."""
    return re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name.removeprefix("model."))


def parameter_groups(model: UPerNet, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Layer by layer in the encoder, and the heads; no weight decay on biases, norms and positions."""
    encoder = getattr(model.encoder.model, "model", model.encoder.model)
    if not hasattr(encoder, "group_matcher") and layer_decay != 1:
        raise ConfigError(
            f"layer_decay is {layer_decay}, but timm does not name this encoder's layers; set it to 1"
        )
    if hasattr(encoder, "group_matcher"):
        unchanged = encoder.no_weight_decay() if hasattr(encoder, "no_weight_decay") else ()
        groups = param_groups_layer_decay(encoder, weight_decay, unchanged, layer_decay=layer_decay)
    else:
        groups = flat_groups(list(encoder.parameters()), weight_decay)
    groups = [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} for group in groups]
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    return groups + flat_groups([p for p in model.parameters() if id(p) not in taken], weight_decay)


def flat_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels with weight decay, vectors without."""
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == wide] for wide in (True, False))
    return [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def poly_rate(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Linear warm-up, then a straight line to zero: mmsegmentation's ``poly`` of power 1."""
    return peak * min(1.0, (step + 1) / (warmup_steps + 1)) * (1 - step / max_steps)


def segmentation_loss(logits: list[Tensor], masks: Tensor, auxiliary_weight: float) -> Tensor:
    """Cross-entropy over labelled pixels ``(B, H, W)``; the second head's is weighted."""
    labelled = (masks != IGNORED).sum().clamp(min=1)
    main, auxiliary = (
        F.cross_entropy(found.float(), masks, ignore_index=IGNORED, reduction="sum") / labelled
        for found in logits
    )
    return main + auxiliary_weight * auxiliary


def confusion(predictions: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns), int64 ``(K, K)``; ignored ones left out."""
    labelled = masks != IGNORED
    pairs = num_classes * masks[labelled].long() + predictions[labelled].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def iou_per_class(counts: Tensor) -> Tensor:
    """Intersection over union of each class ``(K,)``, of a confusion matrix; NaN for a class nowhere seen."""
    hits = counts.diag().double()
    return hits / (counts.sum(0) + counts.sum(1) - hits)
