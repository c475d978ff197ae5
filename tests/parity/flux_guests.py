"""A random FLUX.1 in diffusers' pipeline and in condit's, and equal controls for both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condit
from condit.backbones.mmdit import MMDiTConfig
from condit.controls.control import Control, When
from condit.drawing.pipeline import Pipeline
from condit.interop import Guest, attach

CONFIG = MMDiTConfig(
    in_channels=8,
    num_layers=3,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(4, 6, 6),
)
REFERENCE = 32, 32  # pixels at which both pipelines read references: 8 x 8 tokens
GRID = 6, 8  # tokens of 4 px
WORDS = 32  # tokens of a prompt
PROMPTS = ["a red fox in the snow", "snow"]
GIVEN = {"height": 24, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.5}


class Colours(nn.Module):
    """Stands for an image encoder: mean colours of four quarters."""

    features = 12

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(1) * 4


@dataclass(frozen=True)
class Pair:
    """diffusers' pipeline and condit's over equal weights."""

    theirs: Any
    ours: Pipeline

    def attach(self) -> Guest:
        return attach(self.theirs, size=REFERENCE, image=Colours())


def shaken(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """Norms of weight one and biases of zero would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="session")
def flux_pairs(tmp_path_factory, make_flux) -> dict[str, Pair]:
    values = {}
    for name in ("dev", "schnell"):
        dynamic = name == "dev"
        theirs = make_flux(replace(CONFIG, guidance_embeds=dynamic), dynamic=dynamic)
        shaken(theirs.transformer)
        folder = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(folder)
        parts = condit.load(folder, dtype=torch.float32).parts
        parts.text.limit = WORDS
        values[name] = Pair(theirs, Pipeline(replace(parts, image=Colours())))
    return values


@pytest.fixture(params=["dev", "schnell"])
def pair(request, flux_pairs) -> Pair:
    return flux_pairs[request.param]


@pytest.fixture
def dev(flux_pairs) -> Pair:
    """For what does not depend on the schedule and the guidance embedding."""
    return flux_pairs["dev"]


def host_of(pair: Pair, name: str = "FluxPipeline", **parts: Any) -> Any:
    """Another pipeline of diffusers over the same parts, or others."""
    import diffusers

    given = {k: v for k, v in (pair.theirs.components | parts).items() if v is not None}
    host = getattr(diffusers, name)(**given)
    host.set_progress_bar_config(disable=True)
    return host


Make = Callable[[Any, Sequence[np.ndarray]], list[Control]]


def again(make: Callable) -> Callable:
    """Equal adapters for every pipeline, from one seed; each is made once, as a guest borrows its network each time."""
    made: dict[Any, tuple[Any, Any]] = {}

    def seeded(pipe: Any, **how: Any) -> Any:
        key = id(pipe), *sorted(how.items())
        if key not in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                made[key] = pipe, make(pipe, **how)  # with the pipe, so that its id stays its own
        return made[key][1]

    return seeded


@pytest.fixture(scope="session")
def omini(make_omini) -> Callable:
    return again(make_omini)


@pytest.fixture(scope="session")
def ip_adapter(make_ip) -> Callable:
    return again(make_ip)


@pytest.fixture(scope="session")
def table(omini, ip_adapter) -> dict[str, Make]:
    """Controls of equal adapters for either pipeline, by name; references: one or two pictures."""

    def joint(p, refs, **how):
        return omini(p, seed=6).control(refs, **how)

    def cached(p, refs, **how):
        return omini(p, seed=7, independent=True, delta=(0, -8)).control(refs, **how)

    def ip(p, refs, **how):
        return ip_adapter(p).control(refs, **how)

    return {
        "joint": lambda p, r: [joint(p, r)],
        "cached": lambda p, r: [cached(p, r)],
        "joint_gamma": lambda p, r: [joint(p, r, strength=0.5)],
        "cached_gamma": lambda p, r: [cached(p, r, strength=1.5)],
        "compact": lambda p, r: [omini(p, seed=6, scale=2).control(r)],
        "two_joint": lambda p, r: [joint(p, r), joint(p, r[::-1], delta=(0, 8))],
        "joint_and_cached": lambda p, r: [joint(p, r), cached(p, r[::-1], strength=0.7)],
        "late": lambda p, r: [joint(p, r, when=When(0.5, 1))],
        "ip": lambda p, r: [ip(p, r, strength=0.7)],
        "ip_masked": lambda p, r: [ip(p, r, mask=np.eye(24, 32, dtype=np.uint8)[:, :, None].repeat(3, 2) * 255)],
        "all": lambda p, r: [ip(p, r), cached(p, r), joint(p, r, strength=0.5)],
    }


CASES = (
    "joint cached joint_gamma cached_gamma compact two_joint joint_and_cached late ip ip_masked all".split()  # noqa: SIM905
)


def noise(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, GRID[0] * GRID[1], 8, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, prompts: str | list[str] = PROMPTS[0], **given: Any) -> Tensor:
    """Latents of either pipeline or of a guest."""
    batch = 1 if isinstance(prompts, str) else len(prompts)
    named = {"latents": noise(batch), "output_type": "latent", **GIVEN, **given}
    named |= {} if isinstance(pipe, Pipeline) else {"max_sequence_length": WORDS}
    return pipe(prompts, **named).images


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# What diffusers brings along


class Present(Control):
    """Does nothing, but acts: the prediction is condit's."""
