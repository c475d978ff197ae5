"""Stable Diffusion 1.x, 2.x and SDXL in diffusers' pipelines: condit's UNet with the layers of diffusers' UNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from condit.backbones.unet import KeyValues, UNet, UNetConfig
from condit.controls.control import Apart, Control, Run, Step
from condit.controls.wrap import sides
from condit.diffusion.vp import add_noise, interpolate
from condit.encoders.text import Text
from condit.interop.lend import (
    Arguments,
    BorrowedLinear,
    GuestPipeline,
    HostScheduler,
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
from condit.nn.lora import LowRank, sum_loras
from condit.weights.stable_diffusion import unet_config

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

# Pipelines with one negative prompt, which comes first in the batch. InstructPix2Pix has three sides of guidance;
# GLIGEN has other layers.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLAdapterPipeline",
)
# Processors that compute plain attention. Others, such as those of diffusers' IP-Adapter, replace them.
PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"}


@dataclass(frozen=True)
class UNetInputs:
    """The arguments of diffusers' `UNet2DConditionModel.forward` by name; timestep in [0, 1000)."""

    sample: Tensor
    timestep: Tensor | float
    encoder_hidden_states: Tensor
    class_labels: Tensor | None = None
    timestep_cond: Tensor | None = None
    attention_mask: Tensor | None = None
    cross_attention_kwargs: Mapping[str, object] | None = None
    added_cond_kwargs: Mapping[str, Tensor] | None = None
    down_block_additional_residuals: Sequence[Tensor] | None = None
    mid_block_additional_residual: Tensor | None = None
    down_intrablock_additional_residuals: Sequence[Tensor] | None = None
    encoder_attention_mask: Tensor | None = None
    return_dict: bool = True

    def __post_init__(self):
        refuse_kwargs("cross_attention_kwargs", self.cross_attention_kwargs)
        unsupported = [f.name for f in fields(self) if f.name in _UNSUPPORTED and getattr(self, f.name) is not None]
        if unsupported:
            raise ValueError(f"condit's UNet does not support {unsupported[0]}. Call without it, or without controls.")
        texts = {"prompt_embeds": self.encoder_hidden_states, **(self.added_cond_kwargs or {})}
        wrong = next((name for name, rows in texts.items() if len(rows) != len(self.sample)), None)
        if wrong is not None:
            raise ValueError(
                f"{wrong} has {len(texts[wrong])} rows for {len(self.sample)} latents. A callback that switches the "
                "guidance off must cut prompt_embeds (for SDXL add_text_embeds, add_time_ids too) to their last half."
            )

    def rows(self, index: slice) -> UNetInputs:
        """Some rows of the batch."""
        batch = len(self.sample)

        def select(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x[index] if x.ndim and len(x) == batch else x
            if isinstance(x, Mapping):
                return {name: select(value) for name, value in x.items()}
            return [select(value) for value in x] if isinstance(x, list | tuple) else x

        return replace(self, **{field.name: select(getattr(self, field.name)) for field in fields(self)})


_UNSUPPORTED = {"class_labels", "attention_mask", "encoder_attention_mask"}


class ControlledUNet(StandIn):
    """Replaces a UNet, which predicts once a step for all sides of the guidance: the negative prompts' rows, then the
    prompts'. host: the pipeline of the call, with its number of steps and whether it is guided, which a callback may
    change. image_scale: the guidance of the controls, if it is another than the text's."""

    def __init__(
        self,
        guest: GuestPipeline,
        controls: tuple[Control, ...],
        host: NativePipeline,
        image_scale: float | None = None,
    ):
        super().__init__(guest, controls, host)
        self.guest, self.image_scale = guest, image_scale
        self.sides: list[tuple[Control, ...]] = []  # the negative prompt's, if it is guided, and the prompt's
        self.plain: tuple[Control, ...] = ()  # those of the prompt without references
        self.backbone = borrow(self.native) if controls else None
        self.cached: tuple[Tensor, KeyValues] | None = None  # the last states of `text`, and their keys and values

    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        """The UNet's forward. Controls are prepared at the first step, when the prompt is known."""
        index, _ = self.count()
        if self.backbone is None:
            return self.native(sample, timestep, encoder_hidden_states, **kwargs)
        required = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        inputs = inputs_of(UNetInputs, {**required, **kwargs})
        if index == 0:
            # Not before the loop, as image to image takes its size from the image. The autoencoder may replace the
            # UNet on the device meanwhile.
            size = sample.shape[-2] * self.guest.pixels, sample.shape[-1] * self.guest.pixels
            self.controls = tuple(control.sized(size, self.guest) for control in self.controls)
        guided = self.host.do_classifier_free_guidance
        rows = len(sample) // (1 + guided)
        with Onloaded(self.native):
            if index == 0:
                self.levels = levels_from(self.host.scheduler.timesteps, float(timestep))
            if len(self.sides) < 1 + guided:
                parts = prepared(self.backbone, self.controls, inputs, self.host, plain=self.image_scale is not None)
                self.sides, self.plain = parts[: 1 + guided], parts[-1]
            step = Step(index, self.steps, self.levels[index] / train_steps(self.host.scheduler))
            acting = [at(side, step) for side in self.sides[-1 - guided :]]
            if any(acting):
                out = predict(self.backbone, inputs, acting, self.text)
                if self.image_scale is not None:
                    share = self.image_scale / (self.host.guidance_scale if guided else 1.0)
                    out = self.shared(out, inputs.rows(slice(-rows, None)), at(self.plain, step), share)
                return output_of(out, inputs.return_dict)
        return self.native(sample, timestep, encoder_hidden_states, **kwargs)

    def shared(self, out: Tensor, inputs: UNetInputs, plain: Sequence[Control], share: float) -> Tensor:
        """The prediction with other last rows c, of which the pipeline makes none + s_T (c - none): it then is none +
        s_T (text - none) + s_T share (both - text). inputs: of the last rows; plain: the controls of the text."""
        assert self.backbone is not None
        n = len(inputs.sample)
        text = predict(self.backbone, inputs, [plain], self.backbone.text_keys_values)
        return torch.cat([out[:-n], text + share * (out[-n:] - text)])

    def text(self, states: Tensor) -> KeyValues:
        """Keys and values of the text, computed once a run."""
        assert self.backbone is not None
        if self.cached is None or self.cached[0] is not states:
            self.cached = states, self.backbone.text_keys_values(states)
        return self.cached[1]


def train_steps(scheduler: HostScheduler) -> int:
    return scheduler.config["num_train_timesteps"]


def at(controls: Sequence[Control], step: Step) -> list[Control]:
    """Those that act at a step."""
    return [c for c in (control.at(step) for control in controls) if c is not None]


def prepared(
    backbone: UNet, controls: Sequence[Control], inputs: UNetInputs, host: NativePipeline, *, plain: bool
) -> list[tuple[Control, ...]]:
    """The controls of each side of the guidance for a run; plain: and last those of the prompts without references."""
    absent = [c for c in (control.negative() for control in controls) if c is not None]
    guided = host.do_classifier_free_guidance
    batch, memory, result = len(inputs.sample) // (1 + guided), {}, []
    prompts = slice(-batch, None)
    for part, which in [(absent, slice(batch))] * guided + [(controls, prompts)] + [(absent, prompts)] * plain:
        rows = inputs.rows(which)
        run = replace(run_of(backbone, rows, memory), apart=apart(backbone, rows, host.scheduler))
        result.append(tuple(control.prepare(run) for control in part))
    return result


def run_of(backbone: UNet, inputs: UNetInputs, memory: dict) -> Run:
    """The rows of one side as controls see them."""
    x = inputs.sample
    pooled = (inputs.added_cond_kwargs or {}).get("text_embeds", x.new_zeros(len(x), 0))
    grid = int(x.shape[-2]), int(x.shape[-1])
    shape = len(x), grid, pooled, None, backbone.config.out_channels
    return Run(backbone, *shape, memory=memory)  # type: ignore[arg-type]  # a UNet takes no streams, so it has no prefill


def apart(backbone: UNet, inputs: UNetInputs, scheduler: HostScheduler) -> Apart:
    """`Run.apart`: predictions under the prompt of these inputs, without the residuals of a ControlNet or T2I-Adapter.
    A UNet of inpainting sees the mask and the masked image of the call."""
    inputs = replace(
        inputs,
        down_block_additional_residuals=None,
        mid_block_additional_residual=None,
        down_intrablock_additional_residuals=None,
    )
    given = inputs.sample[:, backbone.config.out_channels :]
    keys_values = cache(backbone.text_keys_values)
    levels: Tensor | None = getattr(scheduler, "alphas_cumprod", None)
    table = None if levels is None else levels.cpu().double()  # read once: reading it in a step would wait

    def predict_apart(
        x0: Tensor, noise: Tensor, step: Step, controls: Sequence[Control] = (), text: Text | None = None
    ) -> Tensor:
        if table is None:
            raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod, which a separate prediction needs.")
        time = step.t * train_steps(scheduler)
        # Networks read sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise whatever the unit of the scheduler's latents.
        x = add_noise(x0, noise, interpolate(table, torch.tensor([time], dtype=torch.float64))[0])
        x = torch.cat([x.to(given), given], 1)
        level = torch.full((), time, device=x.device)
        seen = replace(inputs, sample=x, timestep=level)
        if text is not None:
            added = {**(inputs.added_cond_kwargs or {}), "text_embeds": text.pooled}  # which SD 1.x does not read
            seen = replace(seen, encoder_hidden_states=text.tokens, added_cond_kwargs=added)
        return run(backbone, seen, keys_values(seen.encoder_hidden_states), None, controls)

    return predict_apart


def predict(
    backbone: UNet, inputs: UNetInputs, acting: Sequence[Sequence[Control]], text: Callable[[Tensor], KeyValues]
) -> Tensor:
    """A prediction of condit's UNet. A LoRA acts on all rows, so each side runs on its own if there is one."""
    loras = [sum_loras(control.lora() for control in side) for side in acting]
    if any(lora is not None for lora in loras):
        n = len(inputs.sample) // len(acting)
        parts = [inputs.rows(slice(i * n, (i + 1) * n)) for i in range(len(acting))]
        predictions = [
            run(backbone, p, p.encoder_hidden_states, lora, side)
            for p, lora, side in zip(parts, loras, acting, strict=True)
        ]
        return torch.cat(predictions)
    return run(backbone, inputs, text(inputs.encoder_hidden_states), None, sides(acting))


def output_of(out: Tensor, return_dict: bool) -> UNet2DConditionOutput | tuple[Tensor]:
    """As diffusers' output, or as a tuple."""
    if not return_dict:
        return (out,)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return UNet2DConditionOutput(sample=out)


def run(
    backbone: UNet, inputs: UNetInputs, text: Tensor | KeyValues, lora: LowRank | None, controls: Sequence[Control]
) -> Tensor:
    """The output of condit's UNet, (B, C, H, W)."""
    x, added = inputs.sample, inputs.added_cond_kwargs or {}
    t = torch.as_tensor(inputs.timestep, device=x.device).expand(len(x))
    down, middle = inputs.down_block_additional_residuals, inputs.mid_block_additional_residual
    residuals = [] if down is None or middle is None else [*down, middle]
    return backbone(
        x,
        t,
        text,
        pooled=added.get("text_embeds"),
        sizes=added.get("time_ids"),
        lora=lora,
        controls=controls,
        residuals=residuals,
        features=inputs.down_intrablock_additional_residuals or (),
        guidance=inputs.timestep_cond,
    )


# The UNet's layers


def borrow(unet: nn.Module) -> UNet:
    """condit's UNet with the layers of diffusers' UNet, whose names are the same."""
    unet = plain(unet)
    with torch.device("meta"):
        backbone = UNet(config_of(unet))
    return with_layers(backbone, unet, BorrowedLinear, (nn.GroupNorm, nn.LayerNorm))


def config_of(unet: nn.Module) -> UNetConfig:
    """condit's configuration of diffusers' UNet. ValueError for a UNet that is not Stable Diffusion's."""
    return unet_config(dict(native(unet).config), type(unet).__name__)


# The arguments of a call


def size_of(pipe: NativePipeline) -> tuple[int, int]:
    side: int | Sequence[int] = native(pipe.unet).config["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def stand_in(
    guest: GuestPipeline, host: NativePipeline, controls: tuple[Control, ...], arguments: Arguments
) -> ControlledUNet:
    if controls:
        refuse_changed(guest.network)
    return ControlledUNet(guest, controls, host, arguments["image_guidance_scale"])


def refuse_changed(unet: nn.Module) -> None:
    """ValueError if diffusers has changed the UNet in a way that condit's UNet would ignore."""
    processors = native(unet).attn_processors.values()
    unsupported = sorted({type(processor).__name__ for processor in processors} - PROCESSORS)
    if unsupported or getattr(plain(unet), "encoder_hid_proj", None) is not None:
        raise ValueError(
            f"This UNet has {unsupported[0] if unsupported else 'an image projection'} of diffusers, which controls do "
            "not support. Use pipe.unload_ip_adapter() or pipe.unet.set_default_attn_processor(), and condit.IPAdapter."
        )
    if any(getattr(block, "b1", None) is not None for block in native(unet).up_blocks):
        raise ValueError("FreeU scales the skips, which controls do not support. Use pipe.disable_freeu().")


def refusal(unet: nn.Module, control: Control) -> str | None:
    if not control.acts & {"join", "omit"}:
        return None
    return "joins tokens to the sequence, and a UNet has none. Use a control that wraps attention: condit.IPAdapter."


STABLE_DIFFUSION = PipelineFamily(
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
