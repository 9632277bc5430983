"""Where a classifier's recipe becomes objects: what :mod:`iwin_dit.build.trainer` is to the generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from accelerate import Accelerator
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from iwin_dit.build.labelled import HeldOutData
from iwin_dit.build.trainer import leave_group
from iwin_dit.config.bounds import check_options
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.config.parse import load_config
from iwin_dit.convert import load_official
from iwin_dit.convert.names import find_tensors
from iwin_dit.data.codec import weights_sha256
from iwin_dit.models.backbone import IwinTransformer, checkpoint_filter_fn
from iwin_dit.models.backbone_3d import IwinTransformer3D
from iwin_dit.models.inflation import inflate
from iwin_dit.models.official_names import WRAPPERS, unwrap
from iwin_dit.models.video_models import VIDEO_MODELS
from iwin_dit.pipelines.lettering import draw_predictions
from iwin_dit.runtime import checkpoint, files, limits
from iwin_dit.runtime.errors import CheckpointError, ConfigError, DataError, reason
from iwin_dit.runtime.progress import progress
from iwin_dit.runtime.run import RunDirectory, has_begun, read_config
from iwin_dit.runtime.seeds import derive_seed
from iwin_dit.training.attention import any_attention
from iwin_dit.training.classification import class_scores, classification_loss
from iwin_dit.training.state import State

MAX_SHOWN = 40  # predictions in a picture


class LoadedClassifier(NamedTuple):
    """A trained classifier and what it was made for.

    model: with timm's ``forward_features`` and ``forward_head``; image_size: (H, W); mean, std: of each
        colour; class_names: in the order of the logits; sha256: of the weights.
    """

    model: nn.Module
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: list[str]
    sha256: str


def build_model(config: ClassifierConfig) -> nn.Module:
    """The network, its weights drawn from the config's seed or read from ``model.init_from``.

    Raises:
        ConfigError: where timm does not know it, or not its options.
        CheckpointError: where the weights are not there, or not of this network.
    """
    name, is_of_clips = config.model.name, config.data.frames is not None
    if not is_of_clips and not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ConfigError(f"model.name {name} is not one of timm's; such as {', '.join(near) or 'iwin_tiny'}")
    try:
        options = model_options(config)
    except RuntimeError as error:  # timm's, of a tag after the name's dot
        raise ConfigError(f"model.name {name}: {error}") from None
    create = IwinTransformer3D if is_of_clips else partial(timm.create_model, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        try:
            model = create(num_classes=config.model.num_classes, **options)
        except Exception as error:  # whatever options lead another library's constructor to
            raise ConfigError(f"model.options {options} do not make a {name}: {error!s:.300}") from None
    if config.model.init_from is not None:
        begin_from(model, config.model.init_from)
    return model


def model_options(config: ClassifierConfig) -> dict[str, Any]:
    """What the constructor takes beside the number of classes; it may be a stranger's, and loads nothing."""
    name, options = config.model.name, dict(config.model.options)
    check_options(options, "model.options")
    if config.data.frames is not None:
        options = VIDEO_MODELS[name] | {"img_size": list(config.data.shape)} | options
    else:
        known = timm.get_pretrained_cfg(name)
        if name.startswith("iwin") or (known and known.fixed_input_size):
            options.setdefault("img_size", list(config.data.size))
    if config.model.drop_path:
        options.setdefault("drop_path_rate", config.model.drop_path)
    return options


def begin_from(model: nn.Module, source: str) -> None:
    """Copies weights of a run or a file into a model; a head of other classes stays as it is drawn.

    A larger image may give the last stage convolutions that the smaller one had no use for: zeros at first.
    A model of clips takes those of images as well, see :func:`iwin_dit.models.inflation.inflate`.

    Raises:
        CheckpointError: where they are not there, or not of this network.
    """
    tensors, own = _stored_weights(model, source), model.state_dict()
    if isinstance(model, IwinTransformer3D):
        tensors = inflate(tensors, own)
    head = head_names(model)
    fitting = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.startswith(head) and name in own and own[name].shape != tensor.shape)
    }
    missing = [name for name in own if name not in fitting and ".convolution." not in name]
    missing = [name for name in missing if not name.startswith(head)]
    odd = [name for name in fitting if name not in own or own[name].shape != fitting[name].shape]
    if missing or odd:
        raise CheckpointError(
            f"{source} holds the weights of another network than {type(model).__name__} of model.options: "
            f"missing {missing[:3]}, unknown or of another shape {odd[:3]}"
        )
    model.load_state_dict(fitting, strict=False)


def _stored_weights(model: nn.Module, source: str) -> dict[str, Tensor]:
    path = Path(source)
    if (path / "config.yaml").is_file():
        _, stored = read_run(source)
        if isinstance(model, IwinTransformer3D) and isinstance(stored, IwinTransformer):
            heads, wanted = _heads(stored), _heads(model)
            if heads != wanted:  # which shapes do not tell
                raise CheckpointError(f"{source} has {heads} heads, the model {wanted}; set its num_heads")
        return stored.state_dict()
    if not path.is_file():
        raise CheckpointError(f"model.init_from {source} is neither a classifier's run nor a file")
    try:
        tensors = unwrap(find_tensors(load_official(path), WRAPPERS, others={}))  # our own names, too
    except (DataError, ValueError) as error:
        raise CheckpointError(f"model.init_from {path}: {error}") from None
    return checkpoint_filter_fn(tensors, model) if isinstance(model, IwinTransformer) else tensors


def _heads(model: IwinTransformer) -> list[int]:
    return [stage.blocks[0].mixer.attention.heads for stage in model.layers]


def head_names(model: nn.Module) -> tuple[str, ...]:
    """With what the names of the head's tensors begin."""
    known = getattr(model, "default_cfg", None) or {"classifier": "head.fc"}  # timm's know it themselves
    return tuple(known["classifier"].split())


def build_trained(config: ClassifierConfig) -> nn.Module:
    """The network as it is trained: :func:`build_model` with gradient checkpointing where asked for.

    A run that goes on has its own weights, and does not need those that it began with any more.

    Raises:
        ConfigError: where the network cannot do that.
    """
    model = build_model(without_init(config) if has_begun(config.output_dir) else config)
    if config.train.gradient_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except AssertionError:  # so timm says it
            raise ConfigError(
                f"train.gradient_checkpointing is {config.train.gradient_checkpointing}, but model.name "
                f"{config.model.name} does not support it; set 0"
            ) from None
    return model


def parameter_groups(config: ClassifierConfig) -> Callable[[nn.Module, float], list[dict[str, Any]]]:
    """``groups(model, weight_decay)``: layer by layer, without decay where the model says so."""

    def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        unchanged = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        found = param_groups_layer_decay(
            model, weight_decay, unchanged, layer_decay=config.optimizer.layer_decay
        )
        found = [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} for group in found]
        scale = config.optimizer.backbone_lr_scale
        return found if scale == 1 else _scale_backbone(found, model, scale)

    return groups


def _scale_backbone(groups: list[dict[str, Any]], model: nn.Module, scale: float) -> list[dict[str, Any]]:
    """The groups, each split into what belongs to the head and the rest, whose learning rate is scaled."""
    head = {id(p) for name, p in model.named_parameters() if name.startswith(head_names(model))}
    split = []
    for group in groups:
        for is_head in (False, True):
            chosen = [p for p in group["params"] if (id(p) in head) == is_head]
            if chosen:
                rate = group["lr_scale"] * (1 if is_head else scale)
                split.append(group | {"params": chosen, "lr_scale": rate})
    return split


def build_loss(config: ClassifierConfig) -> tuple[Callable[..., Tensor], Callable[[int], Sequence[Tensor]]]:
    """The loss of a batch of the loader, and a maker of such batches of random numbers."""
    loss = partial(
        classification_loss,
        num_classes=config.model.num_classes,
        label_smoothing=config.augment.label_smoothing,
        mixes=config.mixes,
    )

    def batch(images: int) -> Sequence[Tensor]:
        pixels = torch.randn(images, 3, *config.data.shape)
        return pixels, torch.zeros(images, dtype=torch.long), torch.ones(images, 4)

    return loss, batch


def without_content(config: ClassifierConfig) -> nn.Module:
    """The network on the meta device, to count what it has and does."""
    with torch.device("meta"):
        return build_model(without_init(config)).eval()


def multiply_adds(config: ClassifierConfig) -> int:
    """Multiply-adds of one forward pass of one image or clip, counted operation by operation.

    Raises:
        ConfigError: where the network does not take such images, or does not return a number for each class.
    """
    model = without_content(config)
    pixels = torch.empty(1, 3, *config.data.shape, device="meta")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            scores = model(pixels)
    except Exception as error:  # whatever a size leads another library's network to
        raise ConfigError(
            f"model.name {config.model.name} with model.options {config.model.options} does not take "
            f"{' x '.join(map(str, pixels.shape[1:]))} numbers (data.image_size): {error!s:.300}"
        ) from None
    if not isinstance(scores, Tensor) or scores.shape != (1, config.model.num_classes):
        raise ConfigError(
            f"model.options {config.model.options} make a network that does not return a number for each of "
            f"the {config.model.num_classes} classes of model.num_classes; remove what makes it so"
        )
    return counter.get_total_flops() // 2


def build_evaluation(
    config: ClassifierConfig, images: HeldOutData, state: State, accelerator: Accelerator
) -> Callable[[int, Any], dict[str, float] | None]:
    """``evaluate(step, stop)``: top-1 and top-5 accuracy of the EMA on all held-out images, in percent.

    Of a video, it is the mean of its views' probabilities that counts. At step 0 only of weights that come
    from elsewhere.
    """
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader = held_out_loader(config, Subset(images, own), accelerator)

    @torch.no_grad()
    def evaluate(step: int, stop: Any) -> dict[str, float] | None:
        if step == 0 and config.model.init_from is None:
            return {}
        model = state.emas["ema"].to(accelerator.device)
        found = torch.zeros(4, device=accelerator.device)  # top-1, top-5, images, stopped
        for pixels, labels in progress(
            loader, desc="held-out", unit="batch", leave=False, disable=not accelerator.is_main_process
        ):
            if stop:
                found[3] = 1
                break
            with accelerator.autocast():
                scores = class_scores(model, pixels.to(accelerator.device))
            best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None].to(accelerator.device)
            found[:2] += torch.stack([best[:, 0].sum(), best.sum()])
            found[2] += len(labels)
        if config.ema.on_cpu:
            model.cpu()
        top_1, top_5, count, stopped = accelerator.reduce(found, "sum").tolist()
        if stopped:
            return None
        return {"top1": round(100 * top_1 / count, 3), "top5": round(100 * top_5 / count, 3)}

    return evaluate


def held_out_loader(config: ClassifierConfig, images: Any, accelerator: Accelerator) -> DataLoader:
    """Batches of held-out images, in order; views of a video count as so many."""
    clips, crops = config.data.views
    return DataLoader(
        images,
        batch_size=max(1, min(config.train.batch_images, 256) // (clips * crops)),
        num_workers=config.train.num_workers,
        timeout=config.train.worker_timeout_seconds if config.train.num_workers else 0,
        worker_init_fn=leave_group,
        pin_memory=accelerator.device.type == "cuda",
    )


def build_preview(
    config: ClassifierConfig, images: HeldOutData, run: RunDirectory | None, accelerator: Accelerator
) -> Callable[[dict[str, Tensor], int, Any], None]:
    """``preview(ema, step, stop)`` writes ``samples/step-00001000.png``: held-out images, classified.

    Of a video, it shows the middle frame of the middle view.
    """
    chosen = torch.linspace(0, len(images) - 1, min(MAX_SHOWN, len(images))).round().long().tolist()
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))

    @any_attention
    @torch.no_grad()
    def preview(ema: dict[str, Tensor], step: int, stop: Any) -> None:
        if stop:
            return
        model = build_model(without_init(config))
        model.load_state_dict(ema)
        model.eval().to(accelerator.device)
        shown, labels, predictions = [], [], []
        for i in chosen:
            pixels, label = images[i]
            scores = class_scores(model, pixels[None].to(accelerator.device))
            if pixels.ndim == 5:  # (V, 3, T, H, W)
                view = pixels[len(pixels) // 2]
                pixels = view[:, view.shape[1] // 2]
            shown.append(((pixels * std + mean).clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())
            labels.append(label)
            predictions.append(int(scores.argmax()))
        picture = draw_predictions(shown, labels, predictions, images.source.class_names)
        picture.save(run.samples / f"step-{step:08d}.png")
        for tracker in accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"held-out": np.asarray(picture)[None]}, step=step, **options)

    return preview


def load_classifier(run: str) -> LoadedClassifier:
    """The EMA of a run's newest checkpoint, and what it was made for.

    Raises:
        CheckpointError: where there is no run of a classifier of images, or no checkpoint.
    """
    config, model = read_run(run)
    data = config.data
    if data.frames is not None:
        raise CheckpointError(f"{run} is the run of a classifier of clips; expected one of images")
    names = _class_names(Path(run) / "data.json", config.model.num_classes)
    return LoadedClassifier(model, data.size, data.mean, data.std, names, weights_sha256(model))


def _class_names(path: Path, count: int) -> list[str]:
    try:
        content = files.read_json(path, limits.INDEX_BYTES)
        names = content["classes"]
        if not (isinstance(names, list) and len(names) == count and all(isinstance(n, str) for n in names)):
            raise ValueError(f"its classes are not the names of {count}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say what the classes of its run are: {reason(error)}; restore it"
        ) from None
    return names


def read_run(run: str) -> tuple[ClassifierConfig, nn.Module]:
    """The config of a classifier's run, and the EMA of its newest checkpoint.

    Raises:
        CheckpointError: where there is no classifier's run, or no checkpoint.
    """
    path = Path(run)
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"{run} is no run; train one (accelerate launch train_classifier.py)")
    if "objective" in read_config(path):
        raise CheckpointError(f"{run} is the run of a generator, not of a classifier")
    newest = checkpoint.newest(path / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet; the first comes after train.save_every_steps")
    config = load_config(path / "config.yaml", ClassifierConfig)
    model = build_model(without_init(config))
    model.load_state_dict(checkpoint.read_tensors(newest, "ema", like=model.state_dict()))
    return config, model.eval().requires_grad_(False)


def without_init(config: ClassifierConfig) -> ClassifierConfig:
    """The config without ``model.init_from``, for weights that come from elsewhere."""
    return replace(config, model=replace(config.model, init_from=None))
