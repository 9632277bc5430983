"""The rules that join several keys of a config. Each error shows the values and the fix."""

from __future__ import annotations

import math
from dataclasses import fields

from iwin_dit.config.bounds import MAX_TOKENS, check_ranges
from iwin_dit.config.metrics import chosen_metrics, looks_at_clips
from iwin_dit.config.schema import (
    Config,
    DataConfig,
    EmaConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from iwin_dit.diffusion.specs import FLOW, NUM_TRAIN_TIMESTEPS, OBJECTIVES, SAMPLERS, ObjectiveConfig
from iwin_dit.layers.blindness import blind_spots
from iwin_dit.layers.specs import BlockSpec, shape_of
from iwin_dit.runtime.colours import background
from iwin_dit.runtime.errors import ConfigError


def check(config: Config) -> None:
    """All rules. Raises ConfigError."""
    check_ranges(config)
    _check_shape(config.model)
    _check_block(config.model)
    _check_sampling(config)
    _check_data(config.data)
    _check_clips(config)
    _check_objective(config.objective)
    check_optimizer(config.optimizer)
    check_ema(config.ema)
    check_train(config.train, config.ema)
    asked = config.evaluation
    names = chosen_metrics(asked.extractor, asked.metrics, asked.inception_weights, prefix="evaluation.")
    draws_clips, of_clips = config.model.sample_frames is not None, looks_at_clips(asked.extractor)
    if of_clips and not draws_clips:
        raise ConfigError("evaluation.extractor i3d compares clips, which this model does not draw")
    if draws_clips and not of_clips and config.train.evaluate_every_steps:
        raise ConfigError(
            f"evaluation.extractor {asked.extractor} compares images, this model draws clips: give i3d:FILE, "
            "or set train.evaluate_every_steps 0"
        )
    if config.train.evaluate_every_steps and config.evaluation.reference is None and names != ["is"]:
        raise ConfigError(
            f"train.evaluate_every_steps is {config.train.evaluate_every_steps}, but evaluation.reference is "
            "not set: give a folder of real images, or an .npz of them or of their statistics"
        )


def _check_objective(objective: ObjectiveConfig) -> None:
    given = [f.name for f in fields(objective)[1:] if getattr(objective, f.name) != f.default]
    if unread := [key for key in given if key not in objective.kind.fields]:
        others = " or ".join(name for name, kind in OBJECTIVES.items() if unread[0] in kind.fields)
        raise ConfigError(
            f"objective.{unread[0]} has no meaning for {objective.name}; remove it, or take {others}"
        )
    of_density = [key for key in given if key.startswith("logit_")]
    if objective.time_sampling == "uniform" and of_density:
        raise ConfigError(
            f"objective.{of_density[0]} has no meaning for time_sampling uniform; remove it, or take "
            "logit_normal"
        )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """The rules of ``optimizer`` that all trainers have."""
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(
            f"optimizer.betas is {list(optimizer.betas)}, expected two numbers in [0, 1), such as [0.9, 0.95]"
        )
    if optimizer.min_learning_rate and optimizer.schedule == "constant":
        raise ConfigError(
            f"optimizer.min_learning_rate is {optimizer.min_learning_rate}, to which a constant learning "
            "rate never comes down; remove it, or set optimizer.schedule cosine"
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise ConfigError(
            f"optimizer.min_learning_rate {optimizer.min_learning_rate} is above optimizer.learning_rate "
            f"{optimizer.learning_rate}, from which the cosine comes down; lower it"
        )


def check_train(train: TrainConfig, ema: EmaConfig) -> None:
    """The rules of ``train`` that all trainers have."""
    if train.micro_batch == "auto" and train.sharding != "none":
        raise ConfigError(
            "train.micro_batch auto tries sizes on each process by itself, which a model that is split over "
            "the processes cannot; give a number"
        )
    if ema.on_cpu and train.sharding != "none":
        raise ConfigError(
            "ema.on_cpu and train.sharding fsdp2 exclude each other: split over the processes, the averages "
            "are small; set ema.on_cpu false"
        )
    if train.spike_factor is not None and train.spike_factor <= 1:
        raise ConfigError(f"train.spike_factor is {train.spike_factor}, expected above 1, such as 3")
    if train.spike_factor is not None and train.save_every_steps % train.log_every_steps:
        raise ConfigError(
            f"train.save_every_steps {train.save_every_steps} is no multiple of train.log_every_steps "
            f"{train.log_every_steps}, whose losses train.spike_factor looks at: it would go back to "
            "a checkpoint whose loss nothing has looked at; take one"
        )
    most = train.max_skipped_steps
    if train.on_nonfinite == "stop" and most != TrainConfig().max_skipped_steps:
        raise ConfigError(
            f"train.max_skipped_steps is {most}, but train.on_nonfinite stop skips none; set skip, or remove "
            "max_skipped_steps"
        )
    if train.health_every_steps % train.log_every_steps:
        raise ConfigError(
            f"train.health_every_steps {train.health_every_steps} is no multiple of "
            f"train.log_every_steps {train.log_every_steps}, in whose lines it is written; take one"
        )


OF_IMAGES = (
    *((key, None) for key in ("labels", "split", "image_column", "label_column")),
    *(
        ("follow_links", False),
        ("allow_odd_classes", False),
        ("crop", "center"),
        ("background", "white"),
        ("max_bad_images", 0),
    ),
)


def _check_data(data: DataConfig) -> None:
    background(data.background)
    if data.kind == "latents":
        for key, default in OF_IMAGES:
            if getattr(data, key) != default:
                raise ConfigError(f"data.{key} is for images; set data.kind images, or remove it")
        return
    if data.vae is None:
        raise ConfigError(
            "data.kind is images, but nothing encodes them: set data.vae, such as sd-vae-ft-ema"
        )
    if data.normalization != "vae":
        raise ConfigError(
            "data.kind is images, which have no index with means: set data.normalization vae, the scaling "
            f"that the autoencoder declares (found {data.normalization})"
        )
    if data.prepare is not None:
        raise ConfigError(f"data.prepare {data.prepare} makes latents; for images, set data.prepare null")


def _check_clips(config: Config) -> None:
    """Keys that only clips have, and what clips do not have."""
    data, model = config.data, config.model
    if model.sample_frames is None:
        for key, default in (("frame_stride", 1), ("images", None), ("image_share", 0.0)):
            if getattr(data, key) != default:
                raise ConfigError(f"data.{key} is for clips; set model.sample_frames, or remove it")
        if model.position_embedding == "time":
            raise ConfigError("model.position_embedding time is for clips; set model.sample_frames, or none")
        if data.prepare == "moving_digits":
            raise ConfigError(
                "data.prepare moving_digits makes clips; set model.sample_frames, or take digits"
            )
        return
    if "rope" in model.position_embedding:
        raise ConfigError(
            f"model.position_embedding {model.position_embedding} turns by row and column, which clips have "
            "not alone; take none, time or sincos"
        )
    if data.frame_stride != 1 and data.kind == "latents":
        raise ConfigError(
            f"data.frame_stride is {data.frame_stride}, but the clips of latents were taken by "
            "extract_latents.py --frame-stride; remove it, or set data.kind images"
        )
    if (data.images is None) != (data.image_share == 0):
        raise ConfigError(
            f"data.images is {data.images} and data.image_share {data.image_share:g}: set both to mix images "
            "in, such as a share of 0.2, or neither"
        )


MAX_POWER_STD = 12**-0.5  # of a flat average


def check_ema(ema: EmaConfig) -> None:
    """The averages: ranges, and no number twice."""
    if not ema.decays:
        raise ConfigError("ema.decays is empty; the first is what sampling uses, such as [0.9999]")
    for key, low, high in (("decays", 0.0, 1.0), ("power_stds", 0.0, MAX_POWER_STD)):
        values = getattr(ema, key)
        for value in values:
            if not (low <= value < high) or (key == "power_stds" and value == 0):
                raise ConfigError(f"ema.{key} holds {value}, expected numbers in [{low:g}, {high:.3g})")
        if len(set(values)) < len(values):
            raise ConfigError(f"ema.{key} {values} holds a number twice; remove one")
    if ema.snapshot_every_steps and not ema.power_stds:
        raise ConfigError(
            "ema.snapshot_every_steps keeps power-function averages, but ema.power_stds is empty; "
            "set it to [0.05, 0.1], or snapshot_every_steps to 0"
        )


def _check_block(model: ModelConfig) -> None:
    _, width, heads, _ = model.shape
    try:
        BlockSpec(width=width, heads=heads, mixer=model.mixer, qk_norm=model.qk_norm)
        model.mixer.check_rank(model.grid)
        model.mixer.window(model.grid)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    _check_blindness(model)
    if "sincos" in model.position_embedding and width % 4:
        raise ConfigError(f"sin-cos positions need a model.width that 4 divides, found {width}")
    if "rope" in model.position_embedding and width // heads % 4:
        raise ConfigError(f"rotary positions need heads of a width that 4 divides, found {width} / {heads}")


def _check_blindness(model: ModelConfig) -> None:
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
    if sample.guidance_scale != 1 and config.model.label_dropout == 0:
        raise ConfigError(
            f"sample.guidance_scale is {sample.guidance_scale}, but model.label_dropout is 0: without label "
            "dropout there is no null label; set guidance_scale 1 or label_dropout 0.1"
        )
    if sample.sampler not in (None, *samplers):
        raise ConfigError(
            f"sample.sampler {sample.sampler} does not fit objective {config.objective.name}; "
            f"expected one of {', '.join(samplers)}"
        )
    is_continuous = config.objective.kind.prediction_type == FLOW
    if not is_continuous and sample.num_inference_steps > NUM_TRAIN_TIMESTEPS:
        raise ConfigError(
            f"sample.num_inference_steps is {sample.num_inference_steps}, but {config.objective.name} has "
            f"{NUM_TRAIN_TIMESTEPS} times; take at most so many"
        )
    low, high = sample.guidance_interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"sample.guidance_interval is [{low}, {high}], expected 0 <= low <= high <= 1")


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
    if isinstance(model.sample_size, list) and len(model.sample_size) != 2:
        raise ConfigError(f"model.sample_size is {model.sample_size}, expected a side or [height, width]")
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
