"""Weights sharded over processes, FSDP2 (`torch.distributed.fsdp.fully_shard`): every process holds a part of each
parameter, of its gradient and of the optimiser's state. A checkpoint holds whole tensors, so a run may go on with
another number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import StateDict


def shard(network: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Shards a network in place over all processes. Its `parts` are gathered one at a time."""
    device = next(network.parameters()).device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(x: Tensor) -> Tensor:
    """The whole of a sharded tensor; other tensors are returned unchanged. All processes must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def collect(x: Tensor, *, keep: bool) -> Tensor:
    """`whole` on the CPU where it is kept, an empty tensor elsewhere: one tensor at a time is whole on a device."""
    full = whole(x)
    return full.cpu() if keep else full.new_empty(0)


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded like `like`; unchanged if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def whole_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> StateDict:
    """`state_dict` with whole tensors, on the processes that keep it."""
    saved = optimizer.state_dict()
    state = {
        number: {key: collect(x, keep=keep) if isinstance(x, Tensor) else x for key, x in entries.items()}
        for number, entries in saved["state"].items()
    }
    return {**saved, "state": state}


def load_whole_state(optimizer: torch.optim.Optimizer, saved: StateDict) -> None:
    """The inverse of `whole_state`, for the shards of this process."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def fit(x: object, p: Tensor) -> object:
        return part_of(x, p) if isinstance(x, Tensor) and x.shape == p.shape else x  # `step` is a number

    state = {
        number: {key: fit(x, parameters[number]) for key, x in entries.items()}
        for number, entries in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def first(number: int, device: torch.device) -> int:
    """The number of the first process. All processes must call it."""
    shared = torch.tensor([number], device=device)
    torch.distributed.broadcast(shared, 0)
    return int(shared)


def agree(flag: bool, device: torch.device) -> bool:
    """The flag of the first process: clocks differ, and all must save, or validate, at the same step."""
    return bool(first(int(flag), device))
