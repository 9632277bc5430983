"""Models that are split over the processes by PyTorch's FSDP2, and tensors that may or may not be.

``fully_shard`` itself, not Accelerate's wrapper, which quietly becomes DDP on CPUs: one code path, tested.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in order, of one stage or several: ``blocks.0``, ``stages.1.blocks.0``, ..."""
    return [module for name, module in model.named_modules() if re.fullmatch(r"(.*\.)?blocks\.\d+", name)]


def shard(model: nn.Module, device_type: str, num_processes: int) -> None:
    """Splits the parameters over the processes in place: block by block, then the rest."""
    mesh = init_device_mesh(device_type, (num_processes,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes have to ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, split as another is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be split; all together, the main process's value counts."""
    if isinstance(target, DTensor):
        value = distribute_tensor(
            value.to(target.device, target.dtype), target.device_mesh, target.placements
        )
    target.copy_(value)
