"""Small layers that several backbones share: rotary positions, timestep features, adaptive norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from condit.nn.lora import Linear, LowRank

Rope = tuple[Tensor, Tensor]


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """x with a share `rate` of its numbers zero and the others larger; drawn on x's device. F.dropout knows the global
    generator only."""
    if rate == 0:
        return x
    keep = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
    return x * keep / (1 - rate)


def recomputed(
    block: Callable[..., Tensor], x: Tensor, *rest: Any, rate: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """block(x, *rest), of which the backward pass is left x alone: it computes the block again, with the same dropout
    of `rate` from `generator` (None: the global one). Behind it the generator stands anywhere."""
    if generator is None or rate == 0:
        return checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=rate > 0)
    state = generator.get_state()

    def again(*given: Any) -> Tensor:
        generator.set_state(state)
        return block(*given)

    return checkpoint(again, x, *rest, use_reentrant=False, preserve_rng_state=False)


def rope_frequencies(ids: Tensor, axes: Sequence[int], theta: float = 10_000.0) -> Rope:
    """cos and sin of the rotary angles, each (..., N, sum(axes) / 2) float32, for ids (..., N, len(axes)).

    Angles are formed in float64 as FLUX does; one value serves a channel pair.
    """
    angles = []
    for axis, dim in enumerate(axes):
        omega = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(ids[..., axis, None].double() * omega)
    angle = torch.cat(angles, -1)
    if angle.ndim == 3:  # per-sample ids: a place for the heads
        angle = angle[:, None]
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs of x (B, H, N, D) in float32."""
    cos, sin = rope
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imag * sin, imag * cos + real * sin], -1).flatten(-2).to(x.dtype)


def timestep_features(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal features (B,) -> (B, dim) in float32, cosine first, no frequency shift."""
    omega = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * omega
    return torch.cat([angle.cos(), angle.sin()], -1)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its input: under autocast the float32 weight would force an unfused path."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class AdaNorm(nn.Module):
    """LayerNorm whose shift, scale (and gates) come from an embedding (B, dim): `linear(silu(embedding))` in chunks."""

    def __init__(self, dim: int, chunks: int):
        super().__init__()
        self.linear, self.dim, self.chunks = Linear(dim, chunks * dim), dim, chunks

    def modulation(self, embedding: Tensor, lora: LowRank | None = None) -> tuple[Tensor, ...]:
        """The chunks, each (B, 1, dim), in the order of the published weights."""
        return self.linear(F.silu(embedding), lora)[:, None].chunk(self.chunks, -1)

    def forward(self, x: Tensor, embedding: Tensor, lora: LowRank | None = None) -> tuple[Tensor, ...]:
        shift, scale, *gates = self.modulation(embedding, lora)
        return modulated_norm(x, shift, scale), *gates


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Affine-free LayerNorm (eps 1e-6), then scale and shift; x (B, N, C), shift and scale (B, 1, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear under diffusers' names `net.0.proj` and `net.2`."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        up = nn.Module()
        up.proj = Linear(dim, ratio * dim)
        self.net = nn.ModuleList([up, nn.Identity(), Linear(ratio * dim, dim)])

    def forward(self, x: Tensor, lora: LowRank | None = None) -> Tensor:
        up = cast("Linear", self.net[0].proj)
        return self.net[2](F.gelu(up(x, lora), approximate="tanh"), lora)
