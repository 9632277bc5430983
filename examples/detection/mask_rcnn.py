"""torchvision's Mask R-CNN on the feature maps of any hierarchical model of timm."""

from __future__ import annotations

from collections import OrderedDict

import timm
import torch
from mask_rcnn_recipes import Recipe
from safetensors.torch import load_file
from timm.layers import Format
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import iwin_dit.models  # noqa: F401, its names in timm

STRIDES = [4, 8, 16, 32]


class PyramidBackbone(nn.Module):
    """Maps of strides 4 to 32 of a timm model, and one of 64, in as many channels each.

    Args:
        name: a name of timm's.
        channels: of each map of the pyramid.
        pretrained: safetensors of a classifier of that name; what it has not (norms of maps) starts anew.
        options: arguments of the model's constructor.

    Raises:
        ValueError: where the model has no maps of these strides, or the file has not its weights.
    """

    def __init__(self, name: str, channels: int, pretrained: str = "", **options: object):
        super().__init__()
        file = dict(pretrained=True, pretrained_cfg_overlay=dict(file=pretrained)) if pretrained else {}
        self.body = timm.create_model(name, features_only=True, **file, **options)
        if pretrained:  # timm only logs names that it does not find
            first = next(self.body.parameters())
            if not any(torch.equal(first, weights) for weights in load_file(pretrained).values()):
                raise ValueError(f"{pretrained} has no weights of {name}")
        strides, widths = self.body.feature_info.reduction(), self.body.feature_info.channels()
        if not set(STRIDES) <= set(strides):
            raise ValueError(f"{name} has maps of strides {strides}, the pyramid needs {STRIDES}")
        self.kept = [strides.index(stride) for stride in STRIDES]
        self.fpn = FeaturePyramidNetwork(
            [widths[i] for i in self.kept], channels, extra_blocks=LastLevelMaxPool()
        )
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` to maps ``(B, channels, H / stride, W / stride)``, named "0" to "3" and "pool"."""
        maps = self.body(images)
        if getattr(self.body, "output_fmt", None) == Format.NHWC:
            maps = [x.movedim(-1, 1) for x in maps]
        return self.fpn(OrderedDict((str(i), maps[kept]) for i, kept in enumerate(self.kept)))


def build_detector(recipe: Recipe, num_classes: int, pretrained: str = "") -> MaskRCNN:
    """Mask R-CNN (arXiv 1703.06870) with a feature pyramid, for ``num_classes`` beside the background.

    With 256 channels the heads are torchvision's own.
    """
    backbone = PyramidBackbone(recipe.model, recipe.channels, pretrained, **recipe.model_options)
    cfg = backbone.body.pretrained_cfg
    width, levels = recipe.channels, len(STRIDES) + 1
    return MaskRCNN(
        backbone,
        min_size=recipe.sizes,
        max_size=recipe.max_size,
        image_mean=cfg["mean"],
        image_std=cfg["std"],
        rpn_anchor_generator=AnchorGenerator(
            tuple((recipe.anchor_size * 2**i,) for i in range(levels)), ((0.5, 1.0, 2.0),) * levels
        ),
        rpn_pre_nms_top_n_train=recipe.proposals,
        rpn_post_nms_top_n_train=recipe.proposals,
        rpn_pre_nms_top_n_test=recipe.proposals // 2,
        rpn_post_nms_top_n_test=recipe.proposals // 2,
        box_batch_size_per_image=recipe.sampled,
        box_detections_per_img=recipe.detections,
        box_head=TwoMLPHead(width * 7 * 7, 4 * width),
        box_predictor=FastRCNNPredictor(4 * width, num_classes + 1),
        mask_head=MaskRCNNHeads(width, (width,) * 4, dilation=1),
        mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
    )


Batch = list[tuple[Tensor, dict[str, Tensor]]]


def collate(items: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of any sizes side by side, as torchvision's detectors take them."""
    return [image for image, _ in items], [target for _, target in items]


def collate_mirrored(items: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """As :func:`collate`; each image and what is in it mirrored with probability 1/2."""
    return collate([mirror(*item) if torch.rand(()) < 0.5 else item for item in items])


def mirror(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Left and right change places: image ``(3, H, W)``, boxes ``(N, 4)`` and masks ``(N, H, W)``."""
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    boxes = torch.stack([image.shape[-1] - x1, y0, image.shape[-1] - x0, y1], dim=1)
    return image.flip(-1), target | dict(boxes=boxes, masks=target["masks"].flip(-1))
