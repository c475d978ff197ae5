"""What tasks on a latent diffusion model share: the frozen model, latents of images, and the error of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from condit.backbones.unet import UNet
from condit.controls.control import Control, Run
from condit.diffusion.vp import training_pair
from condit.encoders.text import Text
from condit.encoders.vae import Autoencoder, scale_shift
from condit.nn.lora import sum_loras
from condit.weights.latent_models import Frame, LatentParts
from condit.weights.load import LATENT, identify, load_parts


def load_base(model: str, method: str) -> LatentParts:
    """A frozen Stable Diffusion, or the embedded UNet, in float32, by name, folder or file."""
    base = identify(model)
    parts = load_parts(base, dtype=torch.float32) if base.kind in LATENT else None
    if not isinstance(parts, LatentParts) or not isinstance(parts.backbone, UNet):
        raise ValueError(f"{model!r} is not a Stable Diffusion: {method} is trained on a UNet with cross-attention.")
    return parts


def posterior_of(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the latents' posterior, unscaled; no deviation where the encoder is
    deterministic."""
    posterior = cast(Autoencoder, vae).encode(images).latent_dist
    deviation: Tensor | None = getattr(posterior, "std", None)
    return posterior.mode(), deviation


def latents_of(vae: nn.Module, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Scaled latents (B, C, h, w): a sample of the posterior, or its mode without a generator. The noise is sampled on
    the CPU, so that a seed means the same on every device."""
    scale, shift = scale_shift(vae)
    z, deviation = posterior_of(vae, images)
    if generator is not None and deviation is not None:
        z = z + deviation * torch.randn(z.shape, generator=generator).to(z)
    return (z.float() - shift) * scale


def run_of(parts: LatentParts, x: Tensor) -> Run:
    """The run of a training step, which controls prepare for."""
    grid, pooled = (x.shape[-2], x.shape[-1]), x.new_zeros(len(x), 0)
    return Run(parts.backbone, len(x), grid, pooled, None, x.shape[1])


def errors(
    parts: LatentParts,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    text: Text,
    controls: Sequence[Control] = (),
    frames: Sequence[Frame] | None = None,
) -> Tensor:
    """Squared error of the noise (or of v) at timesteps t, (B,), unweighted. frames: the crop of each row, for networks
    with size conditioning; None: uncropped images of the training size."""
    x, target = training_pair(parts.process, x0, noise, t)
    network = parts.tell(parts.backbone, text, frames or Frame(parts.size, parts.size, (0, 0), parts.size))
    lora = sum_loras(control.lora() for control in controls)
    return (network(x, t.to(x.device), lora, list(controls)).float() - target).square().flatten(1).mean(1)
