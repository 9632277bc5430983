"""Where a recipe becomes what the training loop takes: processes, data, state, loss and a run."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from iwin_dit.build.data import build_encoder
from iwin_dit.build.network import build_objective
from iwin_dit.config.parse import is_of_earlier_version
from iwin_dit.config.rules import local_batch
from iwin_dit.config.schema import MAY_CHANGE, Config
from iwin_dit.data.examples import Data, MixedExamples, StepSampler, TrainingExamples
from iwin_dit.layers import kernels
from iwin_dit.layers.blindness import of_earlier_version
from iwin_dit.runtime import files
from iwin_dit.runtime.checkpoint import step_directories, step_of
from iwin_dit.runtime.cpu import keep_freed_memory, use_all_cores
from iwin_dit.runtime.errors import ConfigError
from iwin_dit.runtime.processes import TRAINING_WAIT, group_timeout
from iwin_dit.runtime.progress import say
from iwin_dit.runtime.run import RunDirectory, flatten, read_config
from iwin_dit.training.ema import decay_rules, make_ema
from iwin_dit.training.memory import largest_that_fits
from iwin_dit.training.optimizer import build_adamw, parameter_groups
from iwin_dit.training.sharding import blocks_of, shard
from iwin_dit.training.state import State


def build_accelerator(config: Any) -> Accelerator:
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
        raise ConfigError(
            f"train.kernels triton needs the triton package and a CUDA device, found {accelerator.device}; "
            "set auto"
        )
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


def build_examples(
    config: Config, dataset: Data, images: Data | None = None
) -> TrainingExamples | MixedExamples:
    """What training sees at each position: of the dataset, and of images that are mixed in with it."""
    null_label = config.model.num_classes if config.model.label_dropout else None
    examples = [
        TrainingExamples(data, config.seed, config.data.random_flip, config.model.label_dropout, null_label)
        for data in (dataset, images)
        if data is not None
    ]
    if images is None:
        return examples[0]
    return MixedExamples(*examples, config.seed, config.data.image_share, config.train.batch_images)


def build_loader(
    config: Any, examples: Dataset, accelerator: Accelerator, micro_batch: int
) -> Callable[[int], DataLoader]:
    """``loader(step)``, which reads this process's micro-batches from that step on."""

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
            worker_init_fn=leave_group,
            pin_memory=accelerator.device.type == "cuda",
        )

    return loader


def leave_group(worker: int) -> None:
    """A signal to the group, of Ctrl-C or of a launcher, is for the trainer alone: its workers are needed."""
    os.setpgid(0, 0)


def build_state(
    config: Any, accelerator: Accelerator, model: nn.Module, groups: Any = parameter_groups
) -> State:
    """Model, EMAs and optimiser on the accelerator's device, split over the processes where asked for.

    Args:
        groups: ``groups(model, weight_decay)``, the parameters as AdamW takes them.
    """
    model = model.to(accelerator.device)
    emas = {name: make_ema(model) for name in decay_rules(config.ema.decays, config.ema.power_stds)}
    if config.ema.on_cpu:
        emas = {name: ema.cpu() for name, ema in emas.items()}
    if config.train.sharding == "fsdp2" and accelerator.num_processes > 1:
        for module in (model, *emas.values()):
            device = next(module.parameters()).device.type
            shard(module, device, accelerator.num_processes)
    if config.train.compile:
        for block in blocks_of(model):
            block.compile()
    optim = config.optimizer
    adamw = build_adamw(groups(model, optim.weight_decay), optim.learning_rate, optim.betas, optim.eps)
    return State(model, emas, adamw)


def find_micro_batch(
    config: Any,
    accelerator: Accelerator,
    state: State,
    loss: Callable[..., Tensor],
    batch: Callable[[int], Sequence[Tensor]],
    together: int = 1,
) -> int:
    """Images of one forward pass on one process: the config's, or the most that fit into memory.

    The model is left as it was; what it computes with has to be chosen before.

    Args:
        loss: as the training loop takes it.
        batch: ``batch(images)``, random tensors as the loader gives them.
        together: so many images stay in one micro-batch.

    Raises:
        ConfigError: where they do not divide the batch, or not even one image fits.
    """
    local, micro_batch = local_batch(config.train, accelerator.num_processes)
    if config.train.micro_batch != "auto" or local % together:
        return micro_batch

    def attempt(groups: int) -> None:
        if config.train.compile:
            torch.compiler.reset()  # else a second size would make graphs of any size, for the whole run
        tensors = [tensor.to(accelerator.device) for tensor in batch(groups * together)]
        with accelerator.autocast():
            losses = loss(state.model, *tensors)
        losses.sum().backward()

    buffers = [buffer.clone() for buffer in state.model.buffers()]  # such as BatchNorm's statistics
    with torch.random.fork_rng():
        fitting = largest_that_fits(attempt, local // together) * together
    for buffer, before in zip(state.model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    state.optimizer.zero_grad(set_to_none=True)
    own, fitting = fitting, int(accelerator.gather(torch.tensor([fitting], device=accelerator.device)).min())
    if config.train.compile and fitting != own:
        torch.compiler.reset()
    if accelerator.is_main_process:
        say(f"micro-batches of {fitting} images, {local // fitting} to a step")
    return fitting


def build_loss(
    config: Config, dataset: Data, accelerator: Accelerator
) -> tuple[Callable[..., Tensor], Callable[[int], Sequence[Tensor]]]:
    """The loss of a batch of the loader, and a maker of such batches of random numbers."""
    objective = build_objective(config)
    encode = build_encoder(dataset, accelerator)

    def loss(model: Any, x0: Tensor, labels: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        return objective.loss(model, encode(x0), labels, noise, u)

    def batch(images: int) -> Sequence[Tensor]:
        (x0, _), shape = dataset[0], dataset.latent_shape
        labels = torch.zeros(images, dtype=torch.long)
        return x0.expand(images, *x0.shape), labels, torch.randn(images, *shape), torch.rand(images)

    return loss, batch


def build_run(config: Any, identity: dict[str, Any]) -> RunDirectory:
    """The run directory, locked.

    Args:
        identity: what makes the data the same to a run that is resumed.

    Raises:
        ConfigError: as :class:`RunDirectory`; and where a run that was begun would follow another curve of
            learning rates.
    """
    if isinstance(config, Config) and (Path(config.output_dir) / "config.yaml").exists():
        _check_earlier_version(config)
    defaults = type(config)().to_dict()
    if isinstance(config, Config):  # version 0.1 knew other values
        defaults["model"]["mixer"]["convolution_on"] = "input"
    if getattr(config.data, "kind", "images") == "images":  # earlier versions dropped the transparency
        defaults["data"]["background"] = None
    run = RunDirectory(config.output_dir, config.to_dict(), MAY_CHANGE, identity, defaults)
    if config.optimizer.schedule != "constant" and (run.path / "config.yaml").exists():
        before, now = flatten(read_config(run.path)).get("train.max_steps"), config.train.max_steps
        if before != now:
            raise ConfigError(
                f"{run.path} was begun with train.max_steps {before}, found {now}: the learning rate of "
                f"optimizer.schedule {config.optimizer.schedule} depends on it; set {before}, or begin "
                f"another run with these weights: another output_dir, and model.init_from {run.path}"
            )
    return run


def _check_earlier_version(config: Config) -> None:
    """Refuses to go on with a run of version 0.1 whose network ``auto`` would make another one now."""
    grid = config.model.grid
    then, now = (
        (spec.convolution, spec.window(grid))
        for spec in (of_earlier_version(config.model.mixer, grid), config.model.resolved_mixer)
    )
    if then != now and is_of_earlier_version(read_config(Path(config.output_dir))):
        raise ConfigError(
            f"{config.output_dir} was begun by version 0.1, where model.mixer came to (convolution, window) "
            f"{then}, and now to {now}: it can be sampled, but not trained further; take another output_dir"
        )


def start_trackers(config: Any, accelerator: Accelerator, run: RunDirectory | None) -> None:
    """Opens the trackers of the config, on the main process; a run that is resumed goes on in them.

    wandb knows the run by an id, which the run directory keeps. TensorBoard is told which of the steps that
    it has will come again, after the newest checkpoint.
    """
    if not config.train.trackers:
        return
    values = {key: str(value) for key, value in flatten(config.to_dict()).items()}
    folder, options = Path(accelerator.logging_dir), {}
    if run is not None:
        folder.mkdir(exist_ok=True)
        newest = max(map(step_of, step_directories(run.checkpoints)), default=0)
        options["tensorboard"] = {"purge_step": newest + 1}
        options["wandb"] = {"dir": str(folder), "id": _wandb_id(folder / "wandb-id"), "resume": "allow"}
    accelerator.init_trackers("iwin-dit", values, init_kwargs=options)


def _wandb_id(path: Path) -> str:
    if not path.exists():
        files.replace(path, uuid.uuid4().hex.encode())
    found = files.read_bytes(path).decode(errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{32}", found):
        raise ConfigError(f"{path} holds {found!r:.50}, not an id of wandb; remove it, and wandb begins anew")
    return found
