"""Variance-preserving diffusion in latents: Stable Diffusion 1.x, 2.x, SDXL and PixArt. Latents are (B, C, h, w)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from condit.backbones.pixart import PixArt
from condit.backbones.unet import UNet
from condit.controls.control import Act, Control, Run
from condit.diffusion.guidance import guide, guide_text_image, rescale
from condit.diffusion.inversion import NoisePath, ddim_path, dpm_path, level_of
from condit.diffusion.inversion import Solver as InversionSolver
from condit.diffusion.steps import Path, Step
from condit.diffusion.vp import Process, Solver, VPPath, add_noise, interpolate, make_path, step_count, with_sampler
from condit.diffusion.vp_samplers import estimate, sample
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
from condit.drawing.schedulers import Scheduler, SchedulerPath, find_sampler, run_scheduler, scheduler_path
from condit.drawing.settings import Settings, prompt_list
from condit.encoders.prompts import warn_syntax
from condit.encoders.text import ClipText, Text, join_texts
from condit.encoders.vae import decode_latents, encode_latents
from condit.nn.lora import sum_loras
from condit.nn.offload import OffloadedBlocks, move_parts, on_device, with_blocks
from condit.weights.latent_models import Frame, LatentParts

M = TypeVar("M")
SamplerName = Literal["ddim", "ddim-ldm", "dpm++", "dpm++-karras", "euler", "euler-karras", "euler-ancestral"]
SAMPLERS = get_args(SamplerName)


class VPModel:
    """See `condit.drawing.model.Model`. The differences between networks are in `LatentParts`."""

    reads: Literal["prompt", "class", "nothing"] = "prompt"
    supports = frozenset(
        {
            "guidance_scale",
            "guidance_rescale",
            "guidance_in_one_call",
            "image_guidance_scale",
            "sampler",
            "timesteps",
            "eta",
            "strength",
            "clip_skip",
            "original_size",
            "crops_coords_top_left",
            "target_size",
        }
    )
    kinds = ("pil", "pt", "np", "latent")
    fewest_steps = 1
    fixed_size = False

    def __init__(self, parts: LatentParts, offload: str | None = None):
        backbone = with_blocks(parts.backbone, OffloadedBlocks) if offload == "blocks" else parts.backbone
        self.parts, self.backbone, self.offload = parts, cast("UNet | PixArt", backbone), offload

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
        settings = requested.filled(
            num_inference_steps=step_count(requested.num_inference_steps, requested.timesteps, self.parts.steps),
            guidance_scale=self.parts.guidance,
            guidance_rescale=0.0,
            guidance_in_one_call=True,
            eta=0.0,
            original_size=requested.size,
            crops_coords_top_left=(0, 0),
            target_size=requested.size,
        )
        if self.scheduler(settings) is None:
            self.solver(settings)
        return settings

    def scheduler(self, settings: Settings) -> Scheduler | None:
        """The scheduler of diffusers that a sampler's name means; None for condit's own samplers."""
        sampler = None if settings.sampler is None else find_sampler(settings.sampler, SAMPLERS)
        return sampler if isinstance(sampler, Scheduler) else None

    def solver(self, settings: Settings) -> tuple[Solver, Process]:
        """The solver and the process with its levels, of a sampler's name."""
        sampler, own = settings.sampler, self.parts.solver
        sampler = None if sampler is None else cast("str", find_sampler(sampler, SAMPLERS))
        if sampler is None and own is None:
            raise ValueError(
                f"The scheduler of {self.parts.name} is not supported. Pass sampler=, one of {', '.join(SAMPLERS)}."
            )
        name = sampler or own or ""
        solver, process = with_sampler(self.parts.process, name)
        if settings.eta is None or not 0 <= settings.eta <= 1 or (settings.eta and solver != "ddim"):
            raise ValueError(f"eta is the noise of sampler='ddim', 0 to 1; found {settings.eta} with {solver!r}.")
        return cast("Solver", solver), process

    def describe(self, prompt: object, negative: object, settings: Settings) -> dict[str, object]:
        sampler = settings.sampler
        if sampler is None:
            solver, process = self.solver(settings)
            sampler = solver + ("-karras" if process.use_karras_sigmas else "")
        return {
            "prompt": _words(prompt),
            "negative_prompt": _words(negative),
            "num_inference_steps": settings.steps,
            "timesteps": None if settings.timesteps is None else list(settings.timesteps),
            "sampler": sampler,
            "eta": settings.eta,
            "guidance_scale": settings.scale,
            "guidance_rescale": settings.guidance_rescale,
            "image_guidance_scale": settings.image_guidance_scale,
            "clip_skip": settings.clip_skip,
            "height": settings.height,
            "width": settings.width,
            "original_size": list(settings.original_size or ()),
            "crops_coords_top_left": list(settings.crops_coords_top_left or ()),
            "target_size": list(settings.target_size or ()),
        }

    def count(self, prompt: object) -> int:
        return len(prompt.tokens) if isinstance(prompt, Text) else len(prompt_list(prompt))

    def conditions(self, prompt: object, negative: object, settings: Settings) -> Conditions[Text]:
        count = self.count(prompt)

        @cache
        def condition(positive: bool) -> Text:
            if not positive and negative is None and self.parts.zero_negative:
                return condition(True).each(torch.zeros_like)
            if positive:
                text = self.encode_text(prompt, settings.clip_skip)
            else:
                # As in diffusers, where clip_skip does not apply to the negative prompt.
                text = self.encode_text("" if negative is None else negative, None)
            return rows_for(text, count, settings.copies)

        return condition

    def encode_text(self, prompt: object, clip_skip: int | None = None) -> Text:
        if not isinstance(prompt, Text):
            prompts, text = prompt_list(prompt), self.on_duty(self.parts.text)
            warn_syntax(prompts, weights=isinstance(self.parts.text, ClipText))
            prompt = text(prompts) if clip_skip is None else text(prompts, clip_skip=clip_skip)
        return prompt.to(module_device(self.backbone), module_dtype(self.backbone))

    def refuse(self, control: Control) -> str | None:
        if control.acts & {"join", "omit"}:
            return (
                f"joins tokens to the sequence, and {self.parts.name} takes none. Use a control that wraps attention, "
                "such as IPAdapter."
            )
        return None

    # Sizes

    @property
    def size(self) -> tuple[int, int]:
        return self.parts.size

    @property
    def cell(self) -> int:
        """Pixels of a latent cell's side."""
        return latent_cell(self.parts.vae)

    @property
    def patch(self) -> int:
        """Latent cells of a token's side: 1 on UNets."""
        return getattr(self.backbone.config, "patch_size", 1)

    @property
    def token(self) -> int:
        return self.cell * self.patch

    @property
    def channels(self) -> int:
        return self.parts.vae.config.latent_channels

    @property
    def repaints(self) -> bool:
        """Whether it is an inpainting model, which reads the mask and the image around it with the latents."""
        return self.backbone.config.in_channels == 2 * self.channels + 1

    def cells_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return self.channels, size[0] // self.cell, size[1] // self.cell

    # Latents

    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        return encode_latents(self.on_duty(self.parts.vae), images, generators)

    def encode_together(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        generators = None if generator is None else [generator] * len(images)
        return encode_latents(self.on_duty(self.parts.vae), images, generators)

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        return decode_latents(self.on_duty(self.parts.vae), latents)

    def arrange(self, cells: Tensor, layout: Layout) -> Tensor:
        return cells

    def check_latents(self, latents: Tensor, layout: Layout) -> Tensor:
        return check_shape(latents, (layout.batch, *self.cells_shape(layout.size)))

    def spread(self, mask: Tensor, layout: Layout) -> Tensor:
        grid = mask.unflatten(-1, layout.grid)[:, None]
        return grid.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)

    def first(self, noise: Tensor, path: VPPath | SchedulerPath) -> Tensor:
        return path.start * noise

    def noised(self, x0: Tensor, noise: Tensor, path: VPPath | SchedulerPath, level: int) -> Tensor:
        return add_noise(x0, noise, path.level[level])

    def check_output(self, output_type: str) -> None:
        pass

    def noised_at(self, x0: Tensor, noise: Tensor, step: Step) -> Tensor:
        table = self.parts.process.alphas_cumprod.double()
        return add_noise(x0, noise, interpolate(table, torch.tensor([step.time], dtype=torch.float64))[0])

    # A run

    def path(self, settings: Settings, layout: Layout) -> tuple[Sampler, Path]:
        if (scheduler := self.scheduler(settings)) is not None:
            return run_scheduler, scheduler_path(scheduler, self.parts.process, settings.steps, settings.timesteps)
        solver, process = self.solver(settings)
        return sample, make_path(process, solver, settings.steps, timesteps=settings.timesteps)

    def draws_noise(self, settings: Settings) -> bool:
        if self.scheduler(settings) is not None:
            return True  # it may
        return bool(settings.eta) or self.solver(settings)[0] == "euler-ancestral"

    @property
    def inversion(self) -> tuple[InversionSolver, int] | None:
        return ("dpmpp2m", 3) if hasattr(self.backbone.config, "patch_size") else None

    def edit_path(self, steps: int, layout: Layout, solver: InversionSolver) -> NoisePath:
        """Solvers "dpmpp2m" and "exact2m" walk DPM-Solver++'s levels at second order, the others at first order;
        "entered" DDIM's own."""
        process = self.parts.process
        if solver == "entered":
            return ddim_path(process.alphas_cumprod, steps)
        order = 2 if solver in ("dpmpp2m", "exact2m") else 1
        return dpm_path(process.alphas_cumprod, steps, order=order, to_zero=process.final_sigmas_type == "zero")

    def edit_output(self, output: Tensor, x: Tensor, path: NoisePath, time: float) -> Tensor:
        return estimate(output, x, level_of(path.between(time)), self.parts.process.prediction_type).eps

    def step_at(self, t: float) -> Step:
        return Step(0, 1, t, round(t * self.parts.process.num_train_timesteps, 6))

    def sides(self, settings: Settings, controlled: bool) -> list[tuple[bool, bool]]:
        return common_sides(settings, controlled)

    def run(self, condition: Text, layout: Layout, settings: Settings, controls: Sequence[Control]) -> Run:
        pooled, channels = condition.pooled, self.channels
        batch, grid, memory, pair = layout.batch, layout.grid, layout.memory, layout.edit
        return Run(self.backbone, batch, grid, pooled, None, channels, memory=memory, edit=pair)

    def joins(self, settings: Settings, acts: frozenset[Act]) -> bool:
        return bool(settings.guidance_in_one_call) and not acts & {"merge", "adapt"}

    def network(
        self, conditions: Sequence[Text], layout: Layout, settings: Settings, extra: Tensor | None = None
    ) -> Network:
        size = layout.size
        original, target = settings.original_size or size, settings.target_size or size
        frame = Frame(size, original, settings.crops_coords_top_left or (0, 0), target)
        network, dtype = self.parts.tell(self.backbone, join_texts(conditions), frame), module_dtype(self.backbone)

        def output(x: Tensor, step: Step, controls: Sequence[Control]) -> Tensor:
            if extra is not None:
                x = torch.cat([x, extra.repeat(len(x) // len(extra), 1, 1, 1)], 1)
            times = torch.full((len(x),), step.time, device=x.device)
            return network(x.to(dtype), times, sum_loras(control.lora() for control in controls), controls).float()

        return output

    def guide(self, outputs: Sequence[Tensor], step: Step, settings: Settings) -> Tensor:
        if len(outputs) == 2:
            guided = guide(outputs[0], outputs[1], settings.scale)
        else:
            image_scale = settings.image_guidance_scale or 0.0
            guided = guide_text_image(outputs[0], outputs[1], outputs[2], settings.scale, image_scale)
        return rescale(guided, outputs[0], settings.guidance_rescale) if settings.guidance_rescale else guided


def _words(prompt: object) -> list[str] | None:
    """For a recipe: the words; None for text that came encoded."""
    return None if prompt is None or isinstance(prompt, Text) else prompt_list(prompt)
