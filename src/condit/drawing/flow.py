"""Rectified flow on an MM-DiT: FLUX.1 and the embedded `tiny`. Latents are packed tokens (B, N, C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from condit.controls.control import Act, Control, Run
from condit.diffusion.guidance import guide, guide_text_image
from condit.diffusion.inversion import Solver as InversionSolver
from condit.diffusion.objectives import Prediction, to_velocity
from condit.diffusion.samplers import FlowPath, euler
from condit.diffusion.schedules import flow_sigmas, flux_mu
from condit.diffusion.steps import Path, Step
from condit.drawing.model import (
    Conditions,
    Layout,
    Network,
    Sampler,
    check_shape,
    common_sides,
    latent_cell,
    module_device,
    module_dtype,
    rows_for,
)
from condit.drawing.settings import Settings, negative_prompts, prompt_list
from condit.encoders.prompts import warn_syntax
from condit.encoders.text import FluxText, Text, join_texts
from condit.encoders.vae import decode_tokens, encode_tokens, pack
from condit.nn.lora import sum_loras
from condit.nn.offload import OffloadedBlocks, move_parts, on_device, with_blocks
from condit.nn.streams import Stream, grid_ids
from condit.weights.parts import Parts

M = TypeVar("M")


class FlowModel:
    """See `condit.drawing.model.Model`. Guidance is an input of FLUX.1-dev's network (`parts.distilled`), so it has a
    second prediction only to guide the controls."""

    reads: Literal["prompt", "class", "nothing"] = "prompt"
    supports = frozenset({"guidance_scale", "image_guidance_scale", "eta", "strength", "max_sequence_length"})
    kinds = ("pil", "pt", "np", "latent")
    fewest_steps = 1
    repaints = False

    def __init__(self, parts: Parts, offload: str | None = None):
        if offload not in (None, "encoders", "blocks"):
            raise ValueError(f"offload must be 'encoders', 'blocks' or None; found {offload!r}.")
        if offload == "blocks":
            parts = replace(parts, backbone=with_blocks(parts.backbone, OffloadedBlocks))
        self.parts, self.backbone, self.offload = parts, parts.backbone, offload

    # Devices

    def to(self, device: str | torch.device) -> None:
        moving = (self.parts.image,) if self.offload else (self.parts.text, self.parts.vae, self.parts.image)
        move_parts(self.backbone, moving, device)

    def on_duty(self, part: M) -> M:
        """The text encoder or the autoencoder on its device."""
        if not self.offload or not isinstance(part, nn.Module):
            return part
        return cast("M", on_device(part, module_device(self.backbone)))

    # Values of a call

    def settings(self, requested: Settings, prompt: object) -> Settings:
        parts = self.parts
        settings = requested.filled(num_inference_steps=parts.steps, guidance_scale=parts.guidance, eta=parts.eta)
        if settings.eta is None or not 0 <= settings.eta <= 1:
            raise ValueError(f"eta must be 0 to 1; found {settings.eta}.")
        if parts.name == "tiny" and settings.size != parts.size:
            raise ValueError(
                f"{parts.name} generates {parts.size[0]} x {parts.size[1]}; found {settings.height} x {settings.width}."
            )
        return settings

    def describe(self, prompt: object, negative: object, settings: Settings) -> dict[str, object]:
        prompts = None if isinstance(prompt, Text) else prompt_list(prompt)
        count = self.count(prompt)
        return {
            "prompt": prompts,
            "negative_prompt": None if isinstance(negative, Text) else negative_prompts(negative, count),
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.scale,
            "image_guidance_scale": settings.image_guidance_scale,
            "eta": settings.eta,
            **({} if settings.max_sequence_length is None else {"max_sequence_length": settings.max_sequence_length}),
            "height": settings.height,
            "width": settings.width,
        }

    def count(self, prompt: object) -> int:
        return len(prompt.tokens) if isinstance(prompt, Text) else len(prompt_list(prompt))

    def conditions(self, prompt: object, negative: object, settings: Settings) -> Conditions[Text]:
        count = self.count(prompt)
        if self.parts.distilled and negative:
            raise ValueError(
                f"{self.parts.name} has guidance as an input and no unconditional prediction, so that a negative "
                "prompt has no effect. Leave it out."
            )
        other = negative if isinstance(negative, Text) else negative_prompts(negative, count)

        def condition(positive: bool) -> Text:
            text = self.encode_text(prompt if positive else other, limit=settings.max_sequence_length)
            return rows_for(text, count, settings.copies)

        return condition

    def encode_text(self, prompt: object, clip_skip: int | None = None, *, limit: int | None = None) -> Text:
        """limit: of T5's tokens, FLUX.1's `max_sequence_length`."""
        if clip_skip is not None:
            raise ValueError(f"{self.parts.name} does not support clip_skip.")
        if not isinstance(prompt, Text):
            prompts, encoder = prompt_list(prompt), self.on_duty(self.parts.text)
            warn_syntax(prompts)
            if limit is not None and not isinstance(encoder, FluxText):
                raise ValueError(f"{self.parts.name} does not support max_sequence_length; found {limit}.")
            text = cast("Text", encoder(prompts) if limit is None else encoder(prompts, limit))
        else:
            text = prompt
        return text.to(module_device(self.backbone), module_dtype(self.backbone))

    def refuse(self, control: Control) -> str | None:
        return None

    # Sizes

    @property
    def size(self) -> tuple[int, int]:
        return self.parts.size

    @property
    def token(self) -> int:
        return 2 * latent_cell(self.parts.vae)

    @property
    def channels(self) -> int:
        """Of a latent, before it is packed."""
        return (self.backbone.config.out_channels or self.backbone.config.in_channels) // 4

    def cells_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return self.channels, 2 * size[0] // self.token, 2 * size[1] // self.token

    @property
    def fixed_size(self) -> bool:
        return bool(getattr(self.parts.text, "canvas", None))  # a text's canvas has the tokens of one size

    # Latents

    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        if generators is None:
            return self.encode_together(images, None).float()
        rows = [self.encode_together(image[None], g) for image, g in zip(images, generators, strict=True)]
        return torch.cat(rows).float()

    def encode_together(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """All images in one pass; by `generator` samples of the posterior."""
        vae = self.on_duty(self.parts.vae)
        return encode_tokens(vae, images.to(module_dtype(vae)), generator, sample=generator is not None)

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        vae = self.on_duty(self.parts.vae)
        return decode_tokens(vae, latents.to(module_dtype(vae)), layout.grid).float()

    def arrange(self, cells: Tensor, layout: Layout) -> Tensor:
        tokens = pack(cells)
        return tokens if layout.cells is None else tokens[:, layout.cells.to(tokens.device)]

    def check_latents(self, latents: Tensor, layout: Layout) -> Tensor:
        check_shape(latents, (layout.batch, layout.grid[0] * layout.grid[1], 4 * self.channels), "packed tokens")
        return latents if layout.cells is None else latents[:, layout.cells.to(latents.device)]

    def spread(self, mask: Tensor, layout: Layout) -> Tensor:
        return mask[..., None]

    def first(self, noise: Tensor, path: FlowPath) -> Tensor:
        return noise

    def noised(self, x0: Tensor, noise: Tensor, path: FlowPath, level: int) -> Tensor:
        return (1 - path.sigmas[level]) * x0 + path.sigmas[level] * noise

    def check_output(self, output_type: str) -> None:
        pass

    def noised_at(self, x0: Tensor, noise: Tensor, step: Step) -> Tensor:
        return (1 - step.t) * x0 + step.t * noise

    # A run

    def path(self, settings: Settings, layout: Layout) -> tuple[Sampler, Path]:
        tokens = layout.grid[0] * layout.grid[1] if layout.cells is None else len(layout.cells)
        sigmas = flow_sigmas(settings.steps, shift=self.parts.shift_of(tokens))
        return euler, FlowPath(tuple(sigmas.tolist()))

    def draws_noise(self, settings: Settings) -> bool:
        return bool(settings.eta)

    inversion: tuple[InversionSolver, int] | None = ("fixed_point", 2)

    def edit_path(self, steps: int, layout: Layout, solver: InversionSolver) -> FlowPath:
        shift = self.parts.shift
        shift = math.exp(flux_mu(layout.grid[0] * layout.grid[1])) if shift is None else shift
        return FlowPath(tuple(flow_sigmas(steps, shift=shift).tolist()))

    def edit_output(self, output: Tensor, x: Tensor, path: FlowPath, time: float) -> Tensor:
        return output

    def step_at(self, t: float) -> Step:
        return Step(0, 1, t, t)

    def sides(self, settings: Settings, controlled: bool) -> list[tuple[bool, bool]]:
        if self.parts.distilled:
            guided = settings.image_guidance_scale not in (None, 1.0)
            return [(True, True), *([(True, False)] if guided else [])]
        return common_sides(settings, controlled)

    def run(self, condition: Text, layout: Layout, settings: Settings, controls: Sequence[Control]) -> Run:
        return Run(
            self.backbone,
            layout.batch,
            layout.grid,
            condition.pooled,
            self.guidance(layout.batch, settings),
            self.backbone.config.in_channels,
            layout.cells,
            sum_loras(c.leak() for c in controls),
            layout.memory,
            layout.edit,
        )

    def guidance(self, batch: int, settings: Settings) -> Tensor | None:
        """The network's own input (B,), of FLUX.1-dev."""
        if not self.backbone.config.guidance_embeds:
            return None
        device, dtype = module_device(self.backbone), module_dtype(self.backbone)
        return torch.full((batch,), settings.scale, device=device, dtype=dtype)

    def joins(self, settings: Settings, acts: frozenset[Act]) -> bool:
        return False  # streams and caches of a control belong to one side

    def network(
        self, conditions: Sequence[Text], layout: Layout, settings: Settings, extra: Tensor | None = None
    ) -> Network:
        text = join_texts(conditions)
        device, dtype = module_device(self.backbone), module_dtype(self.backbone)
        ids = grid_ids(*layout.grid).to(device)
        canvas = text.canvas
        if layout.cells is not None:
            ids = ids[layout.cells]
            canvas = None if canvas is None else canvas[:, layout.cells]
        canvas = None if canvas is None else canvas.to(dtype)
        text_ids = torch.zeros(text.tokens.shape[1], 3, device=device)
        guidance = self.guidance(len(text.tokens), settings)

        def velocity(x: Tensor, step: Step, controls: Sequence[Control]) -> Tensor:
            t = torch.full((len(x),), step.time, device=device)
            tokens = x.to(dtype)
            if canvas is not None:
                tokens = torch.cat([tokens, canvas], -1)
            lora = sum_loras(control.lora() for control in controls)
            image = Stream(tokens, ids, t.to(dtype), text.pooled, guidance, lora)
            streams = [stream for control in controls for stream in control.streams()]
            out = self.backbone(image, text.tokens, text_ids, conditions=streams, controls=controls)
            return to_velocity(out.float(), x, t, cast("Prediction", self.parts.prediction))

        return velocity

    def guide(self, outputs: Sequence[Tensor], step: Step, settings: Settings) -> Tensor:
        image_scale = 1.0 if settings.image_guidance_scale is None else settings.image_guidance_scale
        if len(outputs) == 2:
            return guide(outputs[0], outputs[1], image_scale if self.parts.distilled else settings.scale)
        return guide_text_image(outputs[0], outputs[1], outputs[2], settings.scale, image_scale)
