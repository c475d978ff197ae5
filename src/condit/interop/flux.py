"""FLUX.1 in diffusers' pipelines: condit's MM-DiT with the linear layers and norms of diffusers' transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.controls.control import Apart, Control, Run, Step
from condit.encoders.text import Text
from condit.interop.lend import (
    Arguments,
    BorrowedLinear,
    GuestPipeline,
    NativePipeline,
    Onloaded,
    PipelineFamily,
    StandIn,
    inputs_of,
    levels_from,
    native,
    plain,
    refuse_kwargs,
    with_layers,
)
from condit.nn.attention import Site
from condit.nn.layers import RMSNorm
from condit.nn.lora import LowRank
from condit.nn.streams import Stream

if TYPE_CHECKING:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

# Pipelines whose image tokens are the noisy image only. Kontext's contain references; Fill and Control add channels.
PIPELINES = (
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
    "FluxControlNetPipeline",
    "FluxControlNetImg2ImgPipeline",
    "FluxControlNetInpaintPipeline",
)


@dataclass(frozen=True)
class FluxInputs:
    """The arguments of diffusers' `FluxTransformer2DModel.forward` by name. timestep (B,) in [0, 1], 0 = clean."""

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    pooled_projections: Tensor
    timestep: Tensor
    img_ids: Tensor
    txt_ids: Tensor
    guidance: Tensor | None = None
    joint_attention_kwargs: Mapping[str, object] | None = None
    controlnet_block_samples: Sequence[Tensor] | None = None
    controlnet_single_block_samples: Sequence[Tensor] | None = None
    return_dict: bool = True
    controlnet_blocks_repeat: bool = False

    def __post_init__(self):
        refuse_kwargs("joint_attention_kwargs", self.joint_attention_kwargs)


class ControlledTransformer(StandIn):
    """Replaces a transformer and counts its predictions: in a step first the prompt's, then, if there are two, the
    negative prompt's."""

    def __init__(
        self,
        guest: GuestPipeline,
        controls: tuple[Control, ...],
        host: NativePipeline,
        predictions: int,
        image_share: float | None = None,
    ):
        """image_share: the scale of the controls in units of that of the text, if it is another."""
        super().__init__(guest, controls, host, predictions)
        absent = tuple(c for c in (control.negative() for control in controls) if c is not None)
        self.sides: list[tuple[Control, ...]] = [controls, absent]
        self.image_share, self.plain = image_share, absent  # plain: the controls of the prompt without references
        self.backbone = borrow(self.native) if controls else None

    def forward(self, **kwargs: Any) -> Any:
        """The transformer's forward. `prepare` runs at each side's first prediction, when its prompt is known."""
        index, side = self.count()
        if self.backbone is None:
            return self.native(**kwargs)
        inputs = inputs_of(FluxInputs, kwargs)
        with Onloaded(self.native):
            if self.calls == 1:
                schedule = self.host.scheduler.timesteps.to(inputs.timestep.dtype) / 1000
                self.levels = levels_from(schedule, float(inputs.timestep[0]))
            if index == 0:
                run = run_of(self.backbone, inputs)
                self.sides[side] = tuple(control.prepare(run) for control in self.sides[side])
                if side == 0 and self.image_share is not None:
                    self.plain = tuple(control.prepare(run) for control in self.plain)
            step = Step(index, self.host.num_timesteps, self.levels[index])
            acting = [c for c in (control.at(step) for control in self.sides[side]) if c is not None]
            if acting:
                out = predict(self.backbone, inputs, acting)
                if side == 0 and self.image_share is not None:
                    plain = [c for c in (control.at(step) for control in self.plain) if c is not None]
                    text = predict(self.backbone, inputs, plain)
                    out = text + self.image_share * (out - text)
                return output_of(out, inputs.return_dict)
        return self.native(**kwargs)


def predict(backbone: MMDiT, inputs: FluxInputs, acting: Sequence[Control]) -> Tensor:
    """A prediction of condit's MM-DiT."""
    return run(backbone, inputs, [*acting, BlockResiduals(residuals(backbone, inputs))])


def output_of(out: Tensor, return_dict: bool) -> Transformer2DModelOutput | tuple[Tensor]:
    """As diffusers' output, or as a tuple."""
    if not return_dict:
        return (out,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=out)


def run(backbone: MMDiT, inputs: FluxInputs, controls: Sequence[Control]) -> Tensor:
    """The velocity (B, N, C) that condit's MM-DiT predicts."""
    ids = without_batch(inputs.img_ids)
    image = Stream(inputs.hidden_states, ids, inputs.timestep, inputs.pooled_projections, inputs.guidance)
    return backbone(
        image,
        inputs.encoder_hidden_states,
        without_batch(inputs.txt_ids),
        conditions=[stream for control in controls for stream in control.streams()],
        controls=controls,
    )


def apart(backbone: MMDiT, inputs: FluxInputs) -> Apart:
    """`Run.apart`: predictions under the prompt of these inputs, without the residuals of a ControlNet."""

    def predict_apart(
        x0: Tensor, noise: Tensor, step: Step, controls: Sequence[Control] = (), text: Text | None = None
    ) -> Tensor:
        x = ((1 - step.t) * x0 + step.t * noise).to(inputs.hidden_states.dtype)
        given = replace(inputs, hidden_states=x, timestep=torch.full_like(inputs.timestep, step.t))
        if text is not None:
            ids = without_batch(inputs.txt_ids).new_zeros(text.tokens.shape[1], 3)
            words = {"encoder_hidden_states": text.tokens, "pooled_projections": text.pooled}
            given = replace(given, txt_ids=ids, **words)
        return run(backbone, given, controls)

    return predict_apart


def run_of(backbone: MMDiT, inputs: FluxInputs) -> Run:
    """The call as controls see it; positions give the grid. ValueError unless tokens fill the grid."""
    ids = without_batch(inputs.img_ids)
    grid = int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
    if grid[0] * grid[1] != len(ids):
        raise ValueError(f"{len(ids)} image tokens on a grid of {grid[0]} x {grid[1]}; expected a full grid.")
    batch, channels = len(inputs.hidden_states), backbone.config.in_channels
    shape = batch, grid, inputs.pooled_projections, inputs.guidance, channels
    return Run(backbone, *shape, apart=apart(backbone, inputs))


def without_batch(ids: Tensor) -> Tensor:
    """Positions (N, 3); older pipelines pass (B, N, 3), equal for all images."""
    return ids[0] if ids.ndim == 3 else ids


# ControlNets


@dataclass(frozen=True)
class BlockResiduals(Control):
    """The residuals (B, N, dim) of a ControlNet after each block, by the path of the block's attention."""

    after: Mapping[str, Tensor]

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        return self.after.get(site.path)


def residuals(backbone: MMDiT, inputs: FluxInputs) -> dict[str, Tensor]:
    """n samples for L blocks: each is for ceil(L / n) adjacent blocks; or, repeated (XLabs), for every n-th block."""
    split = backbone.config.num_layers
    by_path = {}
    for sites, samples, repeat in (
        (backbone.sites[:split], inputs.controlnet_block_samples, inputs.controlnet_blocks_repeat),
        (backbone.sites[split:], inputs.controlnet_single_block_samples, False),
    ):
        if samples is None or len(samples) == 0:
            continue
        each = -(-len(sites) // len(samples))
        for i, site in enumerate(sites):
            by_path[site.path] = samples[i % len(samples) if repeat else i // each]
    return by_path


# The transformer's layers


class BorrowedFluxLinear(BorrowedLinear):
    """A layer of diffusers' transformer. A LoRA of diffusers acts on text and noisy image, not on conditions."""

    def forward(self, input: Tensor, lora: LowRank | None = None) -> Tensor:
        if lora is None:
            return self.native(input)
        # A condition uses the base layer and its own LoRA. The official code does so in the layers that it adapts; in
        # the others a LoRA of diffusers acts on conditions too.
        y = self.base(input)
        delta = lora.delta(self.path, input)
        return y if delta is None else y + delta

    @property
    def base(self) -> nn.Module:
        """The layer inside peft's wrapper, or the layer itself."""
        if not hasattr(self.native, "get_base_layer"):
            return self.native
        return cast("Callable[[], nn.Module]", self.native.get_base_layer)()


def borrow(transformer: nn.Module) -> MMDiT:
    """condit's MM-DiT with the layers of diffusers' transformer, whose names are the same."""
    transformer = plain(transformer)
    with torch.device("meta"):
        backbone = MMDiT(config_of(transformer))
    return with_layers(backbone, transformer, BorrowedFluxLinear, (RMSNorm,))


def config_of(transformer: nn.Module) -> MMDiTConfig:
    """condit's configuration of diffusers' transformer; the fields have the same names. ValueError for others."""
    public = {k: v for k, v in native(transformer).config.items() if not k.startswith("_")}
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in public.items()}
    unknown = sorted(fields.keys() - MMDiTConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"The transformer's configuration has {unknown[0]!r}, which FLUX.1's does not. Another model?")
    return MMDiTConfig(**fields)


# The arguments of a call


def size_of(pipe: NativePipeline) -> tuple[int, int]:
    side = pipe.default_sample_size * pipe.vae_scale_factor
    return side, side


def stand_in(
    guest: GuestPipeline, host: NativePipeline, controls: tuple[Control, ...], arguments: Arguments
) -> ControlledTransformer:
    if controls:
        size = image_size(guest.pipe, arguments, guest.pixels)
        controls = tuple(control.sized(size, guest) for control in controls)
    predictions = predictions_a_step(arguments)
    scale: float | None = arguments["image_guidance_scale"]
    share = None if scale is None else scale / (arguments["true_cfg_scale"] if predictions > 1 else 1.0)
    return ControlledTransformer(guest, controls, host, predictions, share)


def image_size(pipe: NativePipeline, arguments: Arguments, pixels: int) -> tuple[int, int]:
    """Height and width of the generated images, by diffusers' rule."""
    sides = zip(("height", "width"), size_of(pipe), strict=True)
    height, width = (cast("int", arguments.get(name) or side) // pixels * pixels for name, side in sides)
    return height, width


def predictions_a_step(arguments: Arguments) -> int:
    """2 with `true_cfg_scale` and a negative prompt, by diffusers' rule; else 1."""
    embedded = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    negative = arguments.get("negative_prompt") is not None or all(arguments.get(name) is not None for name in embedded)
    return 2 if cast("float", arguments.get("true_cfg_scale", 1.0)) > 1 and negative else 1


def refusal(transformer: nn.Module, control: Control) -> str | None:
    if control.fill() is None and "adapt" not in control.acts:
        return None
    return (
        "leaves cells out or adapts the noisy tokens, which a guest does not. Use diffusers' own inpainting and LoRA "
        "loading, or condit.load(folder)."
    )


FLUX = PipelineFamily(
    pipelines=PIPELINES,
    part="transformer",
    model="FluxTransformer2DModel",
    cells=2,
    size=size_of,
    config_of=config_of,
    borrow=borrow,
    stand_in=stand_in,
    refusal=refusal,
)
