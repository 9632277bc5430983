"""The trunk of both trainers: what stands around the loop, whatever the task."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    find_executable_batch_size,
)
from torch.utils.data import DataLoader, Dataset

from iwin_dit.config.bounds import may_change
from iwin_dit.config.classifier import Recipe
from iwin_dit.config.common import TrainConfig
from iwin_dit.config.parse import is_of_earlier_version
from iwin_dit.config.rules import local_batch
from iwin_dit.config.schema import Config
from iwin_dit.data.examples import StepSampler, whole
from iwin_dit.layers import kernels
from iwin_dit.layers.blindness import of_earlier_version
from iwin_dit.runtime import files
from iwin_dit.runtime.checkpoint import step_directories, step_of
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.processes import TRAINING_WAIT, group_timeout, keep_freed_memory, use_all_cores
from iwin_dit.runtime.progress import say
from iwin_dit.runtime.run import RunDirectory, flatten, read_config
from iwin_dit.runtime.signals import StopRequest
from iwin_dit.training import loop
from iwin_dit.training.attention import attention_backend
from iwin_dit.training.ema import decay_rules, make_ema
from iwin_dit.training.optimizer import build_optimizer
from iwin_dit.training.replicas import check_data
from iwin_dit.training.reports import draw_loss_curve
from iwin_dit.training.sharding import blocks_of, shard
from iwin_dit.training.state import Run, State, Task, full_ema


def train(
    config: Recipe,
    open_data: Callable[[Any, Accelerator], Any],
    build_task: Callable[[Any, Accelerator, Any], Task],
) -> int:
    """Trains by a recipe, from the newest checkpoint on.

    Args:
        open_data: opens the data, which are made first where the recipe says how; their ``identity`` is what
            makes them the same to a run that is resumed.
        build_task: builds what is trained on them, once the run directory is locked.

    Returns:
        the exit code: 143 after a signal, when the same command goes on.

    Raises:
        UserError: where the recipe, the data, the storage or the numbers do not allow it.
    """
    accelerator = build_accelerator(config)
    data = open_data(config, accelerator)
    check_data(accelerator, data.identity)
    directory = build_run(config, data.identity) if accelerator.is_main_process else None
    start_trackers(config, accelerator, directory)
    task = build_task(config, accelerator, data)
    run = Run(config, accelerator, directory, build_state(config, accelerator, task))
    with StopRequest() as stop:
        with attention_backend(config):
            micro_batch = find_micro_batch(run, task)
            micro_batches = config.train.batch_images // (micro_batch * accelerator.num_processes)
            loader = build_loader(run, task.examples, micro_batch)
            step = loop.train(run, task, loader, micro_batches, stop)
        ema = full_ema(run.state)
        accelerator.end_training()
        stopped = step < config.train.max_steps
        if stopped and directory is not None:
            say(f"stopped at step {step} with a checkpoint; run the same command again to go on")
        elif directory is not None:
            told = task.finish(run, ema, step)
            draw_loss_curve(directory)
            if step > config.train.max_steps:
                before = f"train.max_steps {config.train.max_steps} before"
                print(f"{directory.path} was trained further than {before}")
            print(f"trained to step {step}{told}")
    return 143 if stopped else 0


def build_accelerator(config: Recipe) -> Accelerator:
    """Processes, device and precision; notices a launch that silently became a single process.

    Raises:
        ConfigError: where fewer processes run than were asked for.
    """
    if "wandb" in config.train.trackers:
        os.environ.setdefault("WANDB_MODE", "offline")
    accelerator = Accelerator(
        mixed_precision="bf16" if config.train.precision == "bf16" else "no",
        log_with=config.train.trackers or None,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=f"{config.output_dir}/trackers"
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            group_timeout(TRAINING_WAIT),
        ],
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
    if config.train.kernels == "triton" and not _runs_triton(accelerator.device):
        found = accelerator.device
        raise ConfigError(f"train.kernels triton needs triton and a CUDA device, found {found}; set auto")
    torch.set_float32_matmul_precision("high" if config.train.precision == "tf32" else "highest")
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
        keep_freed_memory()
    return accelerator


def _computes_bf16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _runs_triton(device: torch.device) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, for tests
    return kernels.INSTALLED and (device.type == "cuda" or interpreted)


def build_loader(run: Run, examples: Dataset, micro_batch: int) -> Callable[[int], DataLoader]:
    """``loader(step)``, which reads this process's micro-batches from that step on."""
    options, accelerator = run.config.train, run.accelerator

    def loader(step: int) -> DataLoader:
        sampler = StepSampler(
            step, options.batch_images, micro_batch, accelerator.process_index, accelerator.num_processes
        )
        collate = whole if hasattr(examples, "__getitems__") else None
        return DataLoader(
            examples, batch_sampler=sampler, collate_fn=collate, **reading(options, accelerator)
        )

    return loader


def reading(options: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """How a DataLoader reads: its processes, and how long it waits for them."""
    return dict(
        num_workers=options.num_workers,
        timeout=options.worker_timeout_seconds if options.num_workers else 0,
        worker_init_fn=leave_group,
        pin_memory=accelerator.device.type == "cuda",
    )


def leave_group(worker: int) -> None:
    """A signal to the group, of Ctrl-C or of a launcher, is for the trainer alone: its workers are needed."""
    os.setpgid(0, 0)


def build_state(config: Recipe, accelerator: Accelerator, task: Task) -> State:
    """Model, EMAs and optimiser on the accelerator's device, split over the processes where asked for."""
    model = task.model.to(accelerator.device)
    emas = {name: make_ema(model) for name in decay_rules(config.ema.decays, config.ema.power_stds)}
    if config.ema.on_cpu:
        emas = {name: ema.cpu() for name, ema in emas.items()}
    if config.train.sharding == "fsdp2" and accelerator.num_processes > 1:
        for module in (model, *emas.values()):
            device = next(module.parameters()).device.type
            shard(module, device, accelerator.num_processes)
    if config.train.compile:
        shapes = {} if getattr(model, "sparse", None) is None else {"dynamic": False}  # a graph for each grid
        for block in blocks_of(model):
            block.compile(**shapes)
    return State(model, emas, build_optimizer(model, task.parameter_groups(), config.optimizer))


def find_micro_batch(run: Run, task: Task) -> int:
    """Images of one forward pass on one process: the config's, or the most that fit into memory.

    The model is left as it was; what it computes with has to be chosen before.

    Raises:
        ConfigError: where not even one image fits, or where they would part images that are mixed.
    """
    options, accelerator = run.config.train, run.accelerator
    local, micro_batch = local_batch(options, accelerator.num_processes)
    together = 2 if task.in_pairs else 1
    if options.micro_batch == "auto" and local % together == 0:
        micro_batch = _largest_micro_batch(run, task, local, together)
        if accelerator.is_main_process:
            say(f"micro-batches of {micro_batch} images, {local // micro_batch} to a step")
    if micro_batch % together:
        raise ConfigError(
            f"micro-batches of {micro_batch} images cannot be joined two by two, as mixup and CutMix do; set "
            "train.micro_batch to an even divisor of the images of a process, or both alphas to 0"
        )
    return micro_batch


def _largest_micro_batch(run: Run, task: Task, local: int, together: int) -> int:
    """The most images of ``local`` that fit into the memory of every process, found by trying."""
    options, accelerator, state = run.config.train, run.accelerator, run.state

    def attempt(groups: int) -> None:
        if options.compile:
            torch.compiler.reset()  # else a second size would make graphs of any size, for the whole run
        tensors = [tensor.to(accelerator.device) for tensor in task.random_batch(groups * together)]
        with accelerator.autocast():
            losses = task.loss(state.model, *tensors)
        losses.sum().backward()

    task.begin_step(state, 0)
    buffers = [buffer.clone() for buffer in state.model.buffers()]  # such as BatchNorm's statistics
    with torch.random.fork_rng():
        own = largest_that_fits(attempt, local // together) * together
    for buffer, before in zip(state.model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    state.optimizer.zero_grad(set_to_none=True)
    fitting = int(accelerator.gather(torch.tensor([own], device=accelerator.device)).min())
    if options.compile and fitting != own:
        torch.compiler.reset()
    return fitting


def largest_that_fits(attempt: Callable[[int], None], most: int) -> int:
    """The largest divisor of ``most`` for which ``attempt(images)`` does not run out of memory.

    Raises:
        ConfigError: where not even one image fits.
    """
    divisors = (images for images in range(most, 0, -1) if most % images == 0)

    def run(images: int) -> int:
        attempt(images)
        return images

    try:
        return find_executable_batch_size(run, next(divisors), lambda: next(divisors, 0))()
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        raise ConfigError(
            "not even one image fits into memory; set train.gradient_checkpointing 1, ema.on_cpu true or "
            "train.sharding fsdp2, or take a smaller model"
        ) from None


def build_run(config: Recipe, identity: dict[str, Any]) -> RunDirectory:
    """The run directory, locked.

    Args:
        identity: what makes the data the same to a run that is resumed.

    Raises:
        ConfigError: as :class:`RunDirectory`; and where a run that was begun would follow another curve of
            learning rates, or ``auto`` would make another network of it than version 0.1 did.
    """
    folder, defaults = Path(config.output_dir), type(config)().to_dict()
    has_begun = (folder / "config.yaml").exists()
    if isinstance(config, Config):  # version 0.1 knew other values
        defaults["model"]["mixer"]["convolution_on"] = "input"
        grid = config.model.grid
        specs = of_earlier_version(config.model.mixer, grid), config.model.resolved_mixer
        then, now = ((spec.convolution, spec.window(grid)) for spec in specs)
        if has_begun and then != now and is_of_earlier_version(read_config(folder)):
            raise ConfigError(
                f"{folder} was begun by version 0.1, where model.mixer came to (convolution, window) {then}, "
                f"and now to {now}: it can be sampled, but not trained further; take another output_dir"
            )
    if getattr(config.data, "kind", "images") == "images":  # earlier versions dropped the transparency
        defaults["data"]["background"] = None
    run = RunDirectory(config.output_dir, config.to_dict(), may_change(type(config)), identity, defaults)
    if config.optimizer.schedule != "constant" and has_begun:
        before, steps = flatten(read_config(run.path)).get("train.max_steps"), config.train.max_steps
        if before != steps:
            raise ConfigError(
                f"{run.path} was begun with train.max_steps {before}, found {steps}: the learning rate of "
                f"optimizer.schedule {config.optimizer.schedule} depends on it; set {before}, or begin "
                f"another run with these weights: another output_dir, and model.init_from {run.path}"
            )
    return run


def start_trackers(config: Recipe, accelerator: Accelerator, run: RunDirectory | None) -> None:
    """Opens the trackers of the config, on the main process; a run that is resumed goes on in them.

    wandb knows the run by an id, which the run directory keeps. TensorBoard is told which of the steps that
    it has will come again, after the newest checkpoint.
    """
    if not config.train.trackers:
        return
    values = {key: str(value) for key, value in flatten(config.to_dict()).items()}
    folder = Path(accelerator.logging_dir)
    options: dict[str, dict[str, Any]] = {}
    if run is not None:
        folder.mkdir(exist_ok=True)
        newest = max(map(step_of, step_directories(run.checkpoints)), default=0)
        path = folder / "wandb-id"
        if not path.exists():
            files.replace(path, uuid.uuid4().hex.encode())
        known = files.read_bytes(path).decode(errors="replace").strip()
        if not re.fullmatch(r"[0-9a-f]{32}", known):
            raise ConfigError(
                f"{path} holds {known!r:.50}, not an id of wandb; remove it, and wandb begins anew"
            )
        options["tensorboard"] = {"purge_step": newest + 1}
        options["wandb"] = {"dir": str(folder), "id": known, "resume": "allow"}
    accelerator.init_trackers("iwin-dit", values, init_kwargs=options)
