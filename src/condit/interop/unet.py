"""Stable Diffusion 1.x, 2.x and SDXL in diffusers' pipelines: condit's UNet over the layers of diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from condit.backbones.unet import KeyValues, UNet, UNetConfig
from condit.controls.control import Control, Run, Step
from condit.controls.wrap import sides
from condit.interop.lend import Family, Onloaded, StandIn, levels_from, plain, refused_kwargs
from condit.nn.lora import Linear, LowRank, Pointwise, together
from condit.weights.stable_diffusion import unet_config

# Guided by one negative prompt, which comes first in the batch. InstructPix2Pix has three sides; T2I-Adapter and GLIGEN
# reach into the network by other doors.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
)
# Those that compute attention and nothing else. An IP-Adapter of diffusers and others stand in their place.
PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"}


@dataclass(frozen=True)
class Inputs:
    """The arguments of diffusers' `UNet2DConditionModel.forward` by name; timestep in [0, 1000)."""

    sample: Tensor
    timestep: Tensor | float
    encoder_hidden_states: Tensor
    class_labels: Tensor | None = None
    timestep_cond: Tensor | None = None
    attention_mask: Tensor | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    added_cond_kwargs: Mapping[str, Tensor] | None = None
    down_block_additional_residuals: Sequence[Tensor] | None = None
    mid_block_additional_residual: Tensor | None = None
    down_intrablock_additional_residuals: Sequence[Tensor] | None = None
    encoder_attention_mask: Tensor | None = None
    return_dict: bool = True

    def __post_init__(self):
        refused_kwargs("cross_attention_kwargs", self.cross_attention_kwargs)
        strange = [f.name for f in fields(self) if f.name in _STRANGE and getattr(self, f.name) is not None]
        if strange:
            raise ValueError(f"{strange[0]} has no place in condit's UNet. Call without it, or without controls.")

    def rows(self, index: slice) -> Inputs:
        """Some rows of the batch."""
        batch = len(self.sample)

        def of(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x[index] if x.ndim and len(x) == batch else x
            if isinstance(x, Mapping):
                return {name: of(value) for name, value in x.items()}
            return [of(value) for value in x] if isinstance(x, list | tuple) else x

        return replace(self, **{field.name: of(getattr(self, field.name)) for field in fields(self)})


_STRANGE = {
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "down_intrablock_additional_residuals",
    "encoder_attention_mask",
}


class Controlled(StandIn):
    """Stands for a UNet, which predicts once a step for all sides of the guidance: the negative prompts' rows, then the
    prompts'. host: the pipeline of the call, which knows its steps and whether it is guided."""

    def __init__(self, native: nn.Module, controls: tuple[Control, ...], host: Any):
        super().__init__(native)
        self.host, self.controls, self.calls = host, controls, 0
        self.sides: list[tuple[Control, ...]] = []
        self.levels: list[float] = []
        self.backbone = borrow(native) if controls else None
        self.known: tuple[Tensor, KeyValues] | None = None  # what `text` has made, and of what

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **given: Any) -> Any:
        """As the UNet's. Controls are prepared at the first step, where the prompt is known."""
        index = self.calls
        self.calls += 1
        if self.backbone is None:
            return self.native(sample, timestep, encoder_hidden_states, **given)
        steps = self.host.num_timesteps
        if index >= steps:
            raise RuntimeError(f"{self.calls} predictions in {steps} steps: this diffusers is not understood.")
        inputs = Inputs(sample, timestep, encoder_hidden_states, **given)
        with Onloaded(self.native):
            if index == 0:
                self.levels = levels_from(self.host.scheduler.timesteps, float(timestep))
                self.sides = prepared(self.backbone, self.controls, inputs, self.host.do_classifier_free_guidance)
            step = Step(index, steps, self.levels[index] / self.host.scheduler.config.num_train_timesteps)
            acting = [[c for c in (control.at(step) for control in side) if c is not None] for side in self.sides]
            if any(acting):
                return predict(self.backbone, inputs, acting, self.text)
        return self.native(sample, timestep, encoder_hidden_states, **given)

    def text(self, states: Tensor) -> KeyValues:
        """Keys and values of the text, made once a run."""
        assert self.backbone is not None
        if self.known is None or self.known[0] is not states:
            self.known = states, self.backbone.text_keys_values(states)
        return self.known[1]


def prepared(backbone: UNet, controls: Sequence[Control], inputs: Inputs, guided: bool) -> list[tuple[Control, ...]]:
    """The controls of each side for a run."""
    absent = [c for c in (control.negative() for control in controls) if c is not None]
    parts: list[Sequence[Control]] = [absent, controls] if guided else [controls]
    batch, memory, found = len(inputs.sample) // len(parts), {}, []
    for i, part in enumerate(parts):
        run = run_of(backbone, inputs.rows(slice(i * batch, (i + 1) * batch)), memory)
        found.append(tuple(control.prepare(run) for control in part))
    return found


def run_of(backbone: UNet, inputs: Inputs, memory: dict) -> Run:
    """What controls may know of the rows of one side."""
    x = inputs.sample
    pooled = (inputs.added_cond_kwargs or {}).get("text_embeds", x.new_zeros(len(x), 0))
    shape = {"batch": len(x), "grid": (int(x.shape[-2]), int(x.shape[-1])), "in_channels": backbone.config.out_channels}
    return Run(backbone, pooled=pooled, guidance=None, memory=memory, **shape)  # type: ignore[arg-type]


def predict(
    backbone: UNet, inputs: Inputs, acting: Sequence[Sequence[Control]], text: Callable[[Tensor], KeyValues]
) -> Any:
    """A prediction by condit's UNet, in diffusers' two forms. A LoRA knows no rows, so with one the sides run apart."""
    loras = [together(control.lora() for control in side) for side in acting]
    if any(lora is not None for lora in loras):
        n = len(inputs.sample) // len(acting)
        parts = [inputs.rows(slice(i * n, (i + 1) * n)) for i in range(len(acting))]
        found = [
            run(backbone, p, p.encoder_hidden_states, lora, side)
            for p, lora, side in zip(parts, loras, acting, strict=True)
        ]
        out = torch.cat(found)
    else:
        out = run(backbone, inputs, text(inputs.encoder_hidden_states), None, sides(acting))
    if not inputs.return_dict:
        return (out,)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return UNet2DConditionOutput(sample=out)


def run(
    backbone: UNet, inputs: Inputs, text: Tensor | KeyValues, lora: LowRank | None, controls: Sequence[Control]
) -> Tensor:
    x, added = inputs.sample, inputs.added_cond_kwargs or {}
    t = torch.as_tensor(inputs.timestep, device=x.device).expand(len(x))
    down, middle = inputs.down_block_additional_residuals, inputs.mid_block_additional_residual
    residuals = [] if down is None or middle is None else [*down, middle]
    told = {"pooled": added.get("text_embeds"), "sizes": added.get("time_ids")}
    return backbone(x, t, text, **told, lora=lora, controls=controls, residuals=residuals)


# The UNet's layers, lent


class Borrowed(Linear):
    """A `Linear` or `Pointwise` that leaves the product to another model's layer: quantised, offloaded or with a LoRA
    of diffusers. `convolution`: a 1 x 1 one, over tokens (B, N, in)."""

    def __init__(self, native: nn.Module, like: Linear | Pointwise):
        nn.Module.__init__(self)  # no weights of its own
        self.native, self.path, self.convolution = native, like.path, isinstance(like, Pointwise)
        self.in_features, self.out_features = like.in_features, like.out_features

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"

    def forward(self, input: Tensor, lora: LowRank | None = None) -> Tensor:
        y = self.native(input.mT[..., None])[..., 0].mT if self.convolution else self.native(input)
        delta = None if lora is None else lora.delta(self.path, input)
        return y if delta is None else y + delta


def borrow(unet: nn.Module) -> UNet:
    """condit's UNet over the layers of diffusers', whose names are the same."""
    native = plain(unet)
    with torch.device("meta"):
        backbone = UNet(config_of(native))
    for path, module in list(backbone.named_modules()):
        if isinstance(module, Linear | Pointwise | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
            parent, _, name = path.rpartition(".")
            layer = native.get_submodule(path)
            lent = Borrowed(layer, module) if isinstance(module, Linear | Pointwise) else layer
            backbone.get_submodule(parent).add_module(name, lent)
    return backbone.eval()


def config_of(unet: Any) -> UNetConfig:
    """The configuration of diffusers' UNet as ours. ValueError for a UNet that is not Stable Diffusion's."""
    return unet_config(dict(unet.config), type(unet).__name__)


# What a call is asked for


def size_of(pipe: Any) -> tuple[int, int]:
    side: Any = plain(pipe.unet).config.sample_size  # type: ignore[union-attr]
    height, width = (side, side) if isinstance(side, int) else side
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def stand_in(guest: Any, host: Any, controls: tuple[Control, ...], named: Mapping[str, Any]) -> Controlled:
    if controls:
        refuse_changed(plain(guest.network))
    return Controlled(guest.network, controls, host)


def refuse_changed(unet: Any) -> None:
    """ValueError for what diffusers itself has put into the UNet, which condit's would leave out."""
    strange = sorted({type(p).__name__ for p in unet.attn_processors.values()} - PROCESSORS)
    if strange or getattr(unet, "encoder_hid_proj", None) is not None:
        raise ValueError(
            f"This UNet has {strange[0] if strange else 'an image projection'} of diffusers, which a control would "
            "leave out. Use pipe.unload_ip_adapter() or pipe.unet.set_default_attn_processor(), and condit.IPAdapter."
        )
    if any(getattr(block, "b1", None) is not None for block in unet.up_blocks):
        raise ValueError("FreeU scales the skips, which a control would leave out. Use pipe.disable_freeu().")


def refusal(unet: Any, control: Control) -> str | None:
    if not control.acts & {"join", "omit"}:
        return None
    return "joins tokens to the sequence, and a UNet has none. Use a control that wraps attention: condit.IPAdapter."


STABLE_DIFFUSION = Family(
    pipelines=PIPELINES,
    part="unet",
    model="UNet2DConditionModel",
    cells=1,
    size=size_of,
    config_of=config_of,
    borrow=borrow,
    stand_in=stand_in,
    refusal=refusal,
)
