"""The parts that guests on all pipelines share: protocols of diffusers' objects, and the stand-in for a network."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.backbones.unet import UNet, UNetConfig
from condit.controls.control import Control
from condit.controls.host import Host
from condit.encoders.vae import Autoencoder
from condit.nn.lora import Conv, Linear, LowRank, Pointwise

# Arguments that diffusers' own signatures define, by name: of a pipeline's call, or of a network's forward.
Arguments = Mapping[str, Any]
Inputs = TypeVar("Inputs")
Backbone = TypeVar("Backbone", MMDiT, UNet)


class NativeNetwork(Protocol):
    """The attributes of diffusers' networks that guests read."""

    config: Mapping[str, Any]
    dtype: torch.dtype
    attn_processors: Mapping[str, object]
    up_blocks: Sequence[nn.Module]


class NativeAutoencoder(Autoencoder, Protocol):
    """diffusers' AutoencoderKL."""

    dtype: torch.dtype


class HostScheduler(Protocol):
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
    scheduler: HostScheduler
    num_timesteps: int
    do_classifier_free_guidance: bool
    guidance_scale: float
    maybe_free_model_hooks: Callable[[], None]
    _execution_device: torch.device

    def __call__(self, *args: object, **arguments: object) -> Any: ...

    def encode_prompt(self, **arguments: object) -> Sequence[Tensor]: ...


class GuestPipeline(Host, Protocol):
    """The attributes of a `Guest` that families read."""

    @property
    def pipe(self) -> NativePipeline: ...

    @property
    def network(self) -> nn.Module: ...


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
    determines its device from modules. predictions: how many there are in a step."""

    def __init__(self, guest: GuestPipeline, controls: tuple[Control, ...], host: NativePipeline, predictions: int = 1):
        super().__init__()
        self.native, self.host, self.controls = guest.network, host, controls
        self.calls, self.predictions = 0, predictions
        self.levels: list[float] = []

    def count(self) -> tuple[int, int]:
        """Counts a prediction: the number of its step, and its own in that step."""
        self.calls += 1
        index, part = divmod(self.calls - 1, self.predictions)
        if self.controls and index >= self.steps:
            raise RuntimeError(f"{self.calls} predictions in {self.steps} steps: unsupported version of diffusers.")
        return index, part

    @property
    def steps(self) -> int:
        """The number of steps. T2I-Adapter's pipelines do not count them."""
        return getattr(self.host, "num_timesteps", len(self.host.scheduler.timesteps))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("native"), name)


class BorrowedLinear(Linear):
    """A `Linear` or `Pointwise` that calls a layer of diffusers' network: quantised, offloaded or with a LoRA of
    diffusers. `convolution`: the layer is a 1 x 1 convolution on tokens (B, N, in)."""

    def __init__(self, native: nn.Module, like: Linear | Pointwise):
        nn.Module.__init__(self)  # no weights of its own
        self.native, self.path, self.convolution = native, like.path, isinstance(like, Pointwise)
        self.in_features, self.out_features = like.in_features, like.out_features

    @property
    def weight(self) -> Tensor:
        """The layer's own, also inside peft's wrapper."""
        return cast("Tensor", self.native.weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"

    def forward(self, input: Tensor, lora: LowRank | None = None) -> Tensor:
        y = self.native(input.mT[..., None])[..., 0].mT if self.convolution else self.native(input)
        delta = None if lora is None else lora.delta(self.path, input)
        return y if delta is None else y + delta


class BorrowedConv(Conv):
    """A `Conv` that calls a layer of diffusers' network."""

    def __init__(self, native: nn.Module, like: Conv):
        nn.Module.__init__(self)  # no weights of its own
        self.native, self.path, self.stride = native, like.path, like.stride

    @property
    def weight(self) -> Tensor:
        """The layer's own, also inside peft's wrapper."""
        return cast("Tensor", self.native.weight)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"

    def forward(self, input: Tensor, lora: LowRank | None = None) -> Tensor:
        y = self.native(input)
        delta = None if lora is None else lora.delta(self.path, input, self.stride[0])
        return y if delta is None else y + delta


def with_layers(
    backbone: Backbone, network: nn.Module, linear: type[BorrowedLinear], others: tuple[type[nn.Module], ...]
) -> Backbone:
    """A network of condit's whose layers are those of diffusers' network, which have the same names: linears inside
    `linear`, convolutions inside `BorrowedConv`, modules of `others` as they are."""
    for path, module in list(backbone.named_modules()):
        if isinstance(module, (Linear, Pointwise, Conv, *others)):
            parent, _, name = path.rpartition(".")
            layer = network.get_submodule(path)
            if isinstance(module, Linear | Pointwise):
                layer = linear(layer, module)
            elif isinstance(module, Conv):
                layer = BorrowedConv(layer, module)
            backbone.get_submodule(parent).add_module(name, layer)
    return backbone.eval()


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


def host_of(pipe: NativePipeline) -> NativePipeline:
    """A copy of the pipeline for one call, over the same parts."""
    host = copy.copy(pipe)
    vars(host)["origin"] = pipe
    object.__setattr__(host, "__class__", _host_class(type(pipe)))  # diffusers' own would compare it with the config
    return host


@cache
def _host_class(kind: type) -> type:
    """The class of a pipeline's copies. Who stops a run from outside, and step caches, look at the pipeline itself: the
    copy keeps its `_interrupt` and `_current_timestep` there."""

    def shared(name: str) -> property:
        return property(
            lambda host: getattr(vars(host)["origin"], name),
            lambda host, value: setattr(vars(host)["origin"], name, value),
        )

    names = ("_interrupt", "_current_timestep")
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **{name: shared(name) for name in names}})


def call_arguments(pipe: NativePipeline, args: Sequence[object], kwargs: Arguments) -> Arguments:
    """The arguments of the pipeline's call by name, with its defaults. Raises TypeError for an unknown one."""
    signature = inspect.signature(type(pipe).__call__)
    unknown = sorted(kwargs.keys() - signature.parameters.keys())
    if unknown:
        raise TypeError(f"{type(pipe).__name__} has no argument {', '.join(unknown)}. A guest takes its and controls=.")
    call = signature.bind(pipe, *args, **kwargs)
    call.apply_defaults()
    return call.arguments


def inputs_of(kind: type[Inputs], arguments: Arguments) -> Inputs:
    """The arguments of a network's forward as a dataclass. Raises TypeError for those that it does not have."""
    unknown = sorted(arguments.keys() - {field.name for field in fields(cast("Any", kind))})
    if unknown:
        raise TypeError(
            f"This pipeline passes {', '.join(unknown)} to its network, which controls do not support. Call it without "
            "controls, or use a version of diffusers that condit supports."
        )
    return kind(**arguments)


def refuse_kwargs(name: str, kwargs: Mapping[str, object] | None) -> None:
    """ValueError for arguments of diffusers' attention processors, which do not run with controls."""
    if kwargs:
        raise ValueError(
            f"{name} {sorted(kwargs)} have no effect with controls. For an image prompt use condit.IPAdapter; for "
            "the weight of a LoRA use pipe.set_adapters."
        )
