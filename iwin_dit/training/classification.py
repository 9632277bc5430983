"""The loss of a classifier, with images mixed two by two: mixup and CutMix as one formula; and its scores.

Legend: B images or clips of T frames, V views of a video, K classes; w is the weight of an image's own
pixels, 1 - w that of its partner's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def mix_weights(mixing: Tensor, size: tuple[int, int]) -> Tensor:
    """w of each pixel: ``(B, 1, H, W)``.

    Mixup (Zhang et al. 2018): the same everywhere. CutMix (Yun et al. 2019): 0 in a rectangle that takes the
    share 1 - lambda of the image, cut off at its border, and 1 elsewhere.

    Args:
        mixing: ``(B, 4)``: lambda, whether it is CutMix, and the rectangle's centre, 0 to 1 on both axes.
        size: H and W.
    """
    share, is_cut, *center = mixing.unbind(1)
    inside = torch.ones(len(mixing), *size, dtype=torch.bool, device=mixing.device)
    for axis, side in enumerate(size):
        middle = (center[axis] * side).floor()
        reach = ((1 - share).sqrt() * side).floor() // 2
        places = torch.arange(side, device=mixing.device)
        near = (places >= (middle - reach)[:, None]) & (places < (middle + reach)[:, None])  # (B, side)
        inside &= near.unsqueeze(2 - axis)
    pasted = 1 - inside.float()
    return torch.where(is_cut.bool()[:, None, None], pasted, share[:, None, None])[:, None]


def mix(images: Tensor, labels: Tensor, mixing: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images 2k and 2k + 1 are mixed into each other: images as they came, targets ``(B, K)``.

    Args:
        images: ``(B, 3, H, W)``, B even, or clips ``(B, 3, T, H, W)``, whose frames are mixed alike.
        labels: ``(B,)``.
        mixing: ``(B, 4)``, see :func:`mix_weights`; the same for both images of a pair.
    """
    weights = mix_weights(mixing, (images.shape[-2], images.shape[-1]))
    targets = F.one_hot(labels, num_classes).float()
    share = weights.mean((1, 2, 3))[:, None]
    if images.ndim == 5:
        weights = weights.unsqueeze(2)
    mixed = images * weights + _partners(images) * (1 - weights)
    return mixed, targets * share + _partners(targets) * (1 - share)


def _partners(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def classification_loss(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    mixing: Tensor,
    num_classes: int,
    label_smoothing: float,
    mixes: bool,
) -> Tensor:
    """Cross-entropy of each image: ``(B,)``.

    Args:
        model: from images to logits ``(B, K)``.
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016).
        mixes: whether ``mixing`` is used.
    """
    targets = F.one_hot(labels, num_classes).float()
    if mixes:
        images, targets = mix(images, labels, mixing, num_classes)
    targets = targets * (1 - label_smoothing) + label_smoothing / num_classes
    return -(targets * model(images).float().log_softmax(-1)).sum(-1)


def class_scores(model: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """What ranks the classes, ``(B, K)``: logits of images, mean probabilities over the views of videos.

    Args:
        model: from images or clips to logits.
        pixels: ``(B, 3, H, W)``, or views ``(B, V, 3, T, H, W)``.
    """
    if pixels.ndim == 4:
        return model(pixels)
    logits = model(pixels.flatten(0, 1)).float()
    return logits.softmax(-1).unflatten(0, pixels.shape[:2]).mean(1)
