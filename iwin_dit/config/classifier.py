"""The keys of a classifier's recipe, with their defaults, what they mean and how they must fit.

Imports no torch, so that ``--help`` and an error in a config answer at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from iwin_dit.config.bounds import (
    ABOVE_ZERO,
    BELOW_ONE,
    ZERO_OR_MORE,
    Free,
    Rule,
    Seed,
    Share,
    ascending,
    at_most,
    check_options,
    check_rand_augment,
    each,
)
from iwin_dit.config.common import EmaConfig, OptimizerConfig, Size, SourceConfig, TrainConfig, lists, sides
from iwin_dit.config.rules import check_common
from iwin_dit.config.schema import Config
from iwin_dit.runtime import limits
from iwin_dit.runtime.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIDEO_MODELS = ("iwin_tiny_video", "iwin_small_video")  # a test compares them with the models' own table
ALPHA = each(lambda alpha: alpha == 0 or alpha >= 1e-3, "0 or at least 0.001")
DIVISORS = each(lambda std: std >= 1e-6, "numbers above 0, which colours are divided by")
VIEWS = Rule(
    lambda n: n[0] >= 1 and n[1] in (1, 3),
    "the number of clips of a video, 1 or more, and of crops, 1 or 3; such as [4, 3]",
)


@dataclass(frozen=True)
class ClassifierDataConfig(SourceConfig):
    """Images or clips to train on, and others to be judged by.

    Args:
        prepare: make both first where they are missing: ``digits`` are scikit-learn's handwritten digits,
            ``moving_digits`` clips of them.
        held_out: as ``path``, of the same classes; what accuracy is measured on.
        held_out_labels: as ``labels``.
        held_out_split: of the held-out images, if they are Hugging Face data; by default train.
        frames: of a clip, which makes the data videos; without, they are images.
        views: of a held-out video, whose class probabilities are averaged: clips that are spread evenly over
            it, and crops of each along the longer side, 1 (the centre) or 3 (both ends too).
        image_size: height and width, or one side.
        crop_share: of the shorter side that the centre crop of a held-out image keeps.
        mean: of each colour, subtracted.
        std: of each colour, divided by.
    """

    path: Free[str] = "data/digits/train"
    held_out: Free[str] = "data/digits/test"
    held_out_labels: Free[str | None] = None
    held_out_split: Free[str | None] = None
    frames: Annotated[int | None, ABOVE_ZERO, at_most(4_096)] = None
    views: Annotated[tuple[int, int], VIEWS, at_most(1_000)] = (1, 1)
    image_size: Annotated[Size, at_most(8_192)] = 224
    crop_share: Annotated[float, each(lambda share: 0.1 <= share <= 1, "a number from 0.1 to 1")] = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: Annotated[tuple[float, float, float], DIVISORS] = IMAGENET_STD

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return sides(self.image_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Frames, where there are any, height and width."""
        return self.size if self.frames is None else (self.frames, *self.size)


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied, by timm's transforms; the defaults are the usual ones for ImageNet.

    Args:
        scale: least and greatest share of the area that a random crop takes.
        ratio: least and greatest width over height of a random crop.
        random_flip: mirror half of the images. Not for digits or text.
        color_jitter: strength; only where there is no ``rand_augment``.
        rand_augment: timm's words for RandAugment, or ``none``. Of magnitude 10, which -mmax9 keeps away,
            it would posterize to no bits at all, which Pillow refuses.
        random_erasing: share of images of which a rectangle becomes noise.
        mixup: alpha of the Beta distribution of mixup's weights; 0 for none.
        cutmix: the same for CutMix. Where both are given, half of the pairs get one and half the other.
        label_smoothing: share of the target that is spread over all classes.
    """

    scale: Annotated[tuple[float, float], ABOVE_ZERO, ascending(0, 1)] = (0.08, 1.0)
    ratio: Annotated[tuple[float, float], ascending(0.01, 100)] = (3 / 4, 4 / 3)
    random_flip: bool = True
    color_jitter: Annotated[float, ZERO_OR_MORE, at_most(10)] = 0.4
    rand_augment: str = "rand-m9-mstd0.5-inc1-mmax9"
    random_erasing: Share = 0.25
    mixup: Annotated[float, ALPHA, at_most(1e6)] = 0.8
    cutmix: Annotated[float, ALPHA, at_most(1e6)] = 1.0
    label_smoothing: Share = 0.1


@dataclass(frozen=True)
class ClassifierModelConfig:
    """The network.

    Args:
        name: any of timm's names, ``iwin_tiny_patch4_window7_224`` and the like among them; of clips,
            ``iwin_tiny_video`` or ``iwin_small_video``.
        options: what else its constructor takes, such as ``{embed_dim: 32, depths: [2, 2]}``.
        num_classes: of the data.
        drop_path: share of residual branches that are dropped (stochastic depth), rising with depth.
        init_from: weights to begin with: a classifier's run, or a file that timm or the Iwin authors wrote.
            Another number of classes gets a new head; any image size is fine for Iwin. A network of clips
            begins from one of images, too.
    """

    name: str = "iwin_tiny_patch4_window7_224"
    options: dict[str, Any] = field(default_factory=dict)
    num_classes: Annotated[int, ABOVE_ZERO, at_most(limits.LABELS)] = 1000
    drop_path: Share = 0.0
    init_from: Free[str | None] = None


@dataclass(frozen=True)
class ClassifierOptimizerConfig(OptimizerConfig):
    """The optimiser, and learning rates that differ between layers.

    Args:
        layer_decay: each layer's learning rate is this times the next one's; 1 for the same everywhere.
        backbone_lr_scale: learning rate of everything but the head, over that of the head, which
            ``learning_rate`` is.
    """

    learning_rate: Annotated[float, ABOVE_ZERO] = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    betas: Annotated[tuple[float, float], BELOW_ONE] = (0.9, 0.999)
    weight_decay: Annotated[float, ZERO_OR_MORE] = 0.05
    max_grad_norm: Annotated[float | None, ABOVE_ZERO] = 5.0
    layer_decay: Annotated[float, ABOVE_ZERO, at_most(1)] = 1.0
    backbone_lr_scale: Annotated[float, ABOVE_ZERO, at_most(1e6)] = 1.0


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything that a classifier's run depends on.

    Args:
        output_dir: the run directory.
        seed: of initial weights, data order and augmentation.
        data: the images or clips.
        augment: how they are varied.
        model: the network.
        optimizer: AdamW.
        ema: averages of the weights; the first is what accuracy is measured with.
        train: the run.
    """

    output_dir: Free[str] = "runs/classifier"
    seed: Seed = 0
    data: ClassifierDataConfig = field(default_factory=ClassifierDataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ClassifierModelConfig = field(default_factory=ClassifierModelConfig)
    optimizer: ClassifierOptimizerConfig = field(default_factory=ClassifierOptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists, as YAML writes them."""
        return lists(asdict(self))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.augment.mixup > 0 or self.augment.cutmix > 0


Recipe = Config | ClassifierConfig  # what a run is trained by


READ_WITH = (
    ("data.frame_stride data.views", "data.frames"),
    ("data.labels data.held_out_labels", "data.frames null"),  # clips have class folders
)


def check(config: ClassifierConfig) -> None:
    """All rules. Raises ConfigError."""
    check_options(config.model.options, "model.options")
    check_rand_augment(config.augment.rand_augment)
    check_common(config, READ_WITH)
    data, name = config.data, config.model.name
    if data.prepare == "moving_digits" and data.frames is None:
        raise ConfigError("data.prepare moving_digits makes clips; set data.frames 8, or take digits")
    if data.prepare == "digits" and data.frames is not None:
        raise ConfigError("data.prepare digits makes images; remove data.frames, or take moving_digits")
    if data.frames is None and name in VIDEO_MODELS:
        raise ConfigError(f"model.name {name} takes clips, the data are images; set data.frames, such as 32")
    if data.frames is not None and name not in VIDEO_MODELS:
        known = ", ".join(VIDEO_MODELS)
        raise ConfigError(f"model.name {name} takes images, data.frames makes clips; expected one of {known}")
    if config.train.sharding != "none":
        raise ConfigError("train.sharding fsdp2 is for train_dit.py; for a classifier, set none")
    if (every := config.train.gradient_checkpointing) > 1:  # timm's models know all of their blocks, or none
        raise ConfigError(f"train.gradient_checkpointing is {every}, expected 1 or 0 for a classifier")
    for key in ("batch_images", "micro_batch"):
        images = getattr(config.train, key)
        if config.mixes and isinstance(images, int) and images % 2:
            raise ConfigError(
                f"train.{key} is {images}, but mixup and CutMix join images two by two; take "
                f"{images + 1}, or set augment.mixup and augment.cutmix to 0"
            )
