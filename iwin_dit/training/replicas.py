"""Whether all processes hold the same weights, and read the same data.

Each process updates a copy of its own, and nothing but arithmetic keeps the copies equal. A device that
computes wrongly, or a flipped bit in its memory, would spoil the gradients of all without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from iwin_dit.runtime.errors import DataError, ReplicaError
from iwin_dit.runtime.run import TIMES
from iwin_dit.training.optimizer import named_state
from iwin_dit.training.state import State

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@torch.no_grad()
def bit_sum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of all values' bits, read as integers, modulo 2^64: one flipped bit anywhere changes it."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        total += tensor.detach().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64).to(device)
    return total


def check_weights(accelerator: Accelerator, state: State, step: int) -> None:
    """Compares weights, averages and the optimiser's state over the processes; they all do this together.

    Buffers are left out: in each forward pass DDP gives everybody those of the first process. A model that
    is split has no copies.

    Raises:
        ReplicaError: on every process, naming those that differ from the most.
    """
    if accelerator.num_processes == 1 or isinstance(state.model, FSDPModule):
        return
    networks: list[Iterable[Tensor]] = [net.parameters() for net in (state.model, *state.emas.values())]
    moments = named_state(state.optimizer, state.model).values()
    sums = torch.stack([bit_sum(group, accelerator.device) for group in (*networks, moments)])
    odd = differing([tuple(row) for row in accelerator.gather(sums[None]).tolist()])
    if odd:
        raise ReplicaError(
            f"at step {step} {_processes(odd)} not hold the weights, averages and optimiser of the others: a "
            "device or its memory is faulty, or the machines are of different kinds; the same command goes "
            "on from the last checkpoint; take other machines where it happens again"
        )


def check_data(accelerator: Accelerator, identity: Mapping[str, Any]) -> None:
    """Compares what identifies the data over the processes, which may read them on other machines.

    The times of files are left out: copies on several machines have their own.

    Raises:
        DataError: on every process, naming what differs and where.
    """
    if accelerator.num_processes == 1:
        return
    text = {
        key: json.dumps(value, sort_keys=True, default=str) for key, value in identity.items() if key != TIMES
    }
    own = {key: hashlib.sha256(value.encode()).hexdigest() for key, value in text.items()}
    everyone = gather_object([own])
    for key in sorted(set().union(*everyone)):
        odd = differing([found.get(key) for found in everyone])
        if odd:
            raise DataError(
                f"{_processes(odd)} not read the same data as the others: {key} differs (here it is "
                f"{text.get(key, 'missing'):.200}); give all machines the same files"
            )


def differing(values: Sequence[Hashable]) -> list[int]:
    """Where a value is not the most common one; of as many, the first counts."""
    common = max(values, key=values.count)
    return [i for i, value in enumerate(values) if value != common]


def _processes(numbers: Sequence[int]) -> str:
    names = ", ".join(map(str, numbers))
    return f"process {names} does" if len(numbers) == 1 else f"processes {names} do"
