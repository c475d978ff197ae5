"""Less memory for the same arithmetic: modules that stay on the CPU and are copied to the device while they run, and
blocks that are computed twice.

The module on the CPU never changes: a run uses a copy of its structure with tensors on the device and drops it. So
calls in two threads are independent, and nothing is copied back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)


def on_device(module: M, device: torch.device | str) -> M:
    """A copy of the module with its parameters and buffers on `device`; tensors that are there already are shared."""
    return cast("M", _copied(module, torch.device(device), {}, {}))


def _copied(
    module: nn.Module, device: torch.device, modules: dict[int, nn.Module], tensors: dict[int, Tensor]
) -> nn.Module:
    if id(module) in modules:
        return modules[id(module)]
    copied = modules[id(module)] = copy.copy(module)

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.device == device:
            return tensor
        if id(tensor) not in tensors:  # tied weights stay tied
            data = tensor.detach().to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
        return tensors[id(tensor)]

    state = vars(copied)
    state["_parameters"] = {name: moved(p) for name, p in module._parameters.items()}
    state["_buffers"] = {name: moved(b) for name, b in module._buffers.items()}
    # Its own: transformers installs hooks at a first call, and would install them again in what the copies share.
    state["_forward_hooks"] = type(module._forward_hooks)(module._forward_hooks)
    state["_modules"] = {name: m and _copied(m, device, modules, tensors) for name, m in module._modules.items()}
    return copied


class OffloadedBlocks(nn.ModuleList):
    """Blocks that stay where they are; iteration yields a copy of each on `device`, one at a time."""

    device: torch.device | str = "cpu"

    def __iter__(self) -> Iterator[nn.Module]:
        for block in super().__iter__():
            yield on_device(block, self.device)

    def move(self, device: torch.device | str) -> None:
        """Set the device on which the blocks run."""
        self.device = device


def move_parts(backbone: nn.Module, others: Iterable[object], device: torch.device | str) -> None:
    """Move a network, without its offloaded blocks, and those of `others` that are modules, in place."""
    for part in others:
        if isinstance(part, nn.Module):
            part.to(device)
    if not any(isinstance(part, OffloadedBlocks) for part in backbone.children()):
        backbone.to(device)
        return
    for part in backbone.children():
        part.move(device) if isinstance(part, OffloadedBlocks) else part.to(device)


class CheckpointedBlocks(nn.ModuleList):
    """Blocks whose activations are computed again in the backward pass instead of being kept (Chen et al. 2016,
    arXiv:1604.06174)."""

    def __iter__(self) -> Iterator[Callable]:  # type: ignore[override]
        for block in super().__iter__():
            yield partial(checkpoint, block, use_reentrant=False)


def with_blocks(module: M, list_type: type[nn.ModuleList]) -> M:
    """A copy of the module with each list of its blocks as a `list_type`; both share the blocks."""
    copied = copy.copy(module)
    vars(copied)["_modules"] = {
        name: list_type(nn.ModuleList.__iter__(child)) if isinstance(child, nn.ModuleList) else child
        for name, child in module._modules.items()
    }
    return copied


def check_device(device: str | torch.device) -> None:
    """Raises ValueError for a device that torch does not know or this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError, ImportError) as error:
        count = torch.cuda.device_count()
        here = ["cpu", *(f"cuda:{i}" for i in range(count)), *(["mps"] if torch.backends.mps.is_available() else [])]
        raise ValueError(f"Device {str(device)!r} is not available; this machine has {', '.join(here)}.") from error
