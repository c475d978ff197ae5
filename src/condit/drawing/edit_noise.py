"""Editing with diffusion of noise in latents: PixArt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from condit.controls.control import Control, Pair, Step
from condit.data.images import ImageSource
from condit.diffusion.guidance import guide
from condit.diffusion.inversion import Network, NoisePath, Solver, ddim_path, dpm_path, level_of
from condit.diffusion.vp_samplers import estimate
from condit.drawing.edit import fitted_size, regions_at
from condit.encoders.vae import decode_latents
from condit.weights.latent_models import Frame

if TYPE_CHECKING:
    from condit.drawing.latent_pipeline import Branch, LatentPipeline


@dataclass(frozen=True)
class NoiseEditor:
    """Latents are (B, C, h, w). solver: "dpmpp2m" and "exact2m" walk DPM-Solver++'s levels at second order, the others
    at first order; "entered" DDIM's own."""

    pipe: LatentPipeline
    solver: Solver
    iterations: int

    def __post_init__(self):
        if not hasattr(self.pipe.backbone.config, "patch_size"):
            raise ValueError(f"{self.pipe.name} is a UNet; editing needs a transformer: PixArt, 'tiny' or FLUX.1.")

    def path(self, steps: int, size: tuple[int, int]) -> NoisePath:
        process = self.pipe.parts.process
        if self.solver == "entered":
            return ddim_path(process.alphas_cumprod, steps)
        return dpm_path(
            process.alphas_cumprod,
            steps,
            order=2 if self.solver in ("dpmpp2m", "exact2m") else 1,
            to_zero=process.final_sigmas_type == "zero",
        )

    def network(self, prompts: list[str], size: tuple[int, int], path: NoisePath) -> Network:
        return self.predictor(None, prompts, [""] * len(prompts), (), size, path, 1.0).at

    def predictor(
        self,
        pair: Pair | None,
        prompts: list[str],
        negative: list[str],
        controls: Sequence[Control],
        size: tuple[int, int],
        path: NoisePath,
        scale: float,
    ) -> NoisePredictor:
        pipe, memory, batch = self.pipe, {}, len(prompts)
        texts = pipe.texts(prompts, negative, batch, 1, None)
        branches = pipe.branches(texts, tuple(controls), batch, size, scale, None, pair, memory)
        predict = pipe.predictor(branches, Frame(size, size, (0, 0), size), path.steps, pipe.parts.process, None, False)
        return NoisePredictor(pipe, branches, predict, path, scale, memory)

    def encode(self, images: Tensor) -> Tensor:
        return self.pipe.encode_images(images)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return decode_latents(self.pipe.parts.vae, latents)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        side = self.pipe.pixels * self.pipe.patch
        return size[0] // side, size[1] // side

    def spread(self, mask: Tensor, size: tuple[int, int]) -> Tensor:
        patch = self.pipe.patch
        return mask.unflatten(-1, self.grid(size))[:, None].repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    def size(self, images: Sequence[ImageSource], height: int | None, width: int | None) -> tuple[int, int]:
        side = self.pipe.pixels * self.pipe.patch
        fitted = fitted_size(images, self.pipe.size, side, fixed=None not in (height, width))
        found = height or fitted[0], width or fitted[1]
        self.pipe.check(found, 1, 1, "pt", ())
        return found


@dataclass(frozen=True)
class NoisePredictor:
    """Noise; a call at a level tells controls its number."""

    pipe: LatentPipeline
    branches: list[Branch]
    predict: Callable[[Tensor, float, int], list[Tensor]]
    path: NoisePath
    scale: float
    memory: dict = field(default_factory=dict)

    def step(self, level: int) -> Step:
        return Step(level, self.path.steps, self.path.time(level) / self.pipe.parts.process.num_train_timesteps)

    def __call__(self, x: Tensor, level: int) -> Tensor:
        return self.guided(x, self.path.time(level), level, self.path.ratio(level))

    def at(self, x: Tensor, time: float) -> Tensor:
        """Without controls, at any time."""
        return self.guided(x, time, 0, self.path.between(time))

    def guided(self, x: Tensor, time: float, level: int, ratio: Tensor) -> Tensor:
        found = self.predict(x, time, level)
        out = found[0] if len(found) == 1 else guide(found[0], found[1], self.scale)
        return estimate(out, x, level_of(ratio), self.pipe.parts.process.prediction_type).eps

    def regions(self, level: int) -> list[Tensor]:
        return regions_at(self.branches[0].controls, self.step(level))
