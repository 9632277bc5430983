"""Typed configs: dataclasses, strict YAML and overrides from the command line.

Imports no torch, so that ``--help`` and an error in a config answer at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from iwin_dit.config_rules import check
from iwin_dit.layers.specs import SIZES, MixerSpec
from iwin_dit.runtime.errors import ConfigError

# What a resumed run may set anew without being another run.
MAY_CHANGE = frozenset(
    (
        "output_dir",
        "data.path",
        "train.max_steps",
        "train.micro_batch",
        "train.num_workers",
        "train.gradient_checkpointing",
        "train.keep_checkpoints",
        "train.log_every_steps",
        "train.sample_every_steps",
        "train.save_every_steps",
        "sample.sampler",
        "sample.num_inference_steps",
        "sample.guidance_scale",
        "sample.guidance_interval",
        "sample.guidance_channels",
        "sample.num_per_class",
    )
)


@dataclass(frozen=True)
class DataConfig:
    """The latents to train on, or the images.

    Args:
        kind: ``latents`` are read from shards; ``images`` are encoded by the autoencoder in every step.
        path: folder of latent shards with their index.json; or of images, as ``extract_latents.py --images``.
        vae: the autoencoder of images, or of latents that do not name it: a preset, a folder, a file or a
            hub id.
        labels: for a flat folder of images, a CSV with the columns file and label.
        crop: of images: ADM's centre crop, or a random one, another one each time an image is seen.
        prepare: make the folder first where it is missing: ``digits`` are scikit-learn's handwritten digits.
        random_flip: train on mirror images too. Not for digits or text.
        normalization: ``channel`` takes mean and standard deviation from the index; ``vae`` the factor that
            the autoencoder declares, as DiT does; images have no index and need it.
    """

    kind: Literal["latents", "images"] = "latents"
    path: str = "data/digits"
    vae: str | None = None
    labels: str | None = None
    crop: Literal["center", "random"] = "center"
    prepare: Literal["digits"] | None = None
    random_flip: bool = True
    normalization: Literal["channel", "vae"] = "channel"


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        size: depth, width and heads by name, and the patch size, such as ``XL/1``. Or give the four below.
        depth: blocks.
        width: channels of a token.
        heads: attention heads; they divide the width.
        patch_size: latents per side of a token.
        sample_size: side of the latent, or [height, width].
        in_channels: channels of the latent.
        num_classes: classes of the data.
        label_dropout: share of labels that are replaced by the null label; above 0 for guidance.
        mixer: the token mixer.
        position_embedding: none (Iwin needs none), fixed sin-cos, rotary, or both.
        norm: RMS norm with a weight, or layer norm without.
        mlp: SwiGLU, or GELU.
        mlp_ratio: hidden width of the MLP over the width.
        qk_norm: normalise queries and keys.
        modulation_shift: adaLN shifts and scales; without, it only scales.
        open_gates: gates are 1 + gate, open at the start; without, adaLN-Zero.
    """

    size: str | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    patch_size: int | None = None
    sample_size: int | list[int] = 16
    in_channels: int = 32
    num_classes: int = 1000
    label_dropout: float = 0.1
    mixer: MixerSpec = field(default_factory=MixerSpec)
    position_embedding: Literal["none", "sincos", "rope", "sincos+rope"] = "none"
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    modulation_shift: bool = True
    open_gates: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Depth, width, heads and patch size, by name or by number."""
        if self.size is None:
            return self.depth, self.width, self.heads, self.patch_size
        name, _, patch_size = self.size.partition("/")
        return (*SIZES[name], int(patch_size))

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latent."""
        size = self.sample_size
        return (size[0], size[1]) if isinstance(size, list) else (size, size)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict.

    Args:
        name: ``flow_matching`` (velocity), or ``ddpm`` (noise and learned sigma).
        time_sampling: density of the times in flow matching.
        logit_mean: of the logit-normal density; above 0 favours noise.
        logit_std: of the logit-normal density.
        cosine_weight: weight of LightningDiT's cosine term.
    """

    name: Literal["flow_matching", "ddpm"] = "flow_matching"
    time_sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    cosine_weight: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Args:
        learning_rate: after the warm-up, constant.
        warmup_steps: linear warm-up.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
    """

    learning_rate: float = 2e-4
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """The run.

    Args:
        max_steps: optimiser steps; a finished run goes on when this grows.
        batch_images: images of a step, over all processes.
        micro_batch: images of one forward pass on one process; gradients accumulate. Default: all at once.
        precision: ``fp32``, or ``bf16`` (autocast; weights, EMA and optimiser stay in float32).
        ema_decay: of the averaged weights, which sampling uses.
        gradient_checkpointing: compute blocks twice to save memory.
        num_workers: processes that read data.
        log_every_steps: a line in log.jsonl.
        sample_every_steps: a grid of samples; 0 for none.
        save_every_steps: a checkpoint.
        keep_checkpoints: the newest so many stay.
    """

    max_steps: int = 400_000
    batch_images: int = 256
    micro_batch: int | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    ema_decay: float = 0.9999
    gradient_checkpointing: bool = False
    num_workers: int = 4
    log_every_steps: int = 100
    sample_every_steps: int = 5_000
    save_every_steps: int = 5_000
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class SampleConfig:
    """The grids that training draws, and the scheduler of the exported pipeline.

    Args:
        sampler: euler, heun, dpm++ or unipc for flow matching; ddim, ddpm or dpm++ for DDPM. Default: the
            first choice of the objective.
        num_inference_steps: steps of the sampler.
        guidance_scale: 1 is unguided.
        guidance_interval: times in which guidance acts; 1 is noise.
        guidance_channels: guide the first so many channels only. Default: all.
        num_per_class: images per class in a grid, for the first ten classes.
    """

    sampler: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None
    num_per_class: int = 4


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on.

    Args:
        output_dir: the run directory.
        seed: of initial weights, data order, noise, times and label drops.
        data: the latents.
        model: the network.
        objective: what it predicts.
        optimizer: AdamW.
        train: the run.
        sample: the grids.
    """

    output_dir: str = "runs/quickstart"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists, as YAML writes them."""
        return _lists(asdict(self))


def parse_arguments(arguments: Sequence[str], default: Path) -> tuple[Config, bool]:
    """The checked config, and whether ``--dry-run`` was asked for.

    Args:
        arguments: ``--config FILE``, ``--dry-run`` and overrides such as ``--train.max_steps 100``.
        default: the recipe when no ``--config`` is given.

    Raises:
        ConfigError: naming the key, what was found, what was expected and the nearest name.
    """
    parser = _parser()
    arguments = list(arguments)
    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = ["--config", str(default), *arguments]
    for file in _config_files(arguments):
        check_keys(load_yaml(file), Config, str(file))
    parsed = _parse(parser, arguments)
    dry_run = parsed.pop("dry_run")
    parsed.pop("config")
    try:
        built = parser.instantiate(parsed)
    except ValueError as error:  # a spec that contradicts itself says so when it is made
        raise ConfigError(f"model: {error}") from None
    config = Config(**{f.name: built[f.name] for f in fields(Config)})
    check(config)
    return config, dry_run


def load_config(path: Path) -> Config:
    """A checked config from a file."""
    return parse_arguments(["--config", str(path)], path)[0]


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; a key that appears twice is an error, not the last one silently."""
    try:
        with open(path) as file:
            content = yaml.load(file, _StrictLoader)
    except OSError as error:
        raise ConfigError(f"the config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected keys and values")
    return content


class _StrictLoader(yaml.SafeLoader):
    pass


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.YAMLError(
                f"the key {key.value} appears twice, again in line {key.start_mark.line + 1}"
            )
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def check_keys(content: dict[str, Any], kind: type, where: str, prefix: str = "") -> None:
    """Every key of a file must be a field of the config, at its level."""
    known = {f.name: f for f in fields(kind)}
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"{where}: {prefix}{key} is not a key; {_did_you_mean(prefix, key, known)}")
        nested = known[key].default_factory
        if isinstance(nested, type) and is_dataclass(nested):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{where}: {prefix}{key} is {value!r}, expected keys such as {_some(nested)}"
                )
            check_keys(value, nested, where, f"{prefix}{key}.")


def _did_you_mean(prefix: str, key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(known)}"


def _some(kind: type) -> str:
    return ", ".join(f.name for f in fields(kind)[:3])


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train_dit.py",
        description="Trains a class-conditional diffusion transformer. Without arguments: the quickstart.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a recipe from configs/ or your own")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take, and stop")
    parser.add_class_arguments(Config, None)
    return parser


def _config_files(arguments: list[str]) -> list[str]:
    files = [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    return files + [after for a, after in pairwise(arguments) if a == "--config"]


def _parse(parser: ArgumentParser, arguments: list[str]) -> Any:
    try:
        return parser.parse_args(arguments)
    except Exception as error:  # jsonargparse raises several kinds, all of them the user's mistake here
        message = _readable(" ".join(str(error).split()))
        if "unrecognized arguments" in message:
            unknown = next((a for a in arguments if a.startswith("--") and a in message), "")
            options = [option for action in parser._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown.partition("=")[0], options, n=1)
            message += f"; did you mean {near[0]}?" if near else "; see --help"
        raise ConfigError(message) from None


def _readable(message: str) -> str:
    """jsonargparse's type errors in the words of this project: key, found, expected."""
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    found = re.search(r"(?:Got|Given) value: (.*)$", message)
    expected = re.search(r"Subtypes: \[(.*?)\] Errors|Expected a (.*?)\. Got value", message)
    if not (key and found and expected):
        return message
    kind = re.sub(r"<class '(\w+)'>|typing\.", r"\1", expected.group(1) or expected.group(2))
    return f"{key.group(1)} is {found.group(1)!r}, expected {kind.replace(', NoneType', ' or nothing')}"


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
