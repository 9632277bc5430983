"""Clips with labels, as classifiers see them: varied for training, in several views for judging.

Legend: T frames of a clip, H and W of the model's input, V views of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from iwin_dit.data.clip_sources import ClipFolderSource
from iwin_dit.data.labelled import Labelled, drawing_from, seed_generators
from iwin_dit.data.video import ClipSpec
from iwin_dit.runtime.colours import Colour

# Where crops lie along the longer side, from its start (0) to its end (1), by their number.
CROPS: dict[int, tuple[float, ...]] = {1: (0.5,), 3: (0.0, 0.5, 1.0)}


class LabelledClips(Labelled[ClipFolderSource]):
    """``clips[i] -> (clip (3, T, H, W), label)``: from a random place of the video, and varied.

    Place and variation follow from two numbers of PyTorch's global generator.

    Args:
        source: of videos.
        spec: frames and stride of a clip.
        transform: from a PIL image to a tensor ``(3, H, W)``; it draws the same numbers for every frame.
        background: what shows through transparent pixels.
    """

    def __init__(
        self,
        source: ClipFolderSource,
        spec: ClipSpec,
        transform: Callable[[Image.Image], Tensor],
        background: Colour | None = None,
    ):
        super().__init__(source, background)
        self.spec, self.transform = spec, transform

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Raises DataError, naming the video that is broken or too short."""
        place, seed = torch.randint(2**62, (2,)).tolist()
        frames, label = self.source.read(i, self.spec, torch.Generator().manual_seed(place), self.background)
        varied = []
        with drawing_from(seed):
            for frame in frames:
                seed_generators(seed)  # again for each
                varied.append(self.transform(frame))
        return torch.stack(varied, 1), label


class HeldOutClips(Labelled[ClipFolderSource]):
    """``clips[i] -> (views (V, 3, T, H, W), label)``, in the order of the source.

    Args:
        source: of videos.
        spec: frames and stride of a clip.
        transform: timm's for evaluation, which scales an image, takes its centre and normalises it.
        views: clips that are spread over the video, and crops of each along the longer side, 1 or 3; the
            views of a clip stand next to each other.
        background: what shows through transparent pixels.
    """

    def __init__(
        self,
        source: ClipFolderSource,
        spec: ClipSpec,
        transform: Compose,
        views: tuple[int, int],
        background: Colour | None = None,
    ):
        super().__init__(source, background)
        self.spec = spec
        self.scale, center_crop, *rest = transform.transforms
        self.size, self.finish = center_crop.size, Compose(rest)
        self.num_clips, self.places = views[0], CROPS[views[1]]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Raises DataError, naming the video that is broken or too short."""
        clips, label = self.source.views(i, self.spec, self.num_clips, self.background)
        views = []
        for clip in clips:
            frames = [self.scale(frame) for frame in clip]
            views += [self._crop(frames, place) for place in self.places]
        return torch.stack(views), label

    def _crop(self, frames: Sequence[Image.Image], place: float) -> Tensor:
        """``(3, T, H, W)``, centred along the shorter side."""
        height, width = self.size
        spare_y, spare_x = frames[0].height - height, frames[0].width - width
        share_y, share_x = (place, 0.5) if spare_y > spare_x else (0.5, place)
        top, left = round(spare_y * share_y), round(spare_x * share_x)  # as torchvision's CenterCrop rounds
        box = (left, top, left + width, top + height)
        return torch.stack([self.finish(frame.crop(box)) for frame in frames], 1)
