"""Editing with rectified flow on an MM-DiT: FLUX.1 and the embedded model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condit.controls.control import Control, Pair, Step
from condit.data.images import ImageSource
from condit.diffusion.inversion import FlowPath, Network, Solver
from condit.diffusion.schedules import flow_sigmas, flux_mu
from condit.drawing.edit import fitted_size, regions_at
from condit.encoders.vae import decode_tokens
from condit.nn.streams import grid_ids

if TYPE_CHECKING:
    from condit.drawing.pipeline import Branch, Pipeline


@dataclass(frozen=True)
class FlowEditor:
    """Latents are packed tokens (B, N, C)."""

    pipe: Pipeline
    solver: Solver
    iterations: int

    def path(self, steps: int, size: tuple[int, int]) -> FlowPath:
        rows, columns = self.grid(size)
        shift = self.pipe.parts.shift
        shift = math.exp(flux_mu(rows * columns)) if shift is None else shift
        return FlowPath(tuple(flow_sigmas(steps, shift=shift).tolist()))

    def network(self, prompts: list[str], size: tuple[int, int], path: FlowPath) -> Network:
        # Guidance is left out: an input of 1 where the model has it inside, the text's prediction alone elsewhere.
        predict = self.predictor(None, prompts, [""] * len(prompts), (), size, path, 1.0)
        return predict.at

    def predictor(
        self,
        pair: Pair | None,
        prompts: list[str],
        negative: list[str],
        controls: Sequence[Control],
        size: tuple[int, int],
        path: FlowPath,
        scale: float,
    ) -> FlowPredictor:
        memory: dict = {}
        batch, grid = len(prompts), self.grid(size)
        branches = self.pipe.branches(
            prompts, negative, tuple(controls), batch, grid, scale, None, 1, None, pair, memory
        )
        return FlowPredictor(self.pipe, branches, grid_ids(*grid).to(self.pipe.device), path, scale, memory)

    def encode(self, images: Tensor) -> Tensor:
        return self.pipe.encode_condition(images)[0].float()

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        dtype = next(self.pipe.parts.vae.parameters()).dtype
        return decode_tokens(self.pipe.parts.vae, latents.to(dtype), self.grid(size)).float()

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.pipe.pixels, size[1] // self.pipe.pixels

    def spread(self, mask: Tensor, size: tuple[int, int]) -> Tensor:
        return mask[..., None]

    def size(self, images: Sequence[ImageSource], height: int | None, width: int | None) -> tuple[int, int]:
        pipe = self.pipe
        # A text's canvas has the tokens of one size.
        fixed = bool(getattr(pipe.parts.text, "canvas", None)) or None not in (height, width)
        fitted = fitted_size(images, pipe.size, pipe.pixels, fixed=fixed)
        found = height or fitted[0], width or fitted[1]
        pipe.check(["edit"], 1, *found)
        return found


@dataclass(frozen=True)
class FlowPredictor:
    """Velocities; a call at a level tells controls its number."""

    pipe: Pipeline
    branches: list[Branch]
    ids: Tensor
    path: FlowPath
    scale: float
    memory: dict = field(default_factory=dict)

    def step(self, level: int) -> Step:
        return Step(level, self.path.steps, self.path.time(level))

    def __call__(self, x: Tensor, level: int) -> Tensor:
        sigma = torch.tensor(self.path.time(level), dtype=torch.float32)
        return self.pipe.guided(self.branches, x, sigma, self.ids, self.step(level), self.scale, 1.0)

    def at(self, x: Tensor, time: float) -> Tensor:
        """Without controls, at any time."""
        sigma = torch.tensor(time, dtype=torch.float32)
        return self.pipe.guided(self.branches, x, sigma, self.ids, Step(0, 1, time), self.scale, 1.0)

    def regions(self, level: int) -> list[Tensor]:
        return regions_at(self.branches[0].controls, self.step(level))
