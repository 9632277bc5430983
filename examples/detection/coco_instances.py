"""COCO's layout of instance segmentation, and average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.datasets import CocoDetection
from torchvision.transforms.functional import to_tensor

from iwin_dit.runtime.errors import DataError


class CocoInstances(CocoDetection):
    """A split of COCO: ``ROOT/train2017/*.jpg`` and ``ROOT/annotations/instances_train2017.json``.

    Items as those of ``DrawnInstances``; labels count from 1 in the order of COCO's category ids, which have
    gaps. Crowds are left out of them, and remain in :meth:`truth`, where found boxes in crowds are no error.

    Args:
        root: the folder of COCO.
        split: ``train2017``, ``val2017`` or another name.
        skip_empty: leave out images without an object, as in training.

    Raises:
        DataError: where files are missing or are something else.
    """

    def __init__(self, root: Path, split: str, skip_empty: bool = False):
        folder, file = Path(root) / split, Path(root) / "annotations" / f"instances_{split}.json"
        for path, found in ((folder, folder.is_dir()), (file, file.is_file())):
            if not found:
                raise DataError(f"{path} is missing; COCO's layout is {split}/ and annotations/{file.name}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                super().__init__(str(folder), str(file))
            self.class_names = tuple(c["name"] for c in self.coco.loadCats(sorted(self.coco.getCatIds())))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise DataError(f"{file} is no file of COCO's instances: {error!r}") from None
        self.category_ids = dict(enumerate(sorted(self.coco.getCatIds()), start=1))
        self._labels = {category: label for label, category in self.category_ids.items()}
        if skip_empty:
            self.ids = [i for i in self.ids if self._objects(i)]
        if not self.ids or not self.category_ids:
            raise DataError(f"{file} has {len(self.ids)} images with objects, expected at least one")

    def _objects(self, image_id: int) -> list[dict[str, Any]]:
        """Annotations that are no crowd and have a width and a height."""
        found = self.coco.loadAnns(self.coco.getAnnIds(image_id))
        return [one for one in found if not one.get("iscrowd") and min(one["bbox"][2:]) > 0]

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        image_id = self.ids[i]
        try:
            image = to_tensor(self._load_image(image_id))
        except OSError as error:
            raise DataError(f"image {image_id} of {self.root} cannot be read: {error}") from None
        objects = self._objects(image_id)
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
        masks = [torch.from_numpy(self.coco.annToMask(one)) for one in objects]
        target = dict(
            boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
            labels=torch.tensor([self._labels[one["category_id"]] for one in objects], dtype=torch.int64),
            masks=torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.uint8),
        )
        return image, target | dict(image_id=torch.tensor([image_id]))

    def truth(self) -> COCO:
        """All objects of the split, as pycocotools evaluates them."""
        return self.coco


def to_results(
    image_id: int, found: Mapping[str, Tensor], category_ids: Mapping[int, int]
) -> list[dict[str, Any]]:
    """What a detector found in one image, in COCO's format of results: boxes as corner, width and height."""
    results = []
    for box, label, score, mask in zip(
        *[found[key].cpu() for key in ("boxes", "labels", "scores", "masks")], strict=True
    ):
        x0, y0, x1, y1 = box.tolist()
        encoded = rle.encode(np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8)))
        result = dict(image_id=image_id, category_id=category_ids[int(label)], score=float(score))
        results.append(result | dict(bbox=[x0, y0, x1 - x0, y1 - y0], segmentation=encoded))
    return results


def average_precision(truth: COCO, results: Sequence[dict[str, Any]], kind: str) -> dict[str, float]:
    """AP over IoU 0.50 to 0.95, and at 0.50 and 0.75, as COCO defines them.

    Args:
        truth: what is in the images.
        results: of :func:`to_results`.
        kind: ``bbox`` or ``segm``.
    """
    if not results:
        return dict(AP50=0.0, AP75=0.0, AP=0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75 = evaluation.stats[:3].tolist()
    return dict(AP50=ap50, AP75=ap75, AP=ap)
