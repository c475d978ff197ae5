"""What tasks on a network over latents share, whatever they train: latents of pictures, text, and the error of what the
network predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from condit.controls.control import Control, Run
from condit.diffusion.vp import training_pair
from condit.encoders.text import Text
from condit.encoders.vae import scale_shift
from condit.weights.latent_models import Frame, LatentParts
from condit.weights.load import LATENT, identify, load_parts


def load_base(model: str, method: str) -> LatentParts:
    """A frozen Stable Diffusion, or the embedded UNet, in float32, by name, folder or file."""
    base = identify(model)
    if base.kind not in LATENT:
        raise ValueError(f"{model!r} is no Stable Diffusion: {method} is trained on a UNet with cross-attention.")
    parts = load_parts(base, dtype=torch.float32)
    assert isinstance(parts, LatentParts)  # by LATENT
    return parts


def latents_of(vae: Any, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Scaled latents (B, C, h, w), drawn from their posterior, or its mode without a generator."""
    scale, shift = scale_shift(vae)
    posterior = vae.encode(images).latent_dist
    z = posterior.mode() if generator is None else sampled(posterior, generator)
    return (z.float() - shift) * scale


def sampled(posterior: Any, generator: torch.Generator) -> Tensor:
    """A sample whose noise is drawn on the CPU: a seed means the same on every device."""
    if not hasattr(posterior, "std"):
        return posterior.sample(generator)
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
    return posterior.mean + posterior.std * noise


def run_of(parts: LatentParts, x: Tensor) -> Run:
    """A training step as controls are told of it."""
    grid, pooled = tuple(x.shape[-2:]), x.new_zeros(len(x), 0)
    return Run(parts.backbone, len(x), grid, pooled, None, x.shape[1])  # type: ignore[arg-type]


def errors(
    parts: LatentParts,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    text: Text,
    controls: Sequence[Control] = (),
    frames: Sequence[Frame] | None = None,
) -> Tensor:
    """Squared error of the noise (or of v) at timesteps t, (B,): plain, without weights. frames: what each row was cut
    from; None: the network is told that pictures are whole and of the size it is trained at."""
    x, wanted = training_pair(parts.process, x0, noise, t)
    network = parts.tell(parts.backbone, text, frames or Frame(parts.size, parts.size, (0, 0), parts.size))
    return (network(x, t.to(x.device), None, list(controls)).float() - wanted).square().flatten(1).mean(1)
