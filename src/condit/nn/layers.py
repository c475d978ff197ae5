"""Small layers that backbones share: patches, rotary positions, timestep features, adaptive norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from condit.nn.lora import Linear, LowRank

Rope = tuple[Tensor, Tensor]


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Dropout that takes a generator, on x's device; F.dropout uses the global one only."""
    if rate == 0:
        return x
    keep = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
    return x * keep / (1 - rate)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation. Compiled for a CPU it is written with the logistic function, which is the same
    in exact arithmetic and takes less than half the time: it was a quarter of a compiled training step."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))
    return F.gelu(x, approximate="tanh")


def recomputed(
    block: Callable[..., Tensor], x: Tensor, *rest: object, rate: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """block(x, *rest), which keeps x alone for the backward pass and computes the block there again, with the same
    dropout of `rate` from `generator` (None: the global one). The backward pass leaves the generator in another
    state."""
    if generator is None or rate == 0:
        return checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=rate > 0)
    state = generator.get_state()

    def run(*inputs: object) -> Tensor:
        generator.set_state(state)
        return block(*inputs)

    return checkpoint(run, x, *rest, use_reentrant=False, preserve_rng_state=False)


def rope_frequencies(ids: Tensor, axes: Sequence[int], theta: float = 10_000.0) -> Rope:
    """Cosine and sine of the rotary angles, each (..., N, sum(axes) / 2) float32, for ids (..., N, len(axes)).

    Angles are computed in float64 as in FLUX; one value serves a pair of channels.
    """
    angles = []
    for axis, dim in enumerate(axes):
        omega = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(ids[..., axis, None].double() * omega)
    angle = torch.cat(angles, -1)
    if angle.ndim == 3:  # ids of each sample: add a dimension for the heads
        angle = angle[:, None]
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs of x (B, H, N, D) in float32."""
    cos, sin = rope
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imag * sin, imag * cos + real * sin], -1).flatten(-2).to(x.dtype)


class Uninitialised(TorchFunctionMode):
    """With `torch.device("meta")`, makes modules without normal initialisation: torch imports its compiler to compute
    one on that device, which takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        skipped = func in (Tensor.normal_, nn.init.normal_)
        return (args[0] if args else given["tensor"]) if skipped else func(*args, **given)


def timestep_features(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal features (B,) -> (B, dim) in float32, cosine first, no frequency shift."""
    omega = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * omega
    return torch.cat([angle.cos(), angle.sin()], -1)


class PatchEmbedder(nn.Module):
    """Non-overlapping patches through one linear map, as a strided convolution: (B, C, H, W) -> (B, N, dim), row by
    row."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Embedder(nn.Module):
    """Linear, SiLU, Linear under diffusers' names: (B, n_in) -> (B, dim)."""

    def __init__(self, n_in: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = Linear(n_in, dim), Linear(dim, dim)

    def forward(self, x: Tensor, lora: LowRank | None = None) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x, lora)), lora)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its input: under autocast the float32 weight would force an unfused path."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class AdaNorm(nn.Module):
    """LayerNorm with shift, scale (and gates) from an embedding (B, dim): `linear(silu(embedding))` in chunks."""

    def __init__(self, dim: int, chunks: int):
        super().__init__()
        self.linear, self.dim, self.chunks = Linear(dim, chunks * dim), dim, chunks

    def modulation(self, embedding: Tensor, lora: LowRank | None = None) -> tuple[Tensor, ...]:
        """The chunks, each (B, 1, dim), in the order of the published weights."""
        return self.linear(F.silu(embedding), lora)[:, None].chunk(self.chunks, -1)

    def forward(self, x: Tensor, embedding: Tensor, lora: LowRank | None = None) -> tuple[Tensor, ...]:
        """The norm of x (B, N, dim), and the gates."""
        shift, scale, *gates = self.modulation(embedding, lora)
        return modulated_norm(x, shift, scale), *gates


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights (eps 1e-6), then scale and shift; x (B, N, C), shift and scale (B, 1, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class UpProjection(nn.Module):
    """A linear layer under diffusers' name `proj`."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = Linear(dim, hidden)

    def forward(self, x: Tensor, lora: LowRank | None = None) -> Tensor:
        return self.proj(x, lora)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear under diffusers' names `net.0.proj` and `net.2`."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.net = nn.ModuleList([UpProjection(dim, ratio * dim), nn.Identity(), Linear(ratio * dim, dim)])

    def forward(self, x: Tensor, lora: LowRank | None = None) -> Tensor:
        return self.net[2](tanh_gelu(self.net[0](x, lora)), lora)
