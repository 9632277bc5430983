"""Images with labels, as classifiers see them: varied for training, as they are for judging."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from iwin_dit.data.clip_sources import ClipFolderSource
from iwin_dit.data.examples import epoch_order
from iwin_dit.data.images import BadImage, decode_image
from iwin_dit.data.sources import Source, identity_of
from iwin_dit.runtime.colours import Colour
from iwin_dit.runtime.errors import DataError
from iwin_dit.runtime.seeds import derive_seed


class LabelledExample(NamedTuple):
    """One image of a training step, or a batch of them.

    image: (3, H, W), normalised, or a clip (3, T, H, W); label: class; mixing: (4,), see
        :func:`iwin_dit.training.classification.mix_weights`.
    """

    image: Tensor
    label: int | Tensor
    mixing: Tensor


S = TypeVar("S", Source, ClipFolderSource)


class Labelled(Dataset[tuple[Tensor, int]], Generic[S]):
    """What a classifier learns from or is judged by: ``data[i] -> (image or clip, label)``, as in the source.

    Args:
        source: of images, see :mod:`iwin_dit.data.sources`, or of videos.
        background: what shows through transparent pixels; see :func:`iwin_dit.data.images.decode_image`.
    """

    def __init__(self, source: S, background: Colour | None = None):
        self.source: S = source
        self.background = background

    def __len__(self) -> int:
        return len(self.source)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the data the same to a run that is resumed."""
        return identity_of(self.source)


class LabelledImages(Labelled[Source]):
    """``images[i] -> (image (3, H, W), label)``.

    Args:
        source, background: of :class:`Labelled`.
        transform: from a PIL image to a tensor.
    """

    def __init__(
        self, source: Source, transform: Callable[[Image.Image], Tensor], background: Colour | None = None
    ):
        super().__init__(source, background)
        self.transform = transform

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        name = self.source.name(i)
        try:
            data, label = self.source.read(i)
            return self.transform(decode_image(data, name, background=self.background)), label
        except BadImage as error:
            raise DataError(str(error) if name in str(error) else f"{name}: {error}") from None


class LabelledExamples(Dataset[LabelledExample]):
    """``examples[position] -> LabelledExample``: a pure function of (seed, position).

    Args:
        data: images, or clips; what they do may draw random numbers.
        seed: of order, augmentation and mixing.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
    """

    def __init__(self, data: Labelled[Any], seed: int, mixup: float, cutmix: float):
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
