"""The only place where a name in a config becomes an object, and where parts meet."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils.logging import disable_progress_bar
from torch import nn
from torch.utils.data import DataLoader

from iwin_dit.build_data import build_dataset, load_autoencoder
from iwin_dit.config import MAY_CHANGE, Config, load_config
from iwin_dit.config_rules import local_batch
from iwin_dit.data.examples import Data, StepSampler, TrainingExamples
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.image import IwinDiTPipeline
from iwin_dit.pipelines.sampling import draw_grid, sample_classes
from iwin_dit.runtime import checkpoint, files
from iwin_dit.runtime.cpu import keep_freed_memory, use_all_cores
from iwin_dit.runtime.errors import CheckpointError, ConfigError
from iwin_dit.runtime.run import RunDirectory
from iwin_dit.runtime.seeds import derive_seed
from iwin_dit.training.ema import make_ema
from iwin_dit.training.loop import State
from iwin_dit.training.optimizer import build_adamw


def build_accelerator(config: Config) -> Accelerator:
    """Processes, device and precision; notices a launch that silently became a single process.

    Raises:
        ConfigError: where fewer processes run than were asked for.
    """
    accelerator = Accelerator(mixed_precision="no" if config.train.precision == "fp32" else "bf16")
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    # `accelerate launch --cpu --num_processes 2` starts one process, and leaves an address to meet others at
    launched, alone = "ACCELERATE_MIXED_PRECISION" in os.environ, "RANK" not in os.environ
    unmet = launched and alone and "MASTER_ADDR" in os.environ
    if accelerator.num_processes < asked or (accelerator.num_processes == 1 and unmet):
        raise ConfigError(
            f"several processes were asked for, but {accelerator.num_processes} runs; on CPUs, launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 "
            "--mixed_precision no --dynamo_backend no train_dit.py"
        )
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
        keep_freed_memory()
    return accelerator


def build_model(config: Config) -> IwinDiTTransformer2DModel:
    """The network, its weights drawn from the config's seed; the global random state is left as it was."""
    depth, width, heads, patch_size = config.model.shape
    learns_sigma = config.objective.name == "ddpm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        return IwinDiTTransformer2DModel(
            sample_size=config.model.sample_size,
            patch_size=patch_size,
            in_channels=config.model.in_channels,
            out_channels=config.model.in_channels * (2 if learns_sigma else 1),
            num_layers=depth,
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            num_classes=config.model.num_classes,
            class_dropout_prob=config.model.label_dropout,
            mixer=asdict(config.model.mixer),
            position_embedding=config.model.position_embedding,
            norm=config.model.norm,
            mlp=config.model.mlp,
            mlp_ratio=config.model.mlp_ratio,
            qk_norm=config.model.qk_norm,
            modulation_shift=config.model.modulation_shift,
            open_gates=config.model.open_gates,
            prediction_type=build_objective(config).prediction_type,
        )


def build_objective(config: Config) -> FlowMatching | DDPM:
    """What the model learns to predict."""
    options = asdict(config.objective)
    return DDPM() if options.pop("name") == "ddpm" else FlowMatching(**options)


def build_loader(config: Config, dataset: Data, accelerator: Accelerator) -> tuple[Any, int]:
    """``loader(step)``, which reads from that step on, and how many of its micro-batches make a step."""
    local, micro_batch = local_batch(config.train, accelerator.num_processes)
    null_label = config.model.num_classes if config.model.label_dropout else None
    examples = TrainingExamples(
        dataset, config.seed, config.data.random_flip, config.model.label_dropout, null_label
    )

    def loader(step: int) -> DataLoader:
        sampler = StepSampler(
            step,
            config.train.max_steps,
            config.train.batch_images,
            micro_batch,
            accelerator.process_index,
            accelerator.num_processes,
        )
        workers = config.train.num_workers
        return DataLoader(
            examples, batch_sampler=sampler, num_workers=workers, pin_memory=accelerator.device.type == "cuda"
        )

    return loader, local // micro_batch


def build_state(config: Config, accelerator: Accelerator) -> State:
    """Model, EMA and optimiser on the accelerator's device."""
    model = build_model(config).to(accelerator.device)
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = config.optimizer
    adamw = build_adamw(
        model, optimizer.learning_rate, optimizer.betas, optimizer.eps, optimizer.weight_decay
    )
    return State(model, make_ema(model), adamw)


def check_output(config: Config) -> None:
    """Finds out before anything is loaded that the run directory can be written."""
    if not files.can_write(Path(config.output_dir)):
        raise ConfigError(f"output_dir {config.output_dir} cannot be written; take a folder that is yours")


def build_run(config: Config, dataset: Data) -> RunDirectory:
    """The run directory, locked."""
    return RunDirectory(config.output_dir, config.to_dict(), MAY_CHANGE, dataset.identity)


def build_pipeline(config: Config, model: nn.Module, dataset: Data) -> IwinDiTPipeline:
    """The pipeline that samples this model: the VAE of its data, the scheduler of its objective."""
    return IwinDiTPipeline(
        transformer=model,
        vae=load_autoencoder(dataset.vae_path).to(next(model.parameters()).device),
        scheduler=build_objective(config).scheduler(config.sample.sampler),
        id2label=dict(enumerate(dataset.class_names)),
        latents_mean=dataset.mean,
        latents_std=dataset.std,
    )


def build_preview(config: Config, dataset: Data, run: RunDirectory | None) -> Any:
    """``preview(ema, step)`` writes ``samples/step-00001000.png``: the first ten classes with fixed seeds."""

    def preview(ema: nn.Module, step: int) -> None:
        pipeline = build_pipeline(config, ema, dataset)
        pipeline.set_progress_bar_config(disable=True)
        labels = range(min(10, config.model.num_classes))
        samples = sample_classes(
            pipeline,
            labels,
            config.sample.num_per_class,
            config.seed,
            batch_size=40,
            **sampling_options(config),
        )
        draw_grid(list(samples), pipeline.id2label).save(run.samples / f"step-{step:08d}.png")

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
    runs = [path.parent for path in root.glob("*/config.yaml") if (path.parent / "checkpoints").is_dir()]
    if not runs:
        raise CheckpointError(
            f"there is no run in {root}/; train one (accelerate launch train_dit.py) or give --checkpoint"
        )
    return max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime)


def load_pipeline(
    source: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> IwinDiTPipeline:
    """A pipeline from a run, a pipeline folder or the hub, ready to sample without a bar of its own.

    A run is sampled from the EMA of its newest checkpoint: from the exported pipeline where that is as new.

    Raises:
        CheckpointError: where the source does not exist, is damaged or is not ours.
        ConfigError: where the device is not there.
    """
    path = Path(source)
    disable_progress_bar()  # of loading: seconds at most
    if (path / "config.yaml").is_file():
        pipeline = _load_run(path)
    elif path.exists():
        _check_pipeline_folder(path)
        pipeline = _from_pretrained(source, "is a damaged pipeline")
    elif source.count("/") == 1 and not source.startswith((".", "/", "runs/")):
        pipeline = _from_pretrained(source, "is neither a folder here nor a pipeline on the hub")
    else:
        raise CheckpointError(
            f"{source} does not exist; expected a run, a pipeline folder, or a hub id such as user/model"
        )
    try:
        pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device {device} cannot be used: {str(error).splitlines()[0]}") from None
    if dtype != torch.float32:
        pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_pretrained(source: str | Path, otherwise: str) -> IwinDiTPipeline:
    try:
        return IwinDiTPipeline.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source} {otherwise}: {str(error).splitlines()[0]}") from error


def _load_run(run: Path) -> IwinDiTPipeline:
    newest = checkpoint.newest(run / "checkpoints")
    exported = run / "pipeline" / "recipe.json"
    if exported.is_file() and (
        newest is None or json.loads(exported.read_text())["step"] >= checkpoint.step_of(newest)
    ):
        return _from_pretrained(run / "pipeline", "is a damaged pipeline")
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet; the first comes after train.save_every_steps")
    config = load_config(run / "config.yaml")
    model = build_model(config).eval()
    model.load_state_dict(checkpoint.read_tensors(newest, "ema", like=model.state_dict()))
    return build_pipeline(config, model, build_dataset(config))


def _check_pipeline_folder(path: Path) -> None:
    index = path / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{path} is neither a run (config.yaml) nor a pipeline (model_index.json)")
    try:
        name = json.loads(index.read_bytes())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not the index of a pipeline: {error!r}") from error
    name = name[-1] if isinstance(name, list) else name
    if name != IwinDiTPipeline.__name__:
        raise CheckpointError(f"{path} holds a {name}, expected an {IwinDiTPipeline.__name__}")
