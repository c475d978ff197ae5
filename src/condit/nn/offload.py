"""Less memory for the same arithmetic: modules that rest on the CPU and are copied to a device for their turn, blocks
that are computed twice.

What rests is never changed: a turn works on a copy of the module's structure whose tensors lie on the device, and drops
it. So two calls in two threads do not see each other, and nothing is copied back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)


def on_device(module: M, device: torch.device | str) -> M:
    """The module with its parameters and buffers on `device`; where they lie there already, they are shared."""
    return _copied(module, torch.device(device), {}, {})


def _copied(module: M, device: torch.device, modules: dict[int, nn.Module], tensors: dict[int, Tensor]) -> M:
    if id(module) in modules:
        return modules[id(module)]  # type: ignore[return-value]
    found = modules[id(module)] = copy.copy(module)

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.device == device:
            return tensor
        if id(tensor) not in tensors:  # tied weights stay tied
            there = tensor.detach().to(device)
            tensors[id(tensor)] = (
                nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
            )
        return tensors[id(tensor)]

    state = vars(found)
    state["_parameters"] = {name: moved(p) for name, p in module._parameters.items()}
    state["_buffers"] = {name: moved(b) for name, b in module._buffers.items()}
    state["_modules"] = {name: m and _copied(m, device, modules, tensors) for name, m in module._modules.items()}
    return found  # type: ignore[return-value]


class Visited(nn.ModuleList):
    """Blocks that rest where they are; iterating gives each on `device`, one at a time."""

    device: torch.device | str = "cpu"

    def __iter__(self) -> Iterator[nn.Module]:
        for block in super().__iter__():
            yield on_device(block, self.device)

    def move(self, device: torch.device | str) -> None:
        """Where the blocks have their turn."""
        self.device = device


class Checkpointed(nn.ModuleList):
    """Blocks whose insides are computed again in the backward pass instead of being kept (Chen et al. 2016,
    arXiv:1604.06174)."""

    def __iter__(self) -> Iterator[Callable]:  # type: ignore[override]
        for block in super().__iter__():
            yield partial(checkpoint, block, use_reentrant=False)


def with_blocks(module: M, kind: type[nn.ModuleList]) -> M:
    """The module with each list of its blocks as `kind`; the blocks are shared, and the module is not changed."""
    found = copy.copy(module)
    children = {n: kind(m._modules.values()) if isinstance(m, nn.ModuleList) else m for n, m in module._modules.items()}  # type: ignore[arg-type]
    vars(found)["_modules"] = children
    return found
