"""Small random DiT, DiffiT and ViT as files, and an autoencoder beside them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condit.backbones.diffit import DiffiT, DiffiTConfig
from condit.backbones.dit import DiT, DiTConfig
from condit.backbones.vit import ViTConfig
from condit.drawing.pipeline import Pipeline
from condit.weights.class_models import write_labels
from condit.weights.diffit import save_diffit
from condit.weights.dit import save_dit

DIT = DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=4, num_classes=5)
DIFFIT = DiffiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=4, num_classes=5)
VIT = ViTConfig(patch_size=4, image_size=16, dim=24, depth=1, heads=3, mlp_dim=32, classes=5)
NAMES = ["tench", "golden retriever", "red fox", "snail", "valley"]


def randomise(model: nn.Module, scale: float = 0.1) -> None:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=g))


def write(folder: Path, config: DiTConfig | DiffiTConfig = DIT, names: list[str] | None = NAMES) -> Path:
    """A random model as a safetensors file, with the names of its classes beside it."""
    path = folder / "model.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)  # whatever tests ran before
        model = DiT(config) if isinstance(config, DiTConfig) else DiffiT(config)
    randomise(model)
    if isinstance(model, DiT):
        save_dit(model, path)
    else:
        save_diffit(model, path, indices=True)
    if names is not None:
        write_labels(path, names)
    return path


def write_vae(folder: Path) -> Path:
    """A random AutoencoderKL of 4 channels whose latents have an eighth of the pixels."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(**blocks, block_out_channels=[4] * 4, norm_num_groups=2, latent_channels=4)  # type: ignore[arg-type]
    vae.save_pretrained(folder / "vae")
    return folder / "vae"


def draw(pipe: Pipeline, label: Any = 1, **how) -> Tensor:
    return pipe(label, **{"seed": 0, "num_inference_steps": 3, "output_type": "latent", **how}).images
