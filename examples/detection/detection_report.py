"""What a detector finds on held-out images: figures and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from coco_instances import average_precision, to_results
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from iwin_dit.runtime import files
from iwin_dit.runtime.progress import progress, say

COLOURS = [(0.95, 0.25, 0.2), (0.1, 0.45, 0.95), (0.95, 0.75, 0.1), (0.2, 0.75, 0.3), (0.8, 0.3, 0.85)]
KINDS = {"boxes": "bbox", "masks": "segm"}


@torch.no_grad()
def find_all(accelerator: Accelerator, model: nn.Module, loader: Any) -> list[dict[str, Any]]:
    """What the model finds in all images of a loader, gathered from all processes, as COCO's results."""
    category_ids = loader.dataset.category_ids
    found = {}  # by image: the last batch may repeat images to serve every process
    model.eval()
    bar = progress(
        accelerator.prepare(loader), desc="evaluating", unit="batch", disable=not accelerator.is_main_process
    )
    for images, targets in bar:
        for target, one in zip(targets, model(images), strict=True):
            image_id = int(target["image_id"])
            found[image_id] = to_results(image_id, one, category_ids)
    everywhere = dict(gather_object(list(found.items())))
    return [result for results in everywhere.values() for result in results]


def table(held_out: Any, found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Prints and returns average precisions of boxes and masks."""
    figures = {name: average_precision(held_out.truth(), found, kind) for name, kind in KINDS.items()}
    rows = [(f"{len(held_out)} held-out images", *figures["boxes"]), ("---",) * 4]
    rows += [(name, *(f"{value:.3f}" for value in row.values())) for name, row in figures.items()]
    say("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return figures


@torch.no_grad()
def draw_predictions(model: nn.Module, held_out: Any, path: Path, columns: int = 6) -> None:
    """The first held-out images: above the truth, below what the model finds with a score from 0.5 up."""
    model.eval()
    device = next(model.parameters()).device
    columns = min(columns, len(held_out))
    figure, panels = plt.subplots(
        2, columns, figsize=(1.7 * columns, 3.6), layout="constrained", squeeze=False
    )
    for i, (above, below) in enumerate(panels.T):
        image, target = held_out[i]
        found = {name: value.cpu() for name, value in model([image.to(device)])[0].items()}
        sure = found["scores"] >= 0.5
        draw(above, image, held_out.class_names, target["labels"], target["boxes"], target["masks"].bool())
        labels, boxes, masks, scores = (found[key][sure] for key in ("labels", "boxes", "masks", "scores"))
        draw(below, image, held_out.class_names, labels, boxes, masks[:, 0] > 0.5, scores)
    for panel, text in zip(panels[:, 0], ("truth", "found"), strict=True):
        panel.set_ylabel(text)
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, dpi=110)
    plt.close(figure)
    Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    files.replace(path, small.getvalue())


def draw(
    panel: Any,
    image: Tensor,
    class_names: Sequence[str],
    labels: Tensor,
    boxes: Tensor,
    masks: Tensor,
    scores: Tensor | None = None,
) -> None:
    """An image ``(3, H, W)`` with tinted masks ``(N, H, W)``, boxes ``(N, 4)`` and a text at each box."""
    tinted = image.permute(1, 2, 0).clone()
    colours = [COLOURS[label % len(COLOURS)] for label in labels.tolist()]
    texts = [class_names[label - 1] for label in labels.tolist()]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist(), strict=True)]
    for mask, colour in zip(masks, colours, strict=True):
        tinted[mask] = 0.4 * tinted[mask] + 0.6 * torch.tensor(colour)
    panel.imshow(tinted.clamp(0, 1).numpy(), interpolation="nearest")
    for (x0, y0, x1, y1), colour, text in zip(boxes.tolist(), colours, texts, strict=True):
        corner = (x0 - 0.5, y0 - 0.5)  # a pixel's centre is at its whole number
        panel.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.5))
        inside = "top" if y0 < 0.08 * image.shape[1] else "bottom"
        label = dict(facecolor=colour, edgecolor="none", pad=0.5, alpha=0.85)
        panel.text(*corner, text, fontsize=6, color="white", va=inside, bbox=label, clip_on=True)
    panel.set_xticks([])
    panel.set_yticks([])
