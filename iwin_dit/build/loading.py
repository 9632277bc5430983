"""Where a run, a folder or a name on the hub becomes a model or a pipeline that samples."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from huggingface_hub import snapshot_download
from torch import nn

from iwin_dit.build.data import build_dataset
from iwin_dit.build.network import begin_with, build_model
from iwin_dit.build.pipeline import build_pipeline, model_of
from iwin_dit.config.parse import load_run, sampling_in
from iwin_dit.config.schema import Config, SampleConfig
from iwin_dit.data.codec import vae_statistics, weights_sha256
from iwin_dit.data.examples import Data
from iwin_dit.diffusion.sampling import (
    make_scheduler,
    prediction_type,
    set_timesteps,
    with_schedule_of,
    with_shift,
)
from iwin_dit.models.official_names import inflate
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.trust import check_index, check_model_folder, check_pipeline_folder
from iwin_dit.runtime import checkpoint, files, limits
from iwin_dit.runtime.errors import CheckpointError, ConfigError, expand_home, listed, reason
from iwin_dit.runtime.run import TIMES, changed_data, has_begun, number_of, read_config
from iwin_dit.training.ema import decay_rules, reconstruct


def newest_run(root: Path = Path("runs")) -> Path:
    """The run of a generator that was begun last, among those with weights.

    Runs are numbered as they begin: clocks of several machines differ, and a copy has another time.

    Raises:
        CheckpointError: where there is none, or where several have one number, as copies do.
    """
    numbers = {}
    for run in (path.parent for path in root.glob("*/config.yaml")):
        if [*checkpoint.step_directories(run / "checkpoints"), *run.glob("pipeline/recipe.json")]:
            numbers[run] = number_of(run)
    for number in sorted(set(numbers.values()), reverse=True):
        runs = sorted(run for run in numbers if numbers[run] == number)
        runs = [run for run in runs if "objective" in read_config(run)]  # a classifier has none
        if len(runs) > 1:
            names = listed(list(map(str, runs)))
            raise CheckpointError(f"which run was begun last is not known: {names}; give --checkpoint")
        if runs:
            return runs[0]
    raise CheckpointError(
        f"there is no run in {root}/; train one (accelerate launch train_dit.py) or give --checkpoint"
    )


def load_pipeline(
    source: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    ema_std: float | None = None,
    ema: float | str | None = None,
) -> ClassConditionalPipeline:
    """A pipeline of images or clips from a run, a folder or the hub, ready to sample without its own bar.

    A run is sampled from the first EMA of its newest checkpoint: from the exported pipeline where that is as
    new.

    Args:
        ema_std: of a run, the average of that relative standard deviation, reconstructed from its snapshots.
        ema: of a run, the average of that decay, one of ``ema.decays``; ``"none"`` is the weights themselves.

    Raises:
        CheckpointError: where the source does not exist, is damaged or is not ours.
        ConfigError: where the device is not there, or the run has no such average.
    """
    source = expand_home(source)
    path = Path(source)
    disable_progress_bar()  # of loading: seconds at most
    if (path / "config.yaml").is_file():
        pipeline = _load_run(path, ema_std, ema)
    elif ema_std is not None or ema is not None:
        option = "--ema" if ema_std is None else "--ema-std"
        raise CheckpointError(f"{source} is no run; {option} takes one, such as a folder below runs/")
    elif path.exists():
        pipeline = _from_folder(path)
    elif source.count("/") == 1 and not source.startswith((".", "/", "runs/")):
        check_index(_fetch(source, "model_index.json"))  # before the weights of what is not ours are fetched
        pipeline = _from_folder(_fetch(source, "*.json", "*.safetensors"))
    else:
        raise CheckpointError(
            f"{source} does not exist; expected a run, a pipeline folder, or a hub id such as user/model"
        )
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it computes shapes alone")
        pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device {device} cannot be used: {reason(error)}") from None
    if dtype != torch.float32:
        pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampling_of(source: str) -> SampleConfig:
    """How a run, a pipeline's folder or one of the hub draws by itself: as the recipe of its training says.

    A pipeline that was not exported by a run, such as an imported one, takes the defaults of a recipe.

    Raises:
        CheckpointError: where the recipe beside a pipeline cannot be read, or asks for what cannot be.
    """
    path = Path(expand_home(source))
    if (path / "config.yaml").is_file():
        return load_run(path).sample
    recipe = (path if path.exists() else _fetch(source, "recipe.json")) / "recipe.json"
    if not recipe.is_file():
        return SampleConfig()
    try:
        return sampling_in(files.read_json(recipe, limits.INDEX_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{recipe} does not say how its pipeline draws: {reason(error)}") from error


def load_transformer(source: str) -> IwinDiTTransformer2DModel:
    """The network of a run, a pipeline or the hub; or of a folder that holds it alone, as imports write it.

    Raises:
        CheckpointError: as :func:`load_pipeline`.
    """
    path = Path(expand_home(source))
    if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
        return check_model_folder(path).from_pretrained(path, use_safetensors=True)
    return load_pipeline(source).transformer


def load_guide(source: str, pipeline: ClassConditionalPipeline) -> IwinDiTTransformer2DModel:
    """The transformer of a run, a folder or the hub as the guide of autoguidance, where the pipeline's is.

    Raises:
        CheckpointError: as :func:`load_pipeline`.
        ConfigError: where its latents are not those of the pipeline.
    """
    model = pipeline.transformer
    other = load_pipeline(source, model.device, model.dtype)
    pairs = {
        "autoencoder": (weights_sha256(other.vae), weights_sha256(pipeline.vae)),
        "mean of the latents": (other.config.latents_mean, pipeline.config.latents_mean),
        "scale of the latents": (other.config.latents_std, pipeline.config.latents_std),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise ConfigError(
                f"--guide {source} has another {name} than the model; take one of the same latents"
            )
    return other.transformer


def choose_sampler(pipeline: ClassConditionalPipeline, name: str | None, shift: float | None = None) -> None:
    """Gives the pipeline the scheduler of this name, of its model's objective; None keeps the one it has.

    The noise schedule stays the pipeline's, but for a shift of its times that is given.

    Raises:
        ConfigError: with the names of those that fit, or where one cannot have the schedule or the shift.
    """
    try:
        if name is not None:
            trained_for = pipeline.transformer.config.prediction_type or prediction_type(pipeline.scheduler)
            scheduler = make_scheduler(trained_for, name)
            pipeline.scheduler = with_schedule_of(scheduler, pipeline.scheduler)
    except ValueError as error:
        raise ConfigError(f"--sampler: {error}") from None
    try:
        if shift is not None:
            pipeline.scheduler = with_shift(pipeline.scheduler, shift)
    except ValueError as error:
        raise ConfigError(f"--shift: {error}") from None


def compile_models(*models: nn.Module | None) -> None:
    """Compiles each network in place, once for each size of a batch; images stay the same, to rounding.

    With guidance in a part of the steps and a last batch that is smaller, these are four sizes.
    """
    for model in models:
        if model is not None:
            model.compile(dynamic=False)


def _from_folder(folder: Path) -> ClassConditionalPipeline:
    kind = check_pipeline_folder(folder)
    try:
        pipeline = kind.from_pretrained(folder, use_safetensors=True)
        # settings of diffusers' classes that nobody checks before they are used
        times = [float(t) for steps in (1, 2) for t in set_timesteps(pipeline.scheduler, steps, "cpu")]
        scaling = [value for values in vae_statistics(pipeline.vae) for value in values]
        for name, numbers in (("its scheduler's timesteps", times), ("its autoencoder's scaling", scaling)):
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"{name} are not finite numbers: {numbers!r:.100}")
    except Exception as error:  # whatever a stranger's values lead diffusers to
        raise CheckpointError(f"{folder} is a damaged pipeline: {reason(error)}") from error
    return pipeline


def _fetch(name: str, *patterns: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a pipeline on the hub: {reason(error)}"
        ) from error


def _load_run(run: Path, ema_std: float | None, ema: float | str | None) -> ClassConditionalPipeline:
    if "objective" not in read_config(run):
        raise CheckpointError(
            f"{run} is the run of a classifier, which does not draw; take one of train_dit.py"
        )
    if ema_std is not None and ema is not None:
        raise ConfigError("--ema and --ema-std choose one average each; give one of them")
    if ema_std is not None:
        config = load_run(run)
        weights = reconstruct(run / "snapshots", ema_std)
        return build_pipeline(config, model_of(config, weights), _data_of(run, config))
    newest = checkpoint.newest(run / "checkpoints")
    exported = run / "pipeline" / "recipe.json"
    group = "ema" if ema is None else _group_of(run, ema)
    if (
        group == "ema"
        and exported.is_file()
        and (newest is None or _step_of_export(exported) >= checkpoint.step_of(newest))
    ):
        return _from_folder(run / "pipeline")
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet; the first comes after train.save_every_steps")
    config = load_run(run)
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    weights = checkpoint.read_tensors(newest, group, like=expected, any_precision=True, beside="projector.")
    return build_pipeline(config, model_of(config, weights), _data_of(run, config))


def _group_of(run: Path, ema: float | str) -> str:
    """The file of a checkpoint with the average of this decay; ``none`` names the weights themselves."""
    if ema == "none":
        return "model"
    decays = load_run(run).ema.decays
    groups = dict(zip(decays, decay_rules(decays, ()), strict=True))
    try:
        return groups[float(ema)]
    except (ValueError, KeyError):
        has = ", ".join(map(repr, decays))
        raise ConfigError(
            f"--ema is {ema}, but {run} keeps the averages of the decays {has}; take one of them, none for "
            "the weights themselves, or --ema-std for another width from its snapshots"
        ) from None


def _step_of_export(recipe: Path) -> int:
    try:
        return int(files.read_json(recipe, limits.INDEX_BYTES)["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{recipe} does not say the step of its pipeline: {reason(error)}; remove {recipe.parent}, and "
            "its run is sampled from its newest checkpoint"
        ) from error


def _data_of(run: Path, config: Config) -> Data:
    """The data that the run was trained on: names, normalisation and autoencoder. Nothing is made anew.

    Raises:
        CheckpointError: where it has changed since.
        DataError: where it is missing.
    """
    # the run may have moved since, and names the order of its classes
    dataset = build_dataset(replace(config, data=replace(config.data, prepare=None), output_dir=str(run)))
    changed = changed_data(run, json.loads(files.to_json(dataset.identity)))
    changed.pop(TIMES, None)
    if changed:
        raise CheckpointError(
            f"{run} was trained on other data than {config.data.path} is now "
            f"({next(iter(changed.values()))}); restore it, or sample an exported pipeline"
        )
    return dataset


def build_denoiser(config: Config) -> IwinDiTTransformer2DModel:
    """The network as it is trained: with the weights it begins with, and gradient checkpointing.

    A run that goes on has its own weights, and does not need those that it began with any more.

    Raises:
        CheckpointError: where ``model.init_from`` is not there, or of another network.
    """
    model = build_model(config)
    if config.model.init_from is not None and not has_begun(config.output_dir):
        begin_from(model, config.model.init_from)
    if every := config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        model.checkpoint_every = every
    return model


def begin_from(model: IwinDiTTransformer2DModel, source: str) -> None:
    """Copies the weights of a run, a pipeline or an imported model into a model; images' serve clips, too.

    The label embeddings of another number of classes stay as they are drawn.

    Raises:
        CheckpointError: where they are not there, or of another network.
    """
    tensors = inflate(load_transformer(source).state_dict(), model.state_dict())
    if odd := begin_with(model, tensors, redrawn=("label_embedding.",)):
        raise CheckpointError(
            f"model.init_from {source} is another network than the config's: {listed(odd)} differ; "
            "take its sizes, patch size, channels and kinds of norm, MLP and modulation, and where its "
            "blocks have no convolution set model.mixer.convolution false, with a model.position_embedding"
        )
