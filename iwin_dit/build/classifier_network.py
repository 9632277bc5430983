"""Where a classifier's recipe, or its run, becomes a network."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iwin_dit.build.network import begin_with
from iwin_dit.config.bounds import check_options
from iwin_dit.config.classifier import ClassifierConfig
from iwin_dit.config.parse import load_config
from iwin_dit.convert.official_files import find_tensors, load_official
from iwin_dit.data.codec import weights_sha256
from iwin_dit.data.sources import classes_begun
from iwin_dit.models.backbone import IwinTransformer, IwinTransformer3D, checkpoint_filter_fn
from iwin_dit.models.iwin_transformer import VIDEO_MODELS
from iwin_dit.models.official_names import inflate, unwrap
from iwin_dit.runtime import checkpoint
from iwin_dit.runtime.errors import CheckpointError, ConfigError, DataError, listed
from iwin_dit.runtime.run import read_config
from iwin_dit.runtime.seeds import derive_seed


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


def build_classifier(config: ClassifierConfig, begins: bool = True) -> nn.Module:
    """The network, its weights drawn from the config's seed or read from ``model.init_from``.

    Args:
        begins: with False, ``model.init_from`` is left alone: the weights come from elsewhere.

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
    if begins and config.model.init_from is not None:
        begin_classifier(model, config.model.init_from)
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


def begin_classifier(model: nn.Module, source: str) -> None:
    """Copies weights of a run or a file into a model; a head of other classes stays as it is drawn.

    A larger image may give the last stage convolutions that the smaller one had no use for: zeros at first.
    A model of clips takes those of images as well, see :func:`iwin_dit.models.official_names.inflate`.

    Raises:
        CheckpointError: where they are not there, or not of this network.
    """
    path = Path(source)
    if (path / "config.yaml").is_file():
        _, stored = read_run(source)
        if isinstance(model, IwinTransformer3D) and isinstance(stored, IwinTransformer):
            heads, wanted = _heads(stored), _heads(model)
            if heads != wanted:  # which shapes do not tell
                raise CheckpointError(f"{source} has {heads} heads, the model {wanted}; set its num_heads")
        tensors = stored.state_dict()
    elif path.is_file():
        try:
            tensors = unwrap(find_tensors(load_official(path), others={}))  # our own names, too
        except (DataError, ValueError) as error:
            raise CheckpointError(f"model.init_from {path}: {error}") from None
        tensors = checkpoint_filter_fn(tensors, model) if isinstance(model, IwinTransformer) else tensors
    else:
        raise CheckpointError(f"model.init_from {source} is neither a classifier's run nor a file")
    if isinstance(model, IwinTransformer3D):
        tensors = inflate(tensors, model.state_dict())
    if odd := begin_with(model, tensors, redrawn=head_names(model), may_lack=".convolution."):
        raise CheckpointError(
            f"{source} holds the weights of another network than {type(model).__name__} of model.options: "
            f"{listed(odd)} are missing, unknown or of another shape"
        )


def _heads(model: IwinTransformer) -> list[int]:
    stages: Any = model.layers
    return [stage.blocks[0].mixer.attention.heads for stage in stages]


def head_names(model: nn.Module) -> tuple[str, ...]:
    """With what the names of the head's tensors begin."""
    known = getattr(model, "default_cfg", None) or {"classifier": "head.fc"}  # timm's know it themselves
    return tuple(known["classifier"].split())


def without_content(config: ClassifierConfig) -> nn.Module:
    """The network on the meta device, to count what it has and does."""
    with torch.device("meta"):
        return build_classifier(config, begins=False).eval()


def multiply_adds(model: nn.Module, config: ClassifierConfig) -> int:
    """Multiply-adds of one forward pass of one image or clip, counted operation by operation.

    Args:
        model: of :func:`without_content`.

    Raises:
        ConfigError: where the network does not take such images, or does not return a number for each class.
    """
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


def load_classifier(run: str) -> LoadedClassifier:
    """The EMA of a run's newest checkpoint, and what it was made for.

    Raises:
        CheckpointError: where there is no run of a classifier of images, or no checkpoint.
    """
    config, model = read_run(run)
    data = config.data
    if data.frames is not None:
        raise CheckpointError(f"{run} is the run of a classifier of clips; expected one of images")
    path, count = Path(run) / "data.json", config.model.num_classes
    names = classes_begun(path, "classes")
    if names is None or len(names) != count:
        raise CheckpointError(
            f"{path} does not say what the classes of its run are: expected {count} names; restore it"
        )
    return LoadedClassifier(model, data.size, data.mean, data.std, names, weights_sha256(model))


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
    model = build_classifier(config, begins=False)
    model.load_state_dict(checkpoint.read_tensors(newest, "ema", like=model.state_dict()))
    return config, model.eval().requires_grad_(False)
