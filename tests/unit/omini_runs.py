"""A run and a call as the tests of OminiControl need them."""

import torch

from condit.controls.control import Run
from condit.drawing.pipeline import Pipeline


def run_of(pipe: Pipeline, batch: int = 1) -> Run:
    guidance = torch.full((batch,), 3.5)
    return Run(pipe.backbone, batch, (4, 6), torch.randn(batch, 10), guidance, pipe.backbone.config.in_channels)


def latents(pipe, controls, prompt: str | list[str] = "a fox", **how):
    return pipe(prompt, controls=controls, **{"seed": 0, "output_type": "latent", **how}).images
