"""Pictures drawn in pixels, without classes: DiffiT's image-space model (arXiv:2312.02139, section 3.2) by EDM's
sampler (Karras et al. 2022, arXiv:2206.00364).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from condit.data.images import to_images
from condit.diffusion.edm import edm_sigmas, heun, precondition
from condit.diffusion.gaussian_samplers import image_noise
from condit.drawing.pipeline import Result, check_counts, check_size, image_generators
from condit.weights.class_models import PixelParts

Callback = Callable[["PixelPipeline", int, float, dict], dict | None]


class PixelPipeline:
    """A loaded image-space DiffiT; a call does not change it."""

    def __init__(self, parts: PixelParts):
        self.parts = parts
        self.name, self.backbone = parts.name, parts.backbone

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def to(self, device: str | torch.device) -> PixelPipeline:
        """Move the model, in place; returns the pipeline."""
        self.backbone.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        label: None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: Literal["pil", "pt"] = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
    ) -> Result:
        """Draw pictures; `seed` is sugar: image i is drawn with seed + i. The model knows no class, so label is None.

        num_inference_steps None: 18 up to 32 px, else 40, as published; each asks the model twice. height, width: those
        of the training unless given. latents: the first noise (B, C, H, W) of deviation 1. "pt": a tensor in [-1, 1].
        """
        if label is not None:
            raise ValueError(f"{self.name} is unconditional, it knows no class {label!r}. Leave the label out.")
        height, width = self.size(height, width)
        steps = (18 if max(height, width) <= 32 else 40) if num_inference_steps is None else num_inference_steps
        check_counts(steps, num_images_per_prompt, output_type, fewest=2, kinds=("pil", "pt"))
        seeds, generators = image_generators(num_images_per_prompt, seed, generator)
        sigmas = edm_sigmas(steps, self.parts.edm)
        shape = num_images_per_prompt, self.backbone.config.in_channels, height, width
        noise = image_noise(generators)(torch.empty(shape)) if latents is None else latents.float()
        if tuple(noise.shape) != shape:
            raise ValueError(f"latents must be noise of shape {shape}; found {tuple(noise.shape)}.")

        def on_step(i: int, x: Tensor, x0: Tensor) -> Tensor | None:
            if callback_on_step_end is None:
                return None
            return (callback_on_step_end(self, i, float(sigmas[i]), {"latents": x}) or {}).get("latents")

        denoise = precondition(lambda x, c: self.backbone(x.to(self.dtype), c), self.parts.edm)
        x = heun(denoise, noise.to(self.device) * float(sigmas[0]), sigmas, on_step=on_step)
        recipe = {
            "model": self.name,
            "hash": self.parts.hash,
            "num_inference_steps": steps,
            "height": height,
            "width": width,
            "seeds": seeds,
        }
        return Result(self.finish(x, output_type), seeds, recipe)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels; those of the training where they are not given."""
        height, width = height or self.parts.size[0], width or self.parts.size[1]
        check_size((height, width), self.backbone.config.stride)
        return height, width

    def finish(self, x: Tensor, output_type: str) -> Any:
        if not torch.isfinite(x).all():
            raise ValueError("The sampler produced NaN. Use dtype=torch.float32, or other weights.")
        x = x.clamp(-1, 1)
        return x if output_type == "pt" else to_images(x)
