"""Where a classifier's data come from: images or clips, varied for training, as they are for judging."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from timm.data import create_transform
from torchvision.transforms import Compose

from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.data import digits, moving_digits
from iwin_dit.data.labelled import HeldOutClips, Labelled, LabelledClips, LabelledExamples, LabelledImages
from iwin_dit.data.sources import ClipFolderSource, Source, classes_begun, open_images
from iwin_dit.data.video import ClipSpec
from iwin_dit.runtime.colours import background
from iwin_dit.runtime.errors import DataError

PREPARE = {
    "digits": partial(digits.write_images, seed=0),
    "moving_digits": partial(moving_digits.write_clips, seed=0),
}


class LabelledData(NamedTuple):
    """The data of a classifier: to train on, varied, and to be judged by, not."""

    train: Labelled
    held_out: Labelled

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the data the same to a run that is resumed."""
        return self.train.identity


def open_data(config: ClassifierConfig, accelerator: Accelerator) -> LabelledData:
    """Images or clips to train on, varied, and held-out ones, not; made first where the config says how.

    Raises:
        DataError: where they are missing, or their classes are not the model's.
    """
    data = config.data
    if data.prepare and accelerator.is_main_process and not Path(data.held_out).is_dir():
        PREPARE[data.prepare](Path(data.held_out).parent)
    accelerator.wait_for_everyone()
    varied, plain = _transforms(config)
    train: Any = open_training(config)
    # Held-out data may lack a class; their class folders are in the order of those to train on.
    options = replace(data, labels=data.held_out_labels, split=data.held_out_split, allow_odd_classes=True)
    held_out: Any = open_images(data.held_out, options, data.frames is not None, train.class_names)
    _check_classes(config, train.class_names, held_out.class_names)
    ground = background(data.background)
    if data.frames is None:
        return LabelledData(LabelledImages(train, varied, ground), LabelledImages(held_out, plain, ground))
    spec = ClipSpec(data.frames, data.frame_stride)
    judged = HeldOutClips(held_out, plain, ground, spec, data.views)
    return LabelledData(LabelledClips(train, varied, ground, spec), judged)


def open_training(config: ClassifierConfig) -> Source | ClipFolderSource:
    """Where the images or clips to train on come from.

    Raises:
        DataError: where they are missing.
    """
    begun = classes_begun(Path(config.output_dir) / "data.json", "classes")
    return open_images(config.data.path, config.data, config.data.frames is not None, begun)


def build_examples(config: ClassifierConfig, images: Labelled) -> LabelledExamples:
    """What training sees at each position."""
    return LabelledExamples(images, config.seed, config.augment.mixup, config.augment.cutmix)


def _transforms(config: ClassifierConfig) -> tuple[Compose, Compose]:
    """timm's, of an image: for training, and for held-out ones."""
    data, augment = config.data, config.augment
    common: dict[str, Any] = dict(
        input_size=(3, *data.size), interpolation="bicubic", mean=data.mean, std=data.std
    )
    varied = create_transform(
        **common,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=0.5 if augment.random_flip else 0.0,
        color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # timm takes None, unlike its types
        auto_augment=None if augment.rand_augment == "none" else augment.rand_augment,
        re_prob=augment.random_erasing,
        re_mode="pixel",
    )
    return varied, create_transform(**common, crop_pct=data.crop_share)


def _check_classes(config: ClassifierConfig, names: list[str], others: list[str]) -> None:
    """Of the data to train on, and of the held-out ones."""
    data = config.data
    if names != others:
        odd = sorted(set(names) ^ set(others))[:5]
        raise DataError(
            f"{data.path} has {len(names)} classes and {data.held_out} has {len(others)}, which are not the "
            f"same (such as {', '.join(odd)}); give both the same class folders"
        )
    if len(names) != config.model.num_classes:
        raise DataError(
            f"{data.path} has {len(names)} classes, the config's model.num_classes is "
            f"{config.model.num_classes}; set it to {len(names)}"
        )
