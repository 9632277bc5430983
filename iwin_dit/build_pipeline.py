"""Where a run, a folder or a name on the hub becomes a pipeline that samples."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils.logging import disable_progress_bar
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from iwin_dit.build import any_attention, build_model, build_objective
from iwin_dit.build_data import build_dataset, load_autoencoder
from iwin_dit.config import Config, load_config
from iwin_dit.data.codec import weights_sha256
from iwin_dit.data.examples import Data
from iwin_dit.data.video import write_gif
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.diffusion.sampling import prediction_type
from iwin_dit.models.inflation import inflate
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.base import ClassConditionalPipeline
from iwin_dit.pipelines.image import IwinDiTPipeline
from iwin_dit.pipelines.sampling import FPS, draw_animation, draw_grid, sample_classes
from iwin_dit.pipelines.trust import check_index, check_pipeline_folder
from iwin_dit.pipelines.video import IwinDiTVideoPipeline
from iwin_dit.runtime import checkpoint, files, limits
from iwin_dit.runtime.errors import CheckpointError, ConfigError, DataError, expand_home, reason
from iwin_dit.runtime.run import RunDirectory, read_config
from iwin_dit.training.posthoc import reconstruct

OBJECTIVES = {kind.prediction_type: kind() for kind in (FlowMatching, DDPM)}


def build_pipeline(config: Config, model: nn.Module, dataset: Data) -> ClassConditionalPipeline:
    """The pipeline that samples this model: the VAE of its data, the scheduler of its objective."""
    kind = IwinDiTPipeline if config.model.sample_frames is None else IwinDiTVideoPipeline
    return kind(
        transformer=model,
        vae=load_autoencoder(dataset.vae_path).to(next(model.parameters()).device),
        scheduler=build_objective(config).scheduler(config.sample.sampler),
        id2label=dict(enumerate(dataset.class_names)),
        latents_mean=dataset.mean,
        latents_std=dataset.std,
    )


def build_denoiser(config: Config) -> IwinDiTTransformer2DModel:
    """The network as it is trained: with the weights it begins with, and gradient checkpointing.

    Raises:
        CheckpointError: where ``model.init_from`` is not there, or of another network.
    """
    model = build_model(config)
    if config.model.init_from is not None:
        begin_from(model, config.model.init_from)
    if every := config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        model.checkpoint_every = every
    return model


def begin_from(model: IwinDiTTransformer2DModel, source: str) -> None:
    """Copies the weights of a run or pipeline into a model; those of images serve clips, too.

    The label embeddings of another number of classes stay as they are drawn.

    Raises:
        CheckpointError: where they are not there, or of another network.
    """
    tensors = inflate(load_pipeline(source).transformer.state_dict(), model.state_dict())
    own, labels = model.state_dict(), "label_embedding.weight"
    if tensors[labels].shape[0] != own[labels].shape[0]:
        tensors[labels] = own[labels]
    odd = sorted(
        name
        for name in {*own, *tensors}
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if odd:
        raise CheckpointError(
            f"model.init_from {source} is another network than the config's: "
            f"{checkpoint.listed(odd)} differ; take its sizes, patch size, channels and kinds of norm, MLP "
            "and modulation, and where its blocks have no convolution set model.mixer.convolution false"
        )
    model.load_state_dict(tensors)


def model_of(config: Config, tensors: dict[str, Tensor]) -> IwinDiTTransformer2DModel:
    """The network with these very tensors as its weights."""
    with torch.device("meta"):
        model = build_model(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def build_preview(
    config: Config, dataset: Data, run: RunDirectory | None, accelerator: Accelerator
) -> Callable[[dict[str, Tensor], int, Any], None]:
    """``preview(ema, step, stop)`` writes ``samples/step-00001000.png``, and gives it to the trackers.

    The first ten classes with fixed seeds, clips as film strips and GIF; nothing is written once ``stop`` is
    true.
    """

    @any_attention
    def preview(ema: dict[str, Tensor], step: int, stop: Any) -> None:
        weights = {name: tensor.to(accelerator.device) for name, tensor in ema.items()}
        pipeline = build_pipeline(config, model_of(config, weights), dataset)
        pipeline.set_progress_bar_config(disable=True)
        labels = range(min(10, config.model.num_classes))
        samples = []
        drawn = sample_classes(
            pipeline,
            labels,
            config.sample.num_per_class,
            config.seed,
            batch_size=40,
            **sampling_options(config),
        )
        try:
            for sample in drawn:
                if stop:
                    return
                samples.append(sample)
        except DataError as error:  # not finite; training goes on, and says itself where it diverges
            warnings.warn(f"no samples of step {step}: {error}", stacklevel=1)
            return
        grid = draw_grid(samples, pipeline.id2label)
        path = run.samples / f"step-{step:08d}.png"
        grid.save(path)
        if config.model.sample_frames:
            write_gif(draw_animation(samples, pipeline.id2label), path.with_suffix(".gif"), FPS)
        for tracker in accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **options)

    return preview


def sampling_options(config: Config) -> dict[str, Any]:
    """The pipeline's arguments that the config fixes."""
    sample = config.sample
    return dict(
        num_inference_steps=sample.num_inference_steps,
        guidance_scale=sample.guidance_scale,
        guidance_interval=sample.guidance_interval,
        guidance_channels=sample.guidance_channels,
    )


def newest_run(root: Path = Path("runs")) -> Path:
    """The run that wrote a checkpoint last.

    Raises:
        CheckpointError: where there is none.
    """
    when = {}
    for run in (path.parent for path in root.glob("*/config.yaml")):
        weights = [*checkpoint.step_directories(run / "checkpoints"), *run.glob("pipeline/recipe.json")]
        if weights:
            when[run] = max(path.stat().st_mtime for path in weights)
    for run in sorted(when, key=when.get, reverse=True):
        if "objective" in read_config(run):  # a classifier has none
            return run
    raise CheckpointError(
        f"there is no run in {root}/; train one (accelerate launch train_dit.py) or give --checkpoint"
    )


def load_pipeline(
    source: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    ema_std: float | None = None,
) -> ClassConditionalPipeline:
    """A pipeline of images or clips from a run, a folder or the hub, ready to sample without its own bar.

    A run is sampled from the EMA of its newest checkpoint: from the exported pipeline where that is as new.
    With ``ema_std``, from the average of that relative standard deviation, reconstructed from its snapshots.

    Raises:
        CheckpointError: where the source does not exist, is damaged or is not ours.
        ConfigError: where the device is not there.
    """
    source = expand_home(source)
    path = Path(source)
    disable_progress_bar()  # of loading: seconds at most
    if (path / "config.yaml").is_file():
        pipeline = _load_run(path, ema_std)
    elif ema_std is not None:
        raise CheckpointError(f"{source} is no run with snapshots; --ema-std takes a folder below runs/")
    elif path.exists():
        pipeline = _from_folder(path)
    elif source.count("/") == 1 and not source.startswith((".", "/", "runs/")):
        pipeline = _from_hub(source)
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


def choose_sampler(pipeline: ClassConditionalPipeline, name: str | None) -> None:
    """Gives the pipeline the scheduler of this name, of its model's objective; None keeps the one it has.

    Raises:
        ConfigError: with the names of those that fit.
    """
    if name is None:
        return
    trained_for = pipeline.transformer.config.prediction_type or prediction_type(pipeline.scheduler)
    try:
        pipeline.scheduler = OBJECTIVES[trained_for].scheduler(name)
    except ValueError as error:
        raise ConfigError(f"--sampler: {error}") from None


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
        return kind.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is a damaged pipeline: {reason(error)}") from error


def _from_hub(name: str) -> ClassConditionalPipeline:
    check_index(_fetch(name, "model_index.json"))  # before the weights of what is not ours are fetched
    return _from_folder(_fetch(name, "*.json", "*.safetensors"))


def _fetch(name: str, *patterns: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a pipeline on the hub: {reason(error)}"
        ) from error


def _load_run(run: Path, ema_std: float | None) -> ClassConditionalPipeline:
    if "objective" not in read_config(run):
        raise CheckpointError(
            f"{run} is the run of a classifier, which does not draw; take one of train_dit.py"
        )
    if ema_std is not None:
        config = load_config(run / "config.yaml")
        weights = reconstruct(run / "snapshots", ema_std)
        return build_pipeline(config, model_of(config, weights), _data_of(run, config))
    newest = checkpoint.newest(run / "checkpoints")
    exported = run / "pipeline" / "recipe.json"
    if exported.is_file() and (newest is None or _step_of_export(exported) >= checkpoint.step_of(newest)):
        return _from_folder(run / "pipeline")
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet; the first comes after train.save_every_steps")
    config = load_config(run / "config.yaml")
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    weights = checkpoint.read_tensors(newest, "ema", like=expected, any_precision=True)
    return build_pipeline(config, model_of(config, weights), _data_of(run, config))


def _step_of_export(recipe: Path) -> int:
    try:
        return int(files.read_json(recipe, limits.INDEX_BYTES)["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{recipe} does not say the step of its pipeline: {error!r}; remove {recipe.parent}, and its run "
            "is sampled from its newest checkpoint"
        ) from error


def _data_of(run: Path, config: Config) -> Data:
    """The data that the run was trained on: names, normalisation and autoencoder. Nothing is made anew.

    Raises:
        CheckpointError: where it has changed since.
        DataError: where it is missing.
    """
    dataset = build_dataset(replace(config, data=replace(config.data, prepare=None)))
    path = run / "data.json"
    try:
        before = files.read_json(path, limits.INDEX_BYTES) if path.exists() else dataset.identity
        now = json.loads(files.to_json(dataset.identity))
        changed = [key for key in now if before.get(key) != now[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not say what {run} was trained on: {error!r}") from error
    if changed:
        key = changed[0]
        raise CheckpointError(
            f"{run} was trained on other data than {config.data.path} is now "
            f"({key}: {before.get(key)!r:.200} -> {now[key]!r:.200}); "
            "restore it, or sample an exported pipeline"
        )
    return dataset
