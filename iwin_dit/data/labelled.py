"""Images and clips with labels, as classifiers see them: varied for training, as they are for judging.

Legend: T frames of a clip, H and W of the model's input, V views of a video.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from iwin_dit.data.examples import epoch_order
from iwin_dit.data.images import decode_image
from iwin_dit.data.sources import ClipFolderSource, identity_of
from iwin_dit.data.video import ClipSpec, choose_clip, spread_clips
from iwin_dit.runtime.colours import Colour
from iwin_dit.runtime.seeds import derive_seed

# Where crops lie along the longer side, from its start (0) to its end (1), by their number.
IMAGE = ClipSpec(1)
CROPS: dict[int, tuple[float, ...]] = {1: (0.5,), 3: (0.0, 0.5, 1.0)}


class LabelledExample(NamedTuple):
    """One image of a training step, or a batch of them.

    image: (3, H, W), normalised, or a clip (3, T, H, W); label: class; mixing: (4,), see
        :func:`iwin_dit.training.classification.mix_weights`.
    """

    image: Tensor
    label: int | Tensor
    mixing: Tensor


class Labelled(Dataset[tuple[Tensor, int]]):
    """What a classifier learns from or is judged by: ``data[i] -> (image or clip, label)``, as in the source.

    Args:
        source: of images or of videos, see :mod:`iwin_dit.data.sources`.
        transform: from a PIL image to a tensor ``(3, H, W)``.
        background: what shows through transparent pixels; see :func:`iwin_dit.data.images.decode_image`.
        spec: frames and stride of clips.
    """

    def __init__(
        self,
        source: Any,
        transform: Callable[[Image.Image], Tensor],
        background: Colour | None = None,
        spec: ClipSpec = IMAGE,
    ):
        self.source, self.transform, self.background, self.spec = source, transform, background, spec

    def __len__(self) -> int:
        return len(self.source)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the data the same to a run that is resumed."""
        return identity_of(self.source)


class LabelledImages(Labelled):
    """``images[i] -> (image (3, H, W), label)``."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Raises DataError, naming the image that is broken."""
        data, label = self.source.read(i)
        return self.transform(decode_image(data, self.source.name(i), background=self.background)), label


class LabelledClips(Labelled):
    """``clips[i] -> (clip (3, T, H, W), label)``: from a random place of the video, and varied.

    Place and variation follow from two numbers of PyTorch's global generator; ``transform`` draws the same
    numbers for every frame.
    """

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Raises DataError, naming the video that is broken or too short."""
        place, seed = torch.randint(2**62, (2,)).tolist()
        rng = torch.Generator().manual_seed(place)
        frames = choose_clip(self.source.path(i), self.spec, rng, self.background)
        varied = []
        with drawing_from(seed):
            for frame in frames:
                seed_generators(seed)  # again for each
                varied.append(self.transform(frame))
        return torch.stack(varied, 1), self.source.labels[i]


class HeldOutClips(Labelled):
    """``clips[i] -> (views (V, 3, T, H, W), label)``.

    Args:
        transform: timm's for evaluation, which scales an image, takes its centre and normalises it.
        views: clips that are spread over the video, and crops of each along the longer side, 1 or 3; the
            views of a clip stand next to each other.
    """

    def __init__(
        self,
        source: ClipFolderSource,
        transform: Compose,
        background: Colour | None,
        spec: ClipSpec,
        views: tuple[int, int],
    ):
        super().__init__(source, transform, background, spec)
        self.scale, center_crop, *rest = transform.transforms
        self.size, self.finish = center_crop.size, Compose(rest)
        self.num_clips, self.places = views[0], CROPS[views[1]]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Raises DataError, naming the video that is broken or too short."""
        views = []
        for clip in spread_clips(self.source.path(i), self.spec, self.num_clips, self.background):
            frames = [self.scale(frame) for frame in clip]
            views += [self._crop(frames, place) for place in self.places]
        return torch.stack(views), self.source.labels[i]

    def _crop(self, frames: Sequence[Image.Image], place: float) -> Tensor:
        """``(3, T, H, W)``, centred along the shorter side."""
        height, width = self.size
        spare_y, spare_x = frames[0].height - height, frames[0].width - width
        share_y, share_x = (place, 0.5) if spare_y > spare_x else (0.5, place)
        top, left = round(spare_y * share_y), round(spare_x * share_x)  # as torchvision's CenterCrop rounds
        box = (left, top, left + width, top + height)
        return torch.stack([self.finish(frame.crop(box)) for frame in frames], 1)


class LabelledExamples(Dataset[LabelledExample]):
    """``examples[position] -> LabelledExample``: a pure function of (seed, position).

    Args:
        data: images, or clips; what they do may draw random numbers.
        seed: of order, augmentation and mixing.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
    """

    def __init__(self, data: Labelled, seed: int, mixup: float, cutmix: float):
        self.data, self.seed, self.mixup, self.cutmix = data, seed, mixup, cutmix

    def __getitem__(self, position: int) -> LabelledExample:
        epoch, offset = divmod(position, len(self.data))
        index = int(epoch_order(self.seed, epoch, len(self.data))[offset])
        with drawing_from(derive_seed(self.seed, "augment", position)):
            image, label = self.data[index]
        return LabelledExample(image, label, self._mixing(position // 2))

    def _mixing(self, pair: int) -> Tensor:
        rng = np.random.default_rng(derive_seed(self.seed, "mixing", pair))
        cuts = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = rng.beta(alpha, alpha) if alpha > 0 else 1.0
        return torch.tensor([share, float(cuts), *rng.random(2)], dtype=torch.float32)


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """All global generators begin with this seed, and are left as they were: augmentation draws from them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_generators(seed: int) -> None:
    """Those of the CPU, which augmentation draws from: PyTorch's, Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
