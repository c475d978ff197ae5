"""Weights sharded over processes, FSDP2 (`torch.distributed.fsdp.fully_shard`): every process holds a part of each
parameter, of its gradient and of the optimiser's state. A checkpoint holds whole tensors, so a run may go on with
another number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Shards a network, in place, over all processes. parts: gathered one at a time, so only one is whole in memory."""
    device = next(network.parameters()).device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor, on every process, which all must call; another tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def collect(x: Tensor, *, keep: bool) -> Tensor:
    """`whole`, on the CPU, where it is kept; elsewhere nothing, so that one tensor at a time is whole on a device."""
    full = whole(x)
    return full.cpu() if keep else full.new_empty(0)


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as `like` is; as it is where that is not sharded."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def whole_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """`state_dict` with whole tensors, where it is kept."""
    told = optimizer.state_dict()
    state = {
        number: {key: collect(x, keep=keep) if isinstance(x, Tensor) else x for key, x in entries.items()}
        for number, entries in told["state"].items()
    }
    return {**told, "state": state}


def load_whole_state(optimizer: torch.optim.Optimizer, told: dict[str, Any]) -> None:
    """The inverse of `whole_state`, for the shards that the optimiser has."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def fit(x: Any, p: Tensor) -> Any:
        return part_of(x, p) if isinstance(x, Tensor) and x.shape == p.shape else x  # `step` is a number

    state = {
        number: {key: fit(x, parameters[number]) for key, x in entries.items()}
        for number, entries in told["state"].items()
    }
    optimizer.load_state_dict({**told, "state": state})


def agree(flag: bool, device: torch.device) -> bool:
    """What the first process says: clocks differ, and all must save, or look, at the same step."""
    told = torch.tensor([int(flag)], device=device)
    torch.distributed.broadcast(told, 0)
    return bool(told)
