"""The only place where a name in a config becomes an object, and where parts meet."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from iwin_dit.build_data import build_dataset, load_autoencoder
from iwin_dit.config import Config, load_config
from iwin_dit.config_rules import local_batch
from iwin_dit.config_schema import MAY_CHANGE
from iwin_dit.data.examples import Data, StepSampler, TrainingExamples
from iwin_dit.diffusion.ddpm import DDPM
from iwin_dit.diffusion.flow_matching import FlowMatching
from iwin_dit.models.transformer import IwinDiTTransformer2DModel
from iwin_dit.pipelines.image import IwinDiTPipeline
from iwin_dit.pipelines.sampling import draw_grid, sample_classes
from iwin_dit.pipelines.trust import check_pipeline_folder
from iwin_dit.runtime import checkpoint
from iwin_dit.runtime.cpu import keep_freed_memory, use_all_cores
from iwin_dit.runtime.errors import CheckpointError, ConfigError
from iwin_dit.runtime.progress import say
from iwin_dit.runtime.run import RunDirectory, flatten
from iwin_dit.runtime.seeds import derive_seed
from iwin_dit.training.ema import decay_rules, make_ema
from iwin_dit.training.memory import largest_that_fits
from iwin_dit.training.optimizer import build_adamw
from iwin_dit.training.posthoc import reconstruct
from iwin_dit.training.sharding import shard
from iwin_dit.training.state import State

ATTENTION_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def build_accelerator(config: Config) -> Accelerator:
    """Processes, device and precision; notices a launch that silently became a single process.

    Raises:
        ConfigError: where fewer processes run than were asked for.
    """
    if "wandb" in config.train.trackers:
        os.environ.setdefault("WANDB_MODE", "offline")
    accelerator = Accelerator(
        mixed_precision="no" if config.train.precision == "fp32" else "bf16",
        log_with=config.train.trackers or None,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=f"{config.output_dir}/trackers"
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
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
    if config.train.precision == "bf16" and not _computes_bf16(accelerator.device):
        raise ConfigError(f"{accelerator.device} does not compute in bf16; set train.precision fp32")
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
        keep_freed_memory()
    return accelerator


def _computes_bf16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


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


def build_loader(
    config: Config, dataset: Data, accelerator: Accelerator, micro_batch: int
) -> Callable[[int], DataLoader]:
    """``loader(step)``, which reads this process's micro-batches from that step on."""
    null_label = config.model.num_classes if config.model.label_dropout else None
    examples = TrainingExamples(
        dataset, config.seed, config.data.random_flip, config.model.label_dropout, null_label
    )

    def loader(step: int) -> DataLoader:
        sampler = StepSampler(
            step,
            config.train.batch_images,
            micro_batch,
            accelerator.process_index,
            accelerator.num_processes,
        )
        workers = config.train.num_workers
        return DataLoader(
            examples,
            batch_sampler=sampler,
            num_workers=workers,
            timeout=config.train.worker_timeout_seconds if workers else 0,
            worker_init_fn=_leave_group,
            pin_memory=accelerator.device.type == "cuda",
        )

    return loader


def _leave_group(worker: int) -> None:
    """A signal to the group, of Ctrl-C or of a launcher, is for the trainer alone: its workers are needed."""
    os.setpgid(0, 0)


def build_state(config: Config, accelerator: Accelerator) -> State:
    """Model, EMAs and optimiser on the accelerator's device, split over the processes where asked for."""
    model = build_model(config).to(accelerator.device)
    if every := config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        model.checkpoint_every = every
    emas = {name: make_ema(model) for name in decay_rules(config.ema.decays, config.ema.power_stds)}
    if config.ema.on_cpu:
        emas = {name: ema.cpu() for name, ema in emas.items()}
    if config.train.sharding == "fsdp2" and accelerator.num_processes > 1:
        for module in (model, *emas.values()):
            device = next(module.parameters()).device.type
            shard(module, device, accelerator.num_processes)
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    optim = config.optimizer
    adamw = build_adamw(model, optim.learning_rate, optim.betas, optim.eps, optim.weight_decay)
    return State(model, emas, adamw)


def find_micro_batch(
    config: Config, accelerator: Accelerator, state: State, objective: FlowMatching | DDPM, dataset: Data
) -> int:
    """Images of one forward pass on one process: the config's, or the most that fit into memory.

    Raises:
        ConfigError: where they do not divide the batch, or not even one image fits.
    """
    local, micro_batch = local_batch(config.train, accelerator.num_processes)
    if config.train.micro_batch != "auto":
        return micro_batch
    shape = dataset.latent_shape

    def attempt(images: int) -> None:
        latents = torch.randn(images, *shape, device=accelerator.device)
        labels = torch.zeros(images, dtype=torch.long, device=accelerator.device)
        u = torch.rand(images, device=accelerator.device)
        with accelerator.autocast():
            losses = objective.loss(state.model, latents, labels, torch.randn_like(latents), u)
        losses.sum().backward()

    with torch.random.fork_rng():
        fitting = largest_that_fits(attempt, local)
    state.optimizer.zero_grad(set_to_none=True)
    fitting = int(accelerator.gather(torch.tensor([fitting], device=accelerator.device)).min())
    if accelerator.is_main_process:
        say(f"micro-batches of {fitting} images, {local // fitting} to a step")
    return fitting


def attention_backend(config: Config) -> contextlib.AbstractContextManager:
    """The context in which attention takes the kernel of the config."""
    name = config.train.attention_backend
    return contextlib.nullcontext() if name == "auto" else sdpa_kernel(ATTENTION_BACKENDS[name])


def build_run(config: Config, dataset: Data) -> RunDirectory:
    """The run directory, locked."""
    return RunDirectory(config.output_dir, config.to_dict(), MAY_CHANGE, dataset.identity)


def start_trackers(config: Config, accelerator: Accelerator) -> None:
    """Opens the trackers of the config, on the main process."""
    if config.train.trackers:
        values = {key: str(value) for key, value in flatten(config.to_dict()).items()}
        folder = Path(accelerator.logging_dir)
        if accelerator.is_main_process:
            folder.mkdir(exist_ok=True)
        accelerator.init_trackers("iwin-dit", values, init_kwargs={"wandb": {"dir": str(folder)}})


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

    The first ten classes with fixed seeds; nothing is written once ``stop`` is true.
    """

    def preview(ema: dict[str, Tensor], step: int, stop: Any) -> None:
        weights = {name: tensor.to(accelerator.device) for name, tensor in ema.items()}
        pipeline = build_pipeline(config, model_of(config, weights), dataset)
        pipeline.set_progress_bar_config(disable=True)
        labels = range(min(10, config.model.num_classes))
        samples = []
        for sample in sample_classes(
            pipeline,
            labels,
            config.sample.num_per_class,
            config.seed,
            batch_size=40,
            **sampling_options(config),
        ):
            if stop:
                return
            samples.append(sample)
        grid = draw_grid(samples, pipeline.id2label)
        grid.save(run.samples / f"step-{step:08d}.png")
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
    runs = [path.parent for path in root.glob("*/config.yaml") if (path.parent / "checkpoints").is_dir()]
    if not runs:
        raise CheckpointError(
            f"there is no run in {root}/; train one (accelerate launch train_dit.py) or give --checkpoint"
        )
    return max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime)


def load_pipeline(
    source: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    ema_std: float | None = None,
) -> IwinDiTPipeline:
    """A pipeline from a run, a pipeline folder or the hub, ready to sample without a bar of its own.

    A run is sampled from the EMA of its newest checkpoint: from the exported pipeline where that is as new.
    With ``ema_std``, from the average of that relative standard deviation, reconstructed from its snapshots.

    Raises:
        CheckpointError: where the source does not exist, is damaged or is not ours.
        ConfigError: where the device is not there.
    """
    path = Path(source)
    disable_progress_bar()  # of loading: seconds at most
    if (path / "config.yaml").is_file():
        pipeline = _load_run(path, ema_std)
    elif ema_std is not None:
        raise CheckpointError(f"{source} is no run with snapshots; --ema-std takes a folder below runs/")
    elif path.exists():
        check_pipeline_folder(path)
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
        return IwinDiTPipeline.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source} {otherwise}: {str(error).splitlines()[0]}") from error


def _load_run(run: Path, ema_std: float | None) -> IwinDiTPipeline:
    if ema_std is not None:
        config = load_config(run / "config.yaml")
        weights = reconstruct(run / "snapshots", ema_std)
        return build_pipeline(config, model_of(config, weights), build_dataset(config))
    newest = checkpoint.newest(run / "checkpoints")
    exported = run / "pipeline" / "recipe.json"
    if exported.is_file() and (
        newest is None or json.loads(exported.read_text())["step"] >= checkpoint.step_of(newest)
    ):
        check_pipeline_folder(run / "pipeline")
        return _from_pretrained(run / "pipeline", "is a damaged pipeline")
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet; the first comes after train.save_every_steps")
    config = load_config(run / "config.yaml")
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    weights = checkpoint.read_tensors(newest, "ema", like=expected, any_precision=True)
    return build_pipeline(config, model_of(config, weights), build_dataset(config))
