"""A random pipeline of some ten thousand weights, its adapters and pictures, for the laws and the unit tests."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.omini import OminiConfig, OminiControl
from condit.encoders.text import Text
from condit.encoders.vae import PatchAutoencoder, PatchAutoencoderConfig
from condit.encoders.words import Words
from condit.pipeline import Pipeline
from condit.weights.load import Parts

SIZE = 32, 48  # pixels; tokens of 8 px stand in 4 rows of 6, so that rows and columns cannot be confused
CANVAS = 4


class StubText(nn.Module):
    """Stands for a text encoder: random states that depend on the prompt alone."""

    def __init__(self, config: MMDiTConfig, *, canvas: bool):
        super().__init__()
        self.config, self.canvas = config, canvas

    def forward(self, prompts: Sequence[str]) -> Text:
        rows = []
        for prompt in prompts:
            g = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            shapes = (5, self.config.joint_attention_dim), (self.config.pooled_projection_dim,), (24, CANVAS)
            rows.append([torch.randn(shape, generator=g) for shape in shapes])
        tokens, pooled, canvas = (torch.stack(column) for column in zip(*rows, strict=True))
        return Text(tokens, pooled, canvas if self.canvas else None)

    def words(self, prompts: Sequence[str]) -> list[Words]:
        """A token a word, from the second on: the first stands for a begin token."""
        found = []
        for prompt in prompts:
            words = tuple(prompt.split())
            ids = (0, *(zlib.crc32(word.encode()) for word in words))[:5]
            places = tuple((i + 1,) if i + 1 < 5 else () for i in range(len(words)))
            found.append(Words(prompt, words, places, ids, 5))
        return found


class StubImage(nn.Module):
    """Stands for an image encoder: mean colours of four quarters."""

    features = 12

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(1) * 4


def randomise(module: nn.Module, seed: int, scale: float = 0.1) -> None:
    """Noise on every weight, so that nothing hides behind a zero or a one."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g))


def build_pipe(
    *,
    guidance_embeds: bool = False,
    distilled: bool = False,
    canvas: bool = True,
    prediction: str = "velocity",
    name: str = "random",
    blocks: int = 2,
) -> Pipeline:
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MMDiTConfig(
            in_channels=16 + (CANVAS if canvas else 0),
            out_channels=16,
            num_layers=blocks,
            num_single_layers=blocks,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        backbone = MMDiT(config)
        vae = PatchAutoencoder(PatchAutoencoderConfig(patch=4, latent_channels=4, width=8, depth=1))
    randomise(backbone, 1)
    randomise(vae, 2, 0.02)
    vae.fit(torch.rand(8, 3, *SIZE, generator=g) * 2 - 1)
    return Pipeline(
        Parts(
            name=name,
            hash="0" * 16,
            backbone=backbone.eval().requires_grad_(False),
            text=StubText(config, canvas=canvas),
            vae=vae.eval().requires_grad_(False),
            image=StubImage(),
            prediction=prediction,
            shift=1.5,
            size=SIZE,
            steps=3,
            guidance=3.0,
            distilled=distilled,
        )
    )


def build_ip(pipe: Pipeline, *, combine: str = "mean", shift: bool = False) -> IPAdapter:
    pooled = pipe.backbone.config.pooled_projection_dim if shift else 0
    config = IPConfig(StubImage.features, tokens=3, dim=8, heads=2, combine=combine, pooled=pooled)  # type: ignore[arg-type]
    adapter = IPAdapter(config, pipe.backbone.sites, pipe.backbone.config.dim, pipe)
    randomise(adapter, 3, 0.5)
    return adapter.requires_grad_(False)


def build_omini(pipe: Pipeline, *, seed: int = 4, **config) -> OminiControl:
    adapter = OminiControl.new(pipe.backbone, OminiConfig(**config))
    randomise(adapter, seed, 0.3)
    return OminiControl(adapter.lora.requires_grad_(False), adapter.config, pipe)


def build_pictures(n: int, seed: int = 5) -> list[np.ndarray]:
    """n random pictures (H, W, 3) uint8 with large patches of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (n, SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8)
    return list(small.repeat(8, 1).repeat(8, 2))


@pytest.fixture(scope="session")
def make_pipe() -> Callable[..., Pipeline]:
    return build_pipe


@pytest.fixture(scope="session")
def make_ip() -> Callable[..., IPAdapter]:
    return build_ip


@pytest.fixture(scope="session")
def make_omini() -> Callable[..., OminiControl]:
    return build_omini


@pytest.fixture(scope="session")
def pictures() -> Callable[..., list[np.ndarray]]:
    return build_pictures
