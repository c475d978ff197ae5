"""A random UNet with two IP-Adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from condit.controls.control import Control
from condit.controls.instantstyle import preset
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import Resampler
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import CLIPImage

PROMPTS = ["a fox", "a rocket", "snow", "an apple"]


def tower() -> CLIPImage:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=12,
        )  # fmt: skip
        model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return CLIPImage(model)


def made(pipe: Pipeline, encoder: CLIPImage, *, plus: bool, seed: int) -> IPAdapter:
    """A random adapter with weights that do something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projector = Resampler(16, 8, 12, inner=8, heads=2, depth=1, hidden=16, queries=3) if plus else None
        config = IPConfig(16 if plus else 12, 3, 12, combine="concat", feature="hidden" if plus else "embeds")
        adapter = IPAdapter.new(pipe, config, projector=projector).requires_grad_(False)
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn(p.shape))
    adapter._encoder[0] = encoder
    return adapter


@dataclass(frozen=True)
class World:
    pipe: Pipeline
    whole: IPAdapter
    plus: IPAdapter

    @classmethod
    def of(cls, pipe: Pipeline) -> World:
        """Of two levels: SDXL's style block exists there, SD 1.5's up_blocks.1 too."""
        encoder = tower()
        return cls(pipe, made(pipe, encoder, plus=False, seed=1), made(pipe, encoder, plus=True, seed=2))

    def controls(self, name: str, references, **how) -> list[Control]:
        if name == "style":
            return [self.whole.control(references, where=preset("style", self.pipe.backbone), **how)]
        both = name == "both"
        return [a.control(references, **how) for a in (self.whole, self.plus) if both or a is getattr(self, name)]

    def draw(self, controls: Sequence[Control] = (), prompts: str | list[str] = "a fox", **how) -> Tensor:
        given = {"seed": 0, "output_type": "latent", **how}
        return self.pipe(prompts, controls=controls, **given).images


every = pytest.mark.parametrize("name", ["whole", "plus", "style", "both"])


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)  # latents of random UNets reach 60
