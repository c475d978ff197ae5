"""A linear code of RGBA icons: the principal components of 8 x 8 patches of colour on white and alpha, partly whitened.

Colour on white and alpha are linear in premultiplied RGBA, so the code is exact to invert up to the components left
out, and needs no trained decoder.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.encoders.vae import pack, unpack

PATCH = 8
ALPHA_WEIGHT = 0.7  # of alpha's deviation beside colour's: errors of colour on white count more


def to_planes(rgba: Tensor) -> Tensor:
    """Straight uint8 (B, 4, H, W) -> colour on white in [-1, 1] and weighted alpha, (B, 4, H, W)."""
    x = rgba.float() / 255
    alpha = x[:, 3:]
    white = x[:, :3] * alpha + 1 - alpha
    return torch.cat([2 * white - 1, ALPHA_WEIGHT * (2 * alpha - 1)], 1)


def on_white(planes: Tensor) -> Tensor:
    """The colours on white, (B, 3, H, W) in [-1, 1]."""
    return planes[:, :3].clamp(-1, 1)


def to_rgba(planes: Tensor) -> Tensor:
    """Planes -> straight RGBA in [0, 1], (B, 4, H, W)."""
    alpha = (planes[:, 3:] / ALPHA_WEIGHT / 2 + 0.5).clamp(0, 1)
    premultiplied = ((planes[:, :3] + 1) / 2 - (1 - alpha)).clamp(min=0).minimum(alpha)
    return torch.cat([premultiplied / alpha.clamp(min=1 / 255), alpha], 1)


class RgbaCode(nn.Module):
    """Planes (B, 4, H, W) <-> tokens (B, H/16 W/16, 4 components), packed as FLUX packs its latents."""

    def __init__(self, components: int = 80, whiten: float = 0.5):
        super().__init__()
        pixels = 4 * PATCH * PATCH
        self.components, self.whiten = components, whiten
        self.mean: Tensor
        self.basis: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("basis", torch.zeros(components, pixels))  # orthonormal rows
        self.register_buffer("deviation", torch.ones(components))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Set mean, basis and deviations to the principal components of the patches of planes (B, 4, H, W)."""
        total, first, second = 0, torch.zeros(1), torch.zeros(1)
        for planes in batches:
            x = F.pixel_unshuffle(planes, PATCH).movedim(1, -1).flatten(0, 2)
            total, first, second = total + len(x), first + x.double().sum(0), second + (x.mT @ x).double()
        mean = first / total
        variances, vectors = torch.linalg.eigh(second / total - mean[:, None] * mean)
        self.mean.copy_(mean)
        self.basis.copy_(vectors.flip(-1).mT[: self.components])
        self.deviation.copy_(variances.flip(-1)[: self.components].clamp(min=1e-8).sqrt())

    def encode(self, planes: Tensor) -> Tensor:
        x = F.pixel_unshuffle(planes, PATCH) - self.mean[:, None, None]
        scaled = self.basis / self.deviation[:, None] ** self.whiten
        return pack(torch.einsum("bphw,cp->bchw", x, scaled))

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of `encode`; grid: (rows, columns) of tokens."""
        scaled = self.basis * self.deviation[:, None] ** self.whiten
        x = torch.einsum("bchw,cp->bphw", unpack(tokens, grid), scaled) + self.mean[:, None, None]
        return F.pixel_shuffle(x, PATCH)

    @property
    def variance(self) -> Tensor:
        """Of the numbers of a code, (components,)."""
        return self.deviation ** (2 - 2 * self.whiten)

    def blind_error(self, t: float) -> float:
        """Velocity error at noise level t of the best estimate that sees one number at a time (Wiener's filter).
        Errors in units of it can be compared between codes."""
        variance = self.variance
        return float((variance / ((1 - t) ** 2 * variance + t**2)).mean())
