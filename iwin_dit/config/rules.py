"""The rules that join several keys of a config. Each error shows the values and the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import fields
from operator import attrgetter
from pathlib import PurePath
from typing import Any

from iwin_dit.config.bounds import MAX_TOKENS, check_ranges
from iwin_dit.config.common import TrainConfig, lists
from iwin_dit.config.metrics import chosen_metrics, looks_at_clips
from iwin_dit.config.schema import Config, DataConfig, ModelConfig
from iwin_dit.config.types import show
from iwin_dit.diffusion.specs import FLOW, NUM_TRAIN_TIMESTEPS, OBJECTIVES, SAMPLERS, ObjectiveConfig
from iwin_dit.layers.blindness import blind_spots
from iwin_dit.layers.specs import BlockSpec, middle_of, shape_of
from iwin_dit.runtime.colours import background
from iwin_dit.runtime.errors import ConfigError

# Keys that are read under a condition alone, another key or its value; without it they keep their defaults.
COMMON = (
    ("optimizer.min_learning_rate", "optimizer.schedule cosine or linear"),
    ("train.max_skipped_steps", "train.on_nonfinite skip"),
    ("ema.snapshot_every_steps", "ema.power_stds"),
)
READ_WITH = (
    ("alignment.student_block alignment.teacher_block alignment.weight", "alignment.teacher"),
    ("alignment.projector alignment.stop_step alignment.spatial_norm", "alignment.teacher"),
    ("alignment.time_gap", "alignment.teacher self"),
    ("objective.base_weight sample.internal_guidance", "model.base_block"),
    ("model.middle_dropout model.dense_from_step sample.path_drop", "model.dense_blocks"),
    ("objective.logit_mean objective.logit_std", "objective.time_sampling logit_normal"),
    ("data.labels data.split data.image_column data.label_column data.follow_links", "data.kind images"),
    ("data.allow_odd_classes data.crop data.background data.max_bad_images", "data.kind images"),
    ("data.frame_stride data.images data.image_share", "model.sample_frames"),
    ("data.frame_stride", "data.kind images"),  # the clips of latents were taken by extract_latents.py
)


def check(config: Config) -> None:
    """All rules. Raises ConfigError."""
    taken_by = {
        f.name: " or ".join(name for name, kind in OBJECTIVES.items() if f.name in kind.fields)
        for f in fields(ObjectiveConfig)[1:]
    }
    of_objectives = [(f"objective.{key}", f"objective.name {names}") for key, names in taken_by.items()]
    check_common(config, [*of_objectives, *READ_WITH])
    _check_shape(config.model)
    _check_block(config.model)
    _check_sampling(config)
    _check_alignment(config)
    _check_data(config.data, config.model)
    asked = config.evaluation
    names = chosen_metrics(asked.extractor, asked.metrics, asked.inception_weights, prefix="evaluation.")
    draws_clips, of_clips = config.model.sample_frames is not None, looks_at_clips(asked.extractor)
    if of_clips and not draws_clips:
        raise ConfigError("evaluation.extractor i3d compares clips, which this model does not draw")
    if draws_clips and not of_clips and config.train.evaluate_every_steps:
        raise ConfigError(
            f"evaluation.extractor {asked.extractor} compares images, this model draws clips: give i3d:FILE"
        )
    if config.train.evaluate_every_steps and config.evaluation.reference is None and names != ["is"]:
        raise ConfigError(
            f"train.evaluate_every_steps is {config.train.evaluate_every_steps}, but evaluation.reference is "
            "not set: give a folder of real images, or an .npz of them or of their statistics"
        )


def check_common(config: Any, read_with: Iterable[tuple[str, str]]) -> None:
    """The rules that all trainers have.

    Args:
        read_with: this trainer's keys that are not read everywhere, and their conditions, as in COMMON.
    """
    check_ranges(config)
    for keys, condition in (*COMMON, *read_with):
        name, _, wanted = condition.partition(" ")
        found = attrgetter(name)(config)
        if (show(found).strip("'") in wanted.split(" or ")) if wanted else found:
            continue
        for key in keys.split():
            value, default = (attrgetter(key)(recipe) for recipe in (config, type(config)()))
            if value != default:
                found = show(lists(value))
                raise ConfigError(
                    f"{key} is {found}, but is not read without {condition}; set that, or remove it"
                )
    background(config.data.background)
    optimizer, ema, train = config.optimizer, config.ema, config.train
    low, high = optimizer.min_learning_rate, optimizer.learning_rate
    if low > high:
        raise ConfigError(
            f"optimizer.min_learning_rate {low} is above optimizer.learning_rate {high}; lower it"
        )
    if train.micro_batch == "auto" and train.sharding != "none":
        raise ConfigError("train.micro_batch auto cannot try sizes with train.sharding fsdp2; give a number")
    if ema.on_cpu and train.sharding != "none":
        raise ConfigError("ema.on_cpu and train.sharding fsdp2 exclude each other; set ema.on_cpu false")
    for key in ("health_every_steps", *(() if train.spike_factor is None else ("save_every_steps",))):
        if (steps := getattr(train, key)) % train.log_every_steps:  # whose lines say it, or look at the loss
            raise ConfigError(
                f"train.{key} {steps} is no multiple of train.log_every_steps {train.log_every_steps}"
            )


def _check_data(data: DataConfig, model: ModelConfig) -> None:
    """Images need an autoencoder and its scaling; clips have other positions and other digits."""
    if data.kind == "images" and data.vae is None:
        raise ConfigError(
            "data.kind is images, but nothing encodes them: set data.vae, as sd-vae-ft-ema, or none for the "
            "pixels themselves"
        )
    if data.kind == "images" and data.normalization != "vae":
        raise ConfigError(
            f"data.normalization {data.normalization} is for latents; set data.normalization vae"
        )
    if data.kind == "images" and data.prepare is not None and PurePath(data.path).name != "train":
        raise ConfigError(
            f"data.prepare {data.prepare} makes images in a folder train; set data.path {data.path}/train, "
            "or data.prepare null"
        )
    if data.prepare == "digits" and model.sample_frames is not None:
        raise ConfigError(
            "data.prepare digits makes images; remove model.sample_frames, or take moving_digits"
        )
    if data.prepare == "moving_digits" and model.sample_frames is None:
        raise ConfigError("data.prepare moving_digits makes clips; set model.sample_frames, or take digits")
    positions = f"model.position_embedding {model.position_embedding}"
    if model.position_embedding == "time" and model.sample_frames is None:
        raise ConfigError(f"{positions} is for clips; set model.sample_frames, or none")
    if "rope" in model.position_embedding and model.sample_frames is not None:
        raise ConfigError(f"{positions} turns by row and column alone; for clips, take none, time or sincos")
    if (data.images is None) != (data.image_share == 0):
        found = f"data.images is {data.images} and data.image_share {data.image_share:g}"
        raise ConfigError(f"{found}: set both to mix images in, such as a share of 0.2, or neither")


def _check_alignment(config: Config) -> None:
    options, depth = config.alignment, config.model.shape[0]
    if options.teacher is None:
        return
    teacher = f"alignment.teacher {options.teacher}"
    if config.model.dense_blocks is not None:  # the teacher has all tokens
        raise ConfigError(f"{teacher} and model.dense_blocks exclude each other; remove one of them")
    if not re.fullmatch("self|efficientnet-lite0|(iwin|timm|features):.+", options.teacher):
        raise ConfigError(
            f"{teacher} is not known; expected self, iwin:RUN, timm:NAME, efficientnet-lite0 or "
            "features:FOLDER"
        )
    for key, block in zip(("student_block", "teacher_block"), options.blocks(depth), strict=True):
        if block > depth and (key == "student_block" or options.teacher == "self"):
            raise ConfigError(
                f"alignment.{key} {block} is more than the {depth} blocks of the model; take fewer"
            )
    if options.teacher_weights is not None and not options.teacher.startswith(("timm", "eff")):
        raise ConfigError(f"alignment.teacher_weights is of no use with {teacher}; remove it")
    if options.sees_images and (config.data.kind != "images" or config.model.sample_frames is not None):
        raise ConfigError(f"{teacher} sees images, not latents or clips: set data.kind images, or self")
    if options.features and (config.data.kind != "latents" or config.model.sample_frames is not None):
        raise ConfigError(f"{teacher} are of images whose latents are read: set data.kind latents, no clips")
    if options.features and options.teacher_block is not None:
        raise ConfigError(f"alignment.teacher_block is of no use with {teacher}, which are there; remove it")
    if options.teacher == "self" and config.ema.on_cpu:
        raise ConfigError("alignment.teacher self asks the average in each step; set ema.on_cpu false")


def _check_block(model: ModelConfig) -> None:
    depth, width, heads, _ = model.shape
    try:
        middle_of(depth, model.dense_blocks, model.base_block)
        BlockSpec(
            width=width,
            heads=heads,
            mixer=model.mixer,
            qk_norm=model.qk_norm,
            value_residual=model.value_residual,
        )
        model.mixer.check_rank(model.grid)
        model.mixer.window(model.grid)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    if "sincos" in model.position_embedding and width % 4:
        raise ConfigError(f"sin-cos positions need a model.width that 4 divides, found {width}")
    if "rope" in model.position_embedding and width // heads % 4:
        raise ConfigError(f"rotary positions need heads of a width that 4 divides, found {width} / {heads}")
    if model.dense_blocks is not None and all(side % 2 for side in model.grid):
        grid = " x ".join(map(str, model.grid))
        raise ConfigError(
            f"model.dense_blocks thins tokens out along even sides, {grid} tokens have none; remove it"
        )
    mixer, positions = model.resolved_mixer, model.position_embedding
    spots = blind_spots(mixer, model.grid, positions, model.shape[0])
    if not spots or model.allow_blind:
        return
    keeps_none = mixer.reads("convolution") and not mixer.convolution
    missing = [f"model.position_embedding {'time' if spots.unordered == ['frames'] else 'sincos'}"]
    missing = (missing if spots.unordered else []) + (["model.mixer.window_size all"] if spots.apart else [])
    fix = ("remove model.mixer.convolution false, or " if keeps_none else "") + f"set {' and '.join(missing)}"
    raise ConfigError(
        f"on {' x '.join(map(str, model.grid))} tokens the model is blind: {spots} (mixer {mixer.name}, "
        f"window_size {mixer.window_size}, position_embedding {positions}); {fix}; for an ablation set "
        "model.allow_blind true"
    )


def _check_sampling(config: Config) -> None:
    sample, samplers = config.sample, SAMPLERS[config.objective.kind.prediction_type]
    objective = config.objective.name
    if sample.guidance_scale != 1 and config.model.label_dropout == 0:
        raise ConfigError(
            f"sample.guidance_scale is {sample.guidance_scale}, but model.label_dropout is 0: without label "
            "dropout there is no null label; set guidance_scale 1 or label_dropout 0.1"
        )
    if sample.sampler not in (None, *samplers):
        expected = f"expected one of {', '.join(samplers)}"
        raise ConfigError(f"sample.sampler {sample.sampler} does not fit objective {objective}; {expected}")
    is_flow = config.objective.kind.prediction_type == FLOW
    if not is_flow and (sample.shift is not None or sample.guidance == "cfg_zero_star"):
        key = f"shift {sample.shift}" if sample.shift is not None else "guidance cfg_zero_star"
        raise ConfigError(
            f"sample.{key} is for flow matching, objective {objective} has other times; remove it"
        )
    most = math.inf if is_flow else NUM_TRAIN_TIMESTEPS
    if (steps := sample.num_inference_steps) > most:
        raise ConfigError(f"sample.num_inference_steps is {steps}, but {objective} has {most} times")


def _check_shape(model: ModelConfig) -> None:
    numbers = {name: getattr(model, name) for name in ("depth", "width", "heads", "patch_size")}
    if model.size is None:
        missing = [name for name, value in numbers.items() if value is None]
        if missing:
            raise ConfigError(
                f"model: give size (such as B/1), or depth, width, heads and patch_size; missing {missing}"
            )
    else:
        given = [name for name, value in numbers.items() if value is not None]
        if given:
            raise ConfigError(
                f"model.size {model.size} and model.{given[0]} are both given; remove one of them"
            )
        try:
            shape_of(model.size)
        except ValueError as error:
            raise ConfigError(f"model.size: {error}") from None
    patch = model.shape[3]
    for length in model.latent_size[-2:]:
        if length % patch:
            lower = max(length // patch, 1) * patch
            raise ConfigError(
                f"model.patch_size {patch} does not divide model.sample_size {length}; "
                f"nearest sizes that fit: {lower}, {lower + patch}"
            )
    if math.prod(model.grid) > MAX_TOKENS:
        raise ConfigError(
            f"model.sample_size makes {' x '.join(map(str, model.grid))} tokens of patch_size {patch}, "
            f"expected at most {MAX_TOKENS:,} together"
        )


def local_batch(train: TrainConfig, num_processes: int) -> tuple[int, int]:
    """Images per process and per micro-batch; ``auto`` counts as all at once.

    Raises:
        ConfigError: where processes or micro-batches do not divide the batch, with the numbers.
    """
    local, rest = divmod(train.batch_images, num_processes)
    if rest:
        raise ConfigError(
            f"train.batch_images {train.batch_images} is not divisible by {num_processes} processes; "
            f"nearest that is: {max(local, 1) * num_processes} or {(local + 1) * num_processes}"
        )
    micro_batch = train.micro_batch if isinstance(train.micro_batch, int) else local
    if local % micro_batch:
        raise ConfigError(
            f"train.micro_batch {micro_batch} does not divide the {local} images of a process "
            f"(train.batch_images {train.batch_images} / {num_processes} processes)"
        )
    return local, micro_batch
