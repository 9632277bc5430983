"""ADE20K as the scene parsing benchmark packs it (ADEChallengeData2016).

``images/training/*.jpg``, ``annotations/training/*.png`` and the same under ``validation``. An annotation
holds 0 where nothing is labelled, and 1 to 150 for the classes; here these are 0 to 149 and 255, which is
ignored (``reduce_zero_label`` in mmsegmentation).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from iwin_dit.config.classifier import IMAGENET_MEAN, IMAGENET_STD
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.seeds import derive_seed, generator

NUM_CLASSES = 150
IGNORED = 255
MAX_SHARE = 0.75  # of a crop that one class may take (mmsegmentation's cat_max_ratio)
TRIES = 10


class ADE20K:
    """Item i is a float image ``(3, H, W)``, normalised, and its mask ``(H, W)`` of class numbers.

    To train on, item i is a random crop ``(side, side)``, a function of (seed, i): the images are shuffled,
    over and over, and each is resized, cropped, mirrored and coloured at random, as in mmsegmentation. To be
    judged by, an image is as it is, its shorter side resized; its mask keeps its own size.

    Args:
        split: ``training`` or ``validation``.
        count: of items; default: of images.

    Raises:
        DataError: where the layout is another one.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, path: str, split: str, side: int, seed: int, count: int | None = None):
        self.root, self.split, self.side, self.seed = Path(path), split, side, seed
        self.names = sorted(file.stem for file in (self.root / "images" / split).glob("*.jpg"))
        if not self.names:
            raise DataError(f"{path} has no images/{split}/*.jpg; give the folder ADEChallengeData2016")
        labelled = {file.stem for file in (self.root / "annotations" / split).glob("*.png")}
        missing = [name for name in self.names if name not in labelled]
        if missing:
            raise DataError(
                f"{path}: {len(missing)} of {len(self.names)} images have no annotation, such as "
                f"annotations/{split}/{missing[0]}.png; unpack the archive again"
            )
        self.count = len(self.names) if count is None else count
        self.class_names = read_names(self.root / "objectInfo150.txt")
        self._order = (-1, torch.empty(0))
        self.vary = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()])
        self.normalise = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.split == "validation":
            image, mask = self.read(self.names[index])
            return self.normalise(v2.functional.resize(image, self.side, antialias=True)), mask.long()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "augment", index))
            image, mask = self.vary(*self.crop(*self.read(self.names[self.shuffled(index)])))
        return self.normalise(image), mask.long()

    def shuffled(self, index: int) -> int:
        """The image of a position: every one once per pass, in another order each time."""
        epoch, place = divmod(index, len(self.names))
        if self._order[0] != epoch:
            shuffle = generator(self.seed, "order", epoch)
            self._order = epoch, torch.randperm(len(self.names), generator=shuffle)
        return int(self._order[1][place])

    def read(self, name: str) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """uint8 ``(3, H, W)``, and ``(H, W)`` with 255 where nothing is labelled."""
        with Image.open(self.root / "images" / self.split / f"{name}.jpg") as file:
            image = np.array(file.convert("RGB"))
        with Image.open(self.root / "annotations" / self.split / f"{name}.png") as file:
            labels = np.array(file)
        if labels.shape != image.shape[:2] or labels.max() > NUM_CLASSES:
            raise DataError(
                f"{self.root}/annotations/{self.split}/{name}.png is {labels.shape} with labels up to "
                f"{labels.max()}, expected {image.shape[:2]} and at most {NUM_CLASSES}"
            )
        mask = labels.astype(np.uint8) - np.uint8(1)  # 0 becomes 255
        return tv_tensors.Image(image.transpose(2, 0, 1)), tv_tensors.Mask(mask)

    def crop(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A random crop of the image, resized to between half and twice ``side``; padded where smaller."""
        shorter = int(self.side * (0.5 + 1.5 * torch.rand(())))
        image = v2.functional.resize(image, shorter, antialias=True)
        mask = v2.functional.resize(mask, shorter, interpolation=v2.InterpolationMode.NEAREST)
        bottom, right = (max(0, self.side - length) for length in mask.shape)
        image = v2.functional.pad(image, [0, 0, right, bottom], fill=[255 * mean for mean in self.mean])
        mask = v2.functional.pad(mask, [0, 0, right, bottom], fill=IGNORED)
        for _ in range(TRIES):
            top, left = (int(torch.randint(length - self.side + 1, ())) for length in mask.shape)
            box = (top, left, self.side, self.side)
            labels = v2.functional.crop(mask, *box)
            counts = torch.bincount(labels[labels != IGNORED].long())
            if len(counts.nonzero()) > 1 and counts.max() < MAX_SHARE * counts.sum():
                break
        return v2.functional.crop(image, *box), labels


def read_names(path: Path) -> tuple[str, ...]:
    """Of objectInfo150.txt, the first word for each class; numbers where the file is not there."""
    if not path.is_file():
        return tuple(f"class {number}" for number in range(1, NUM_CLASSES + 1))
    rows = path.read_text().splitlines()[1:]
    return tuple(row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip())


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Zeros, which are the mean colour, at the bottom and the right of ``(..., H, W)``."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))
