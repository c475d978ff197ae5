"""Autoencoders with the interface of diffusers' AutoencoderKL: `encode(x).latent_dist`, `decode(z).sample`, `config`.

`PatchAutoencoder` is the embedded one: a linear code of 8 x 8 patches (their principal components) and a convolutional
decoder for the residual. The `Autoencoder` protocol also describes diffusers' AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Posterior(Protocol):
    """A distribution of latents (B, C, h, w)."""

    def mode(self) -> Tensor: ...

    def sample(self, generator: torch.Generator | None = None) -> Tensor: ...


class AutoencoderConfig(Protocol):
    """The model reads latents as (z - shift_factor) * scaling_factor; shift_factor None means 0."""

    @property
    def scaling_factor(self) -> float: ...

    @property
    def shift_factor(self) -> float | None: ...


class Autoencoder(Protocol):
    """The parts of an autoencoder that pipelines and training use."""

    @property
    def config(self) -> AutoencoderConfig: ...

    def encode(self, images: Tensor) -> EncoderOutput: ...

    def decode(self, latents: Tensor) -> DecoderOutput: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class ExactPosterior:
    """The posterior of a deterministic encoder: sample equals mode."""

    mean: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean


@dataclass(frozen=True)
class EncoderOutput:
    latent_dist: Posterior


@dataclass(frozen=True)
class DecoderOutput:
    sample: Tensor


@dataclass(frozen=True)
class PatchAutoencoderConfig:
    """`scaling_factor` and `shift_factor` as in AutoencoderKL.

    whiten: each component of the code is divided by its standard deviation to this power: 0 keeps the principal
    components, 1 gives all of them unit variance.
    """

    patch: int = 8
    latent_channels: int = 32
    whiten: float = 0.0
    width: int = 128
    depth: int = 4
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))), 3 x 3."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv_1, self.conv_2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv_2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_2(F.silu(self.conv_1(self.norm(x))))


class PatchAutoencoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, latent_channels, H/patch, W/patch); H and W multiples of patch."""

    def __init__(self, config: PatchAutoencoderConfig):
        super().__init__()
        c = self.config = config
        pixels = 3 * c.patch * c.patch
        self.mean: Tensor
        self.basis: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("basis", torch.zeros(c.latent_channels, pixels))  # orthonormal rows
        # Standard deviation of each principal component: the decoder reads whitened components.
        self.register_buffer("deviation", torch.ones(c.latent_channels))
        self.conv_in = nn.Conv2d(c.latent_channels, c.width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(c.width) for _ in range(c.depth))
        self.conv_out = nn.Conv2d(c.width, pixels, 3, padding=1)
        for p in self.conv_out.parameters():
            nn.init.zeros_(p)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Set mean, basis and deviations to the principal components of the patches of images (B, 3, H, W)."""
        x = self.patches(images.float()).movedim(1, -1).flatten(0, 2)
        mean = x.mean(0)
        variances, vectors = torch.linalg.eigh((x - mean).double().mT @ (x - mean).double() / len(x))
        self.mean.copy_(mean)
        self.basis.copy_(vectors.flip(-1).mT[: self.config.latent_channels])
        self.deviation.copy_(variances.flip(-1)[: self.config.latent_channels].clamp(min=1e-8).sqrt())

    def patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3 p p, H/p, W/p). ValueError unless H and W are multiples of the patch."""
        if images.shape[-1] % self.config.patch or images.shape[-2] % self.config.patch:
            raise ValueError(
                f"Image size {tuple(images.shape[-2:])} is not a multiple of {self.config.patch}. Resize it first."
            )
        return F.pixel_unshuffle(images, self.config.patch)

    def encode(self, images: Tensor) -> EncoderOutput:
        """The linear code of images (B, 3, H, W); `sample` equals `mode`."""
        x = self.patches(images) - self.mean[None, :, None, None]
        code = torch.einsum("bphw,cp->bchw", x, self.basis) / self.scales(self.config.whiten)
        return EncoderOutput(ExactPosterior(code))

    def scales(self, power: float) -> Tensor:
        """The standard deviations to a power, (1, latent_channels, 1, 1)."""
        return self.deviation[None, :, None, None] ** power

    def linear(self, latents: Tensor) -> Tensor:
        """The reconstruction (B, 3, H, W) of the linear code alone, without the decoder."""
        return F.pixel_shuffle(self.patches_of(latents), self.config.patch)

    def patches_of(self, latents: Tensor) -> Tensor:
        """The patches (B, 3 p p, h, w) of the linear reconstruction."""
        components = latents * self.scales(self.config.whiten)
        return torch.einsum("bchw,cp->bphw", components, self.basis) + self.mean[None, :, None, None]

    def decode(self, latents: Tensor) -> DecoderOutput:
        """The linear reconstruction plus the decoder's residual: latents (B, C, h, w) -> images (B, 3, H, W)."""
        h = self.conv_in(latents / self.scales(1 - self.config.whiten))
        for block in self.blocks:
            h = block(h)
        return DecoderOutput(F.pixel_shuffle(self.patches_of(latents) + self.conv_out(F.silu(h)), self.config.patch))


def pack(latents: Tensor) -> Tensor:
    """FLUX's packing: (B, C, H, W) -> (B, H/2 W/2, 4 C), row-major tokens, channel order (c, dy, dx)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `pack` for a token grid (rows, columns)."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, grid), 2)


def scale_shift(vae: Autoencoder | nn.Module) -> tuple[float, float]:
    """Scale and shift: the model reads (z - shift) * scale. 0.18215 and 0 in Stable Diffusion."""
    config = cast("Autoencoder", vae).config
    return float(config.scaling_factor), float(config.shift_factor or 0.0)


def decode_latents(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> images (B, 3, H, W) in float32, clamped to [-1, 1]."""
    scale, shift = scale_shift(vae)
    z = latents / scale + shift
    return vae.decode(z.to(next(vae.parameters()).dtype)).sample.float().clamp(-1, 1)


def encode_latents(vae: Autoencoder, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w) in float32: the mode of each posterior, or a sample
    by the image's own generator. Images are encoded one by one, so that a row does not depend on its batch."""
    scale, shift = scale_shift(vae)
    images = images.to(next(vae.parameters()))
    latents = []
    for i, image in enumerate(images):
        posterior = vae.encode(image[None]).latent_dist
        latents.append(posterior.mode() if generators is None else posterior.sample(generators[i]))
    return (torch.cat(latents).float() - shift) * scale


def encode_tokens(
    vae: Autoencoder, images: Tensor, generator: torch.Generator | None = None, *, sample: bool = True
) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> packed, scaled tokens of a sample of the posterior, as in OminiControl, or of
    its mode."""
    scale, shift = scale_shift(vae)
    posterior = vae.encode(images).latent_dist
    z = posterior.sample(generator) if sample else posterior.mode()
    return pack((z - shift) * scale)


def decode_tokens(vae: Autoencoder, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Packed, scaled tokens -> images (B, 3, H, W), clamped to [-1, 1]."""
    return decode_latents(vae, unpack(tokens, grid))
