"""A random pipeline of some ten thousand weights, its adapters and pictures, for the laws and the unit tests."""

import json
import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.backbones.pixart import PixArt, PixArtConfig
from condit.backbones.unet import CROSS_DOWN, CROSS_UP, DOWN, PRESETS, UP, UNet, UNetConfig
from condit.controls.deadiff import DEADiff
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.omini import OminiConfig, OminiControl
from condit.diffusion.vp import Process
from condit.drawing.pipeline import Pipeline
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.qformer import QFormerConfig
from condit.encoders.text import Text
from condit.encoders.vae import PatchAutoencoder, PatchAutoencoderConfig
from condit.encoders.words import Words
from condit.weights.files import save_tensors
from condit.weights.folders import WEIGHTS
from condit.weights.latent_models import LatentParts, tell_unet
from condit.weights.parts import Parts
from condit.weights.pixart import tell_pixart
from condit.weights.tiny import UNET_INDEX
from condit_lab.training.unet import PROCESS, scheduler_config

pytest_plugins = ["random_tiny", "hub_server"]

os.environ["CONDIT_LANG"] = "en"  # tests match messages
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
        results = []
        for prompt in prompts:
            words = tuple(prompt.split())
            ids = (0, *(zlib.crc32(word.encode()) for word in words))[:5]
            places = tuple((i + 1,) if i + 1 < 5 else () for i in range(len(words)))
            results.append(Words(prompt, words, places, ids, 5))
        return results


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


class StubWords(nn.Module):
    """Stands for the text encoders of a UNet: random states that depend on the prompt alone."""

    def __init__(self, width: int, pooled: int):
        super().__init__()
        self.width, self.pooled = width, pooled

    def forward(self, prompts: Sequence[str], clip_skip: int | None = None) -> Text:
        seeds = [zlib.crc32(prompt.encode()) + (clip_skip or 0) for prompt in prompts]
        gs = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens = torch.stack([torch.randn(5, self.width, generator=g) for g in gs])
        return Text(tokens, torch.stack([torch.randn(self.pooled, generator=g) for g in gs]))


def build_latent(kind: str = "sd15", **unet) -> Pipeline:
    """A random pipeline with a UNet of two levels: "sd15", "sd15-inpainting" or "sdxl"."""
    g, xl = torch.Generator().manual_seed(0), kind == "sdxl"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields = {
            "in_channels": 9 if kind.endswith("inpainting") else 4,
            "block_out_channels": (8, 16),
            "down_block_types": (DOWN, CROSS_DOWN) if xl else (CROSS_DOWN, CROSS_DOWN),
            "up_block_types": (CROSS_UP, UP) if xl else (CROSS_UP, CROSS_UP),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 2) if xl else 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 12,
            "norm_num_groups": 4,
            "sample_size": 8,
        }
        if xl:
            fields |= {
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 34,
            }
        backbone = UNet(UNetConfig(**{**fields, **unet}))
        vae = PatchAutoencoder(PatchAutoencoderConfig(patch=4, latent_channels=4, width=8, depth=1))
    randomise(backbone, 1)
    randomise(vae, 2, 0.02)
    vae.fit(torch.rand(8, 3, *SIZE, generator=g) * 2 - 1)
    return Pipeline(
        LatentParts(
            name=f"random {kind}",
            hash="0" * 16,
            backbone=backbone.eval().requires_grad_(False),
            text=StubWords(12, 10 if xl else 0),
            vae=vae.eval().requires_grad_(False),
            image=StubImage(),
            process=Process(),
            solver="ddim",
            size=SIZE,
            steps=3,
            guidance=3.0,
            tell=tell_unet,
            zero_negative=xl,
        )
    )


def build_tiny_unet(folder: Path) -> Path:
    """A random UNet of the embedded one's shape, but thin, as training exports it."""
    config = replace(PRESETS["tiny-unet"], block_out_channels=(16, 16, 16), attention_head_dim=1, norm_num_groups=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(config)
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True)
    save_tensors(folder / "unet" / WEIGHTS, {k: v.half() for k, v in unet.state_dict().items()})
    (folder / "unet" / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config(PROCESS)))
    (folder / "model_index.json").write_text(json.dumps(UNET_INDEX))
    return folder


def build_ip(pipe: Pipeline, *, combine: str = "mean") -> IPAdapter:
    config = IPConfig(StubImage.features, tokens=3, dim=8, heads=2, combine=combine)  # type: ignore[arg-type]
    adapter = IPAdapter(config, pipe.backbone.sites, pipe.backbone.config.dim, pipe)
    randomise(adapter, 3, 0.5)
    return adapter.requires_grad_(False)


def build_tower() -> ClipPatches:
    """A random CLIP image tower of 16 px without its last block."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
    return ClipPatches(tower.eval().requires_grad_(False))


def build_deadiff(pipe: Pipeline) -> DEADiff:
    sizes = {"queries": 3, "layers": 1, "heads": 2, "hidden": 8, "vocabulary": 30523, "positions": 4}
    width = pipe.backbone.config.cross_attention_dim
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = QFormerConfig(width=width, image_width=16, **sizes)
        adapter = DEADiff.new(pipe.backbone, config, build_tower(), pipe=pipe)
    randomise(adapter, 9)
    return adapter.eval().requires_grad_(False)


def build_omini(pipe: Pipeline, *, seed: int = 4, **config) -> OminiControl:
    adapter = OminiControl.new(pipe.backbone, OminiConfig(**config))
    randomise(adapter, seed, 0.3)
    return OminiControl(adapter.lora.requires_grad_(False), adapter.config, pipe)


def build_pictures(n: int, seed: int = 5) -> list[np.ndarray]:
    """n random pictures (H, W, 3) uint8 with large patches of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (n, SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8)
    return list(small.repeat(8, 1).repeat(8, 2))


def build_pixart(like: Pipeline) -> Pipeline:
    """PixArt behind the same autoencoder and text: its tokens have 8 px, in 4 rows of 6."""
    torch.manual_seed(0)
    config = PixArtConfig(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=16, caption_channels=12
    )
    network = PixArt(config).requires_grad_(False)
    network.proj_out.weight.mul_(0.1)
    stub = like.parts.text

    class TextOnly:
        words = stub.words

        def __call__(self, prompts: list[str]) -> Text:
            tokens = stub(prompts).tokens
            return Text(tokens, tokens.new_zeros(len(tokens), 0), mask=torch.ones(tokens.shape[:2]))

    return Pipeline(
        LatentParts(
            name="pixart",
            hash="0" * 16,
            backbone=network,
            text=TextOnly(),
            vae=like.parts.vae,
            image=like.parts.image,
            process=Process(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear"),
            solver="dpm++",
            size=like.size,
            steps=3,
            guidance=3.0,
            tell=tell_pixart,
        )
    )


@pytest.fixture(scope="session")
def make_pipe() -> Callable[..., Pipeline]:
    return build_pipe


@pytest.fixture(scope="session")
def make_latent() -> Callable[..., Pipeline]:
    return build_latent


@pytest.fixture(scope="session")
def make_pixart() -> Callable[[Pipeline], Pipeline]:
    return build_pixart


@pytest.fixture(scope="session")
def make_tiny_unet() -> Callable[[Path], Path]:
    return build_tiny_unet


@pytest.fixture(scope="session")
def make_ip() -> Callable[..., IPAdapter]:
    return build_ip


@pytest.fixture(scope="session")
def make_tower() -> Callable[[], ClipPatches]:
    return build_tower


@pytest.fixture(scope="session")
def make_deadiff() -> Callable[[Pipeline], DEADiff]:
    return build_deadiff


@pytest.fixture(scope="session")
def make_omini() -> Callable[..., OminiControl]:
    return build_omini


@pytest.fixture(scope="session")
def pictures() -> Callable[..., list[np.ndarray]]:
    return build_pictures


# The threads of gloo's groups, those of a sharded mesh among them, may abort an interpreter that tears itself down,
# even after destroy_process_group. A script that came to its end leaves without that; one that failed never gets here.
LEAVE = """
import os, sys
import torch.distributed as group
if group.is_initialized():
    group.barrier()
sys.stderr.flush()
os._exit(0)
"""


def run_two_processes(script: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script + LEAVE],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


@pytest.fixture(scope="session")
def two_processes() -> Callable[[str], None]:
    """Run a script in two processes that work together, on the CPU; they must end well."""
    return run_two_processes
