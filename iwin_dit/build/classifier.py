"""What train_classifier.py trains, and on what: a classifier of images or clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import save
from timm.data import create_transform
from timm.models._hub import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import Compose

from iwin_dit.build.classifier_network import (
    build_classifier,
    head_names,
    model_options,
    multiply_adds,
    without_content,
)
from iwin_dit.build.data import PREPARE_IMAGES, open_training
from iwin_dit.build.pipeline import show
from iwin_dit.build.trainer import reading
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.data.labelled import HeldOutClips, Labelled, LabelledClips, LabelledExamples, LabelledImages
from iwin_dit.data.sources import open_images
from iwin_dit.data.video import ClipSpec
from iwin_dit.pipelines.lettering import draw_predictions
from iwin_dit.runtime import files, scratch
from iwin_dit.runtime.colours import background
from iwin_dit.runtime.errors import ConfigError, DataError
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.run import has_begun
from iwin_dit.runtime.signals import StopRequest
from iwin_dit.training.attention import any_attention
from iwin_dit.training.classification import class_scores, classification_loss
from iwin_dit.training.optimizer import Groups
from iwin_dit.training.state import Run, State

MAX_SHOWN = 40  # predictions in a picture


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
        PREPARE_IMAGES[data.prepare](Path(data.held_out).parent)
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


class Classifier:
    """The task of train_classifier.py, see :class:`~iwin_dit.training.state.Task`.

    Raises:
        UserError: where the weights it begins with are not to be had, or the network does not take the data.
    """

    def __init__(self, config: ClassifierConfig, accelerator: Accelerator, data: LabelledData):
        self.config, self.held_out = config, data.held_out
        # a run that goes on has its own weights, and does not need those that it began with any more
        model: Any = build_classifier(config, begins=not has_begun(config.output_dir))
        if config.train.gradient_checkpointing:
            try:
                model.set_grad_checkpointing(True)
            except AssertionError:  # so timm says it
                raise ConfigError(
                    f"train.gradient_checkpointing is {config.train.gradient_checkpointing}, but model.name "
                    f"{config.model.name} does not support it; set 0"
                ) from None
        self.model: nn.Module = model
        self.examples = build_examples(config, data.train)
        self.flops_per_image = 6 * multiply_adds(without_content(config), config)
        self.in_pairs = config.mixes
        own = range(accelerator.process_index, len(data.held_out), accelerator.num_processes)
        self.loader = held_out_loader(config, Subset(data.held_out, own), accelerator)

    def begin_step(self, state: State, step: int) -> None:
        """All steps are alike."""

    def parameter_groups(self) -> Groups:
        """Layer by layer, see :func:`parameter_groups`."""
        return parameter_groups(self.model, self.config)

    def loss(
        self, model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, mixing: Tensor
    ) -> Tensor:
        """Cross-entropy of each image or clip, ``(B,)``."""
        config = self.config
        classes, smoothing = config.model.num_classes, config.augment.label_smoothing
        return classification_loss(model, images, labels, mixing, classes, smoothing, config.mixes)

    def random_batch(self, images: int) -> Sequence[Tensor]:
        """Random pixels of the first class."""
        pixels = torch.randn(images, 3, *self.config.data.shape)
        return pixels, torch.zeros(images, dtype=torch.long), torch.ones(images, 4)

    @any_attention
    @torch.no_grad()
    def preview(self, run: Run, ema: dict[str, Tensor], step: int, stop: StopRequest) -> None:
        """Writes ``samples/step-00001000.png``: held-out images, classified; of a video, its middle frame."""
        if stop:
            return
        device, data, images = run.accelerator.device, self.config.data, self.held_out
        model = build_classifier(self.config, begins=False)
        model.load_state_dict(ema)
        model.eval().to(device)
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        shown, labels, predictions = [], [], []
        for i in torch.linspace(0, len(images) - 1, min(MAX_SHOWN, len(images))).round().long().tolist():
            pixels, label = images[i]
            scores = class_scores(model, pixels[None].to(device))
            if pixels.ndim == 5:  # (V, 3, T, H, W)
                view = pixels[len(pixels) // 2]
                pixels = view[:, view.shape[1] // 2]
            shown.append(((pixels * std + mean).clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())
            labels.append(label)
            predictions.append(int(scores.argmax()))
        show(run, "held-out", draw_predictions(shown, labels, predictions, images.source.class_names), step)

    @torch.no_grad()
    def evaluate(self, run: Run, step: int, stop: StopRequest) -> Mapping[str, float] | None:
        """Top-1 and top-5 accuracy of the EMA on all held-out images, in percent.

        Of a video, it is the mean of its views' probabilities that counts. At step 0 only of weights that
        come from elsewhere.
        """
        if step == 0 and self.config.model.init_from is None:
            return {}
        accelerator, model = run.accelerator, run.state.emas["ema"].to(run.accelerator.device)
        found = torch.zeros(4, device=accelerator.device)  # top-1, top-5, images, stopped
        for pixels, labels in progress(
            self.loader, desc="held-out", unit="batch", leave=False, disable=not accelerator.is_main_process
        ):
            if stop:
                found[3] = 1
                break
            with accelerator.autocast():
                scores = class_scores(model, pixels.to(accelerator.device))
            best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None].to(accelerator.device)
            found[:2] += torch.stack([best[:, 0].sum(), best.sum()])
            found[2] += len(labels)
        if self.config.ema.on_cpu:
            model.cpu()
        top_1, top_5, count, stopped = accelerator.reduce(found, "sum").tolist()
        if stopped:
            return None
        return {"top1": round(100 * top_1 / count, 3), "top5": round(100 * top_5 / count, 3)}

    def finish(self, run: Run, ema: dict[str, Tensor], step: int) -> str:
        """Writes the EMA for timm, or of a model of clips its weights."""
        is_of_clips = self.config.data.frames is not None
        exported = export_clips(self.config, run) if is_of_clips else export_timm(self.config, run)
        found = [record for record in run.files.read_log() if "top1" in record]
        accuracy = f", top-1 {found[-1]['top1']} %, top-5 {found[-1]['top5']} %" if found else ""
        kind = "weights" if is_of_clips else "for timm"
        return f"{accuracy}; curves in {run.files.path}/loss.png, {kind} in {exported}"


def parameter_groups(model: nn.Module, config: ClassifierConfig) -> Groups:
    """The parameters layer by layer, without decay where the model says so."""
    said = getattr(model, "no_weight_decay", None)
    unchanged = said() if callable(said) else ()
    options = config.optimizer
    found = param_groups_layer_decay(model, options.weight_decay, unchanged, layer_decay=options.layer_decay)
    found = [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} for group in found]
    if (scale := options.backbone_lr_scale) == 1:
        return found
    head = {id(p) for name, p in model.named_parameters() if name.startswith(head_names(model))}
    split = []
    for group in found:
        for is_head in (False, True):
            if chosen := [p for p in group["params"] if (id(p) in head) == is_head]:
                rate = group["lr_scale"] * (1 if is_head else scale)
                split.append(group | {"params": chosen, "lr_scale": rate})
    return split


def held_out_loader(config: ClassifierConfig, images: Dataset, accelerator: Accelerator) -> DataLoader:
    """Batches of held-out images, in order; views of a video count as so many."""
    clips, crops = config.data.views
    batch = max(1, min(config.train.batch_images, 256) // (clips * crops))
    return DataLoader(images, batch_size=batch, **reading(config.train, accelerator))


def export_clips(config: ClassifierConfig, run: Run) -> Path:
    """``RUN/model.safetensors``; ``RUN/model.json`` with the constructor's arguments, classes and clips."""
    data = config.data
    settings = {
        "arguments": {"num_classes": config.model.num_classes, **model_options(config)},
        "class_names": run.files.data["classes"],
        "frame_stride": data.frame_stride,
        "crop_share": data.crop_share,
        "mean": data.mean,
        "std": data.std,
    }
    path = run.files.path / "model.safetensors"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in run.state.emas["ema"].state_dict().items()}
    files.replace(path.with_suffix(".json"), files.to_json(settings))
    files.replace(path, save(tensors))
    return path


def export_timm(config: ClassifierConfig, run: Run) -> Path:
    """``RUN/timm``, for ``timm.create_model("local-dir:RUN/timm")`` after ``import iwin_dit.models``."""
    model, data, folder = run.state.emas["ema"], config.data, run.files.path / "timm"
    preprocessing = {
        "input_size": (3, *data.size),
        "mean": data.mean,
        "std": data.std,
        "crop_pct": data.crop_share,
        "interpolation": "bicubic",
    }
    settings = {"pretrained_cfg": preprocessing, "label_names": run.files.data["classes"]}
    with scratch.replacement(folder) as new:
        save_for_hf(model, str(new), settings, model_options(config), safe_serialization=True)
    return folder
