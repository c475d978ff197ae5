"""Diffusion in pixels, without classes: DiffiT's image-space model (arXiv:2312.02139, section 3.2) by EDM's sampler
(Karras et al. 2022, arXiv:2206.00364). Latents are the pixels themselves (B, 3, H, W)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from condit.controls.control import Act, Control, Run
from condit.diffusion.edm import EDMPath, edm_path, heun, precondition
from condit.diffusion.steps import Path, Step
from condit.drawing.model import Conditions, Layout, Network, Sampler, check_shape, module_device, module_dtype
from condit.drawing.settings import Settings
from condit.weights.class_models import PixelParts


class PixelModel:
    """See `condit.drawing.model.Model`. The model is unconditional: its only condition is None."""

    reads: Literal["prompt", "class", "nothing"] = "nothing"
    supports = frozenset({"strength"})
    kinds = ("pil", "pt", "np")
    fewest_steps = 2
    repaints, fixed_size, inversion = False, False, None

    def __init__(self, parts: PixelParts):
        self.parts, self.backbone = parts, parts.backbone

    def to(self, device: str | torch.device) -> None:
        self.backbone.to(device)

    def settings(self, requested: Settings, prompt: object) -> Settings:
        """18 steps up to 32 px, else 40, as published; each has two predictions."""
        return requested.filled(num_inference_steps=18 if max(requested.size) <= 32 else 40)

    def describe(self, prompt: object, negative: object, settings: Settings) -> dict[str, object]:
        return {"num_inference_steps": settings.steps, "height": settings.height, "width": settings.width}

    def count(self, prompt: object) -> int:
        if prompt is not None:
            raise ValueError(f"{self.parts.name} is unconditional and has no class {prompt!r}. Leave the label out.")
        return 1

    def conditions(self, prompt: object, negative: object, settings: Settings) -> Conditions[None]:
        return lambda positive: None

    def refuse(self, control: Control) -> str | None:
        return f"cannot act here: {self.parts.name} supports no controls."

    @property
    def size(self) -> tuple[int, int]:
        return self.parts.size

    @property
    def token(self) -> int:
        return self.backbone.config.stride

    def cells_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return self.backbone.config.in_channels, *size

    def check_output(self, output_type: str) -> None:
        pass

    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        return images.float()

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        return latents.clamp(-1, 1)

    def arrange(self, cells: Tensor, layout: Layout) -> Tensor:
        return cells

    def check_latents(self, latents: Tensor, layout: Layout) -> Tensor:
        return check_shape(latents, (layout.batch, *self.cells_shape(layout.size)))

    def first(self, noise: Tensor, path: EDMPath) -> Tensor:
        return noise * path.sigmas[0]

    def noised(self, x0: Tensor, noise: Tensor, path: EDMPath, level: int) -> Tensor:
        return x0 + path.sigmas[level] * noise

    def path(self, settings: Settings, layout: Layout) -> tuple[Sampler, Path]:
        return heun, edm_path(settings.steps, self.parts.edm)

    def draws_noise(self, settings: Settings) -> bool:
        return False

    def step_at(self, t: float) -> Step:
        return Step(0, 1, t, t / max(1 - t, 1e-6))

    def sides(self, settings: Settings, controlled: bool) -> list[tuple[bool, bool]]:
        return [(True, True)]

    def run(self, condition: None, layout: Layout, settings: Settings, controls: Sequence[Control]) -> Run:
        channels, pooled = (
            self.backbone.config.in_channels,
            torch.zeros(layout.batch, 0, device=module_device(self.backbone)),
        )
        return Run(self.backbone, layout.batch, layout.grid, pooled, None, channels)

    def joins(self, settings: Settings, acts: frozenset[Act]) -> bool:
        return False

    def network(
        self, conditions: Sequence[None], layout: Layout, settings: Settings, extra: Tensor | None = None
    ) -> Network:
        dtype = module_dtype(self.backbone)
        denoise = precondition(lambda x, c: self.backbone(x.to(dtype), c), self.parts.edm)
        return lambda x, step, controls: denoise(x, torch.full((len(x),), step.time, dtype=x.dtype, device=x.device))

    def guide(self, outputs: Sequence[Tensor], step: Step, settings: Settings) -> Tensor:
        return outputs[0]
