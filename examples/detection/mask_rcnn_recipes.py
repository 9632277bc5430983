"""How a detector is built and trained, as one table; imports no torch, so that errors come at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Sizes are in pixels, times in epochs or steps (one step is one update of the weights).

    Args:
        epochs: passes over the training images.
        batch_images: images of one step, over all processes.
        learning_rate, weight_decay: AdamW's; norms and biases do not decay.
        warmup_steps: the learning rate grows linearly from 0.
        drops: parts of the training after which the learning rate is divided by 10.
        sizes: short sides of a training image, one drawn for each image; the last is the evaluation's.
        max_size: of the long side; the short one gives way.
        channels: of the feature pyramid; the heads follow it (torchvision: 256).
        anchor_size: side of the anchors on the finest map; it doubles with each coarser one.
        proposals: boxes that the first stage keeps for each image, a half of them at evaluation.
        sampled: proposals of each image that train the second stage.
        detections: most boxes found in one image.
        model, model_options: backbone in timm, and arguments of its constructor.
    """

    epochs: int = 12
    batch_images: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup_steps: int = 1000
    drops: tuple[float, ...] = (8 / 12, 11 / 12)
    sizes: tuple[int, ...] = tuple(range(480, 801, 32))
    max_size: int = 1333
    channels: int = 256
    anchor_size: int = 32
    proposals: int = 2000
    sampled: int = 512
    detections: int = 100
    model: str = "iwin_tiny_patch4_window7_224"
    model_options: Mapping[str, Any] = field(
        default_factory=lambda: dict(drop_path_rate=0.1, feature_norm=True)
    )

    def rate(self, step: int, steps: int) -> float:
        """Part of ``learning_rate`` that step ``step`` of ``steps`` has."""
        drops = sum(step >= drop * steps for drop in self.drops)
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * 0.1**drops


# COCO's optimiser, batch, epochs and sizes are the 1x and 3x schedules of Swin (arXiv 2103.14030);
# warm-up, drops and stochastic depth are mmdetection's for Swin-T.
RECIPES = {
    "shapes": Recipe(
        epochs=1,
        batch_images=4,
        learning_rate=1e-3,
        warmup_steps=50,
        drops=(0.75, 0.92),
        sizes=(96,),
        max_size=96,
        channels=64,
        anchor_size=12,
        proposals=200,
        sampled=32,
        detections=20,
        model_options=dict(
            img_size=96,
            embed_dim=32,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 4, 8],
            window_size="auto",
            feature_norm=True,
        ),
    ),
    "coco_1x": Recipe(),
    "coco_3x": Recipe(
        epochs=36, drops=(27 / 36, 33 / 36), model_options=dict(drop_path_rate=0.2, feature_norm=True)
    ),
}
