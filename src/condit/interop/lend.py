"""The parts that guests on all pipelines share: protocols of diffusers' objects, and the stand-in for a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.backbones.unet import UNet, UNetConfig
from condit.controls.control import Control
from condit.encoders.vae import Autoencoder

Arguments = Mapping[str, object]  # of a pipeline's call, by name


class NativeNetwork(Protocol):
    """The attributes of diffusers' networks that guests read."""

    config: Mapping[str, Any]
    dtype: torch.dtype
    attn_processors: Mapping[str, object]
    up_blocks: Sequence[nn.Module]


class NativeAutoencoder(Autoencoder, Protocol):
    """diffusers' AutoencoderKL."""

    dtype: torch.dtype


class Scheduler(Protocol):
    """diffusers' schedulers; of their configuration, guests read num_train_timesteps."""

    config: Mapping[str, Any]
    timesteps: Tensor


class NativePipeline(Protocol):
    """The attributes of diffusers' pipelines that guests read; each family has a part of them."""

    name_or_path: str | None
    vae: NativeAutoencoder
    vae_scale_factor: int
    default_sample_size: int
    unet: nn.Module
    text_encoder_2: nn.Module | None
    tokenizer_2: Any
    scheduler: Scheduler
    num_timesteps: int
    do_classifier_free_guidance: bool
    maybe_free_model_hooks: Callable[[], None]
    _execution_device: torch.device

    def __call__(self, *args: object, **arguments: object) -> Any: ...

    def encode_prompt(self, **arguments: object) -> Sequence[Tensor]: ...


class GuestPipeline(Protocol):
    """The attributes of a `Guest` that families read."""

    @property
    def pipe(self) -> NativePipeline: ...

    @property
    def network(self) -> nn.Module: ...

    @property
    def pixels(self) -> int: ...


@dataclass(frozen=True)
class PipelineFamily:
    """diffusers' pipelines of one kind of network.

    part: the network's attribute in a pipeline; model: its class in diffusers; cells: latent cells of a token's side;
    size(pipe): the default (height, width) in pixels. config_of(network): condit's configuration of it;
    borrow(network): condit's network with its layers. stand_in(guest, host, controls, arguments): the replacement of
    the network in `host` during a call. refusal(network, control): why a control is not supported, or None.
    """

    pipelines: tuple[str, ...]
    part: str
    model: str
    cells: int
    size: Callable[[NativePipeline], tuple[int, int]]
    config_of: Callable[[nn.Module], MMDiTConfig | UNetConfig]
    borrow: Callable[[nn.Module], MMDiT | UNet]
    stand_in: Callable[[GuestPipeline, NativePipeline, tuple[Control, ...], Arguments], nn.Module]
    refusal: Callable[[nn.Module, Control], str | None]


class StandIn(nn.Module):
    """Replaces a network during one call of a pipeline and has its attributes. It is a module because diffusers
    determines its device from modules."""

    def __init__(self, native: nn.Module):
        super().__init__()
        self.native = native

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("native"), name)


class Onloaded:
    """Runs accelerate's hook, which moves an offloaded module to its device, as the module's forward would."""

    def __init__(self, module: nn.Module):
        self.module = plain(module)
        self.hook: Any = getattr(self.module, "_hf_hook", None)  # accelerate's ModelHook

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
    begin = min(range(len(levels)), key=lambda i: abs(levels[i] - first))  # rounding may differ from the scheduler's
    return levels[begin:]


def plain(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def native(network: nn.Module) -> NativeNetwork:
    """diffusers' network, without torch.compile's wrapper, with the types of its attributes."""
    return cast("NativeNetwork", plain(network))


def classes(value: object) -> set[str]:
    """Names of the diffusers classes of `value`. Importing all of them for isinstance would take seconds."""
    return {c.__name__ for c in type(value).__mro__ if c.__module__.startswith("diffusers.")}


def call_arguments(pipe: NativePipeline, args: Sequence[object], kwargs: Arguments) -> Arguments:
    """The arguments of the pipeline's call by name, with its defaults. TypeError for an unknown one."""
    call = inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs)
    call.apply_defaults()
    return call.arguments


def refuse_kwargs(name: str, kwargs: Mapping[str, object] | None) -> None:
    """ValueError for arguments of diffusers' attention processors, which do not run with controls."""
    if kwargs:
        raise ValueError(
            f"{name} {sorted(kwargs)} have no effect with controls. For an image prompt use condit.IPAdapter; for "
            "the weight of a LoRA use pipe.set_adapters."
        )
