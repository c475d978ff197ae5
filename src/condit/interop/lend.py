"""What both families of pipelines need: how a network's layers are lent, and what is asked of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from condit.controls.control import Control


@dataclass(frozen=True)
class Family:
    """Pipelines around one kind of network.

    part: the network's name in a pipeline; model: its class in diffusers; cells: latent cells of a token's side;
    size(pipe): (height, width) in pixels that it draws by default. config_of(network) -> ours; borrow(network) -> ours
    over its layers. stand_in(guest, host, controls, named): what stands for the network in `host` during a call with
    arguments `named`. refusal(network, control): why a control cannot act there, or None.
    """

    pipelines: tuple[str, ...]
    part: str
    model: str
    cells: int
    size: Callable[[Any], tuple[int, int]]
    config_of: Callable[[Any], Any]
    borrow: Callable[[nn.Module], Any]
    stand_in: Callable[[Any, Any, tuple[Control, ...], Mapping[str, Any]], nn.Module]
    refusal: Callable[[Any, Control], str | None]


class StandIn(nn.Module):
    """Stands for a network during one call of a pipeline, and has its attributes. A module, because diffusers looks
    among modules for its device."""

    def __init__(self, native: nn.Module):
        super().__init__()
        self.native = native

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("native"), name)


class Onloaded:
    """Runs the hook with which accelerate brings an offloaded module to its device, as the module's forward would."""

    def __init__(self, module: nn.Module):
        self.module = plain(module)
        self.hook: Any = getattr(self.module, "_hf_hook", None)

    def __enter__(self) -> None:
        if self.hook is not None:
            self.hook.pre_forward(self.module)

    def __exit__(self, *_: object) -> None:
        if self.hook is not None:
            self.hook.post_forward(self.module, None)


def levels_from(schedule: Tensor, first: float) -> list[float]:
    """A run's levels (S,) from the one that it begins at. Read once: reading each would wait for the device in every
    step."""
    levels = schedule.tolist()
    return levels[levels.index(first) :]


def plain(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, if there is one."""
    return getattr(module, "_orig_mod", module)


def classes(value: object) -> set[str]:
    """Names of the diffusers classes that `value` is of. By name: importing them all takes seconds."""
    return {c.__name__ for c in type(value).__mro__ if c.__module__.startswith("diffusers.")}


def arguments(pipe: Any, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the pipeline's call by name, with its defaults. TypeError for a strange one."""
    call = inspect.signature(type(pipe).__call__).bind(pipe, *args, **given)
    call.apply_defaults()
    return call.arguments


def refused_kwargs(name: str, kwargs: Mapping[str, Any] | None) -> None:
    """ValueError for arguments of diffusers' attention processors, which do not run beside controls."""
    if kwargs:
        raise ValueError(
            f"{name} {sorted(kwargs)} have no effect beside controls. For an image prompt use condit.IPAdapter; for "
            "the weight of a LoRA use pipe.set_adapters."
        )
