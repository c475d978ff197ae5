"""IP-Adapter's modules under the published names (Ye et al. 2023, arXiv:2308.06721, section 3.2): projectors, features
of an image encoder -> T tokens of the text's width (`image_proj.`), and K', V' of a layer (`ip_adapter.N.`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.controls.ip_input import Form, IPConfig
from condit.encoders.image import CLIPImage
from condit.nn.attention import Site, join_heads, split_heads
from condit.nn.layers import timestep_features
from condit.nn.lora import LoRA

HEAD_DIM = 64  # of every published Perceiver; no tensor has its size


class ImageProjection(nn.Module):
    """Global: one vector (..., E) -> T tokens (..., T, C); the norm is per token."""

    def __init__(self, features: int, dim: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(features, tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.proj(features).unflatten(-1, (self.tokens, -1)))


class FullProjection(nn.Module):
    """The "full-face" file: every token of the encoder (B, L, H) -> (B, L, C) by an MLP."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, dim), nn.LayerNorm(dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class IdentityProjection(nn.Module):
    """FaceID: a vector of a face (..., E) -> T tokens (..., T, C) by an MLP. InstantX's FLUX files have it too."""

    def __init__(self, features: int, hidden: int, dim: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, tokens * dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.proj(features).unflatten(-1, (self.tokens, -1)))


class PerceiverAttention(nn.Module):
    """Latents attend to the features and to themselves (Jaegle et al. 2021, arXiv:2103.03206)."""

    def __init__(self, dim: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        return self.to_out(perceive(self.to_q(latents), self.to_kv(torch.cat([x, latents], 1)), self.heads))


def perceive(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """Attention (B, Q, inner) with fused keys and values (B, N, 2 inner). Queries and keys are scaled separately
    and the softmax is in float32, as published."""
    query, key, value = (split_heads(x, heads) for x in (q, *kv.chunk(2, -1)))
    scale = query.shape[-1] ** -0.25
    scores = (query * scale) @ (key * scale).mT
    return join_heads(scores.float().softmax(-1).to(value) @ value)


def feed_forward(dim: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, inner, bias=False), nn.GELU(), nn.Linear(inner, dim, bias=False)
    )


class Perceiver(nn.Module):
    """Latents (B, Q, dim) read features (B, L, E) -> (B, Q, C). In FaceID-Plus the latents are a face's tokens."""

    def __init__(self, features: int, dim: int, out: int, *, inner: int, heads: int, depth: int, hidden: int):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(features, dim), nn.Linear(dim, out)
        self.norm_out = nn.LayerNorm(out)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, inner, heads), feed_forward(dim, hidden)]) for _ in range(depth)
        )

    def read(self, latents: Tensor, x: Tensor) -> Tensor:
        """x (B, L, dim) are projected features."""
        for block in self.layers:
            attention, mlp = cast("nn.ModuleList", block)
            latents = latents + attention(x, latents)
            latents = latents + mlp(latents)
        return self.norm_out(self.proj_out(latents))


class Resampler(Perceiver):
    """The "plus" files: learned latents read the encoder's tokens (B, L, E) -> (B, Q, C).

    positions: rows of a learned position table, 0 without one. pooled: the number of further latents
    that are made from the mean of the features; they come first.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        out: int,
        *,
        inner: int,
        heads: int,
        depth: int,
        hidden: int,
        queries: int,
        positions: int = 0,
        pooled: int = 0,
    ):
        super().__init__(features, dim, out, inner=inner, heads=heads, depth=depth, hidden=hidden)
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)
        self.pos_emb = nn.Embedding(positions, features) if positions else None
        self.pooled = pooled
        self.to_latents_from_mean_pooled_seq = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim * pooled)) if pooled else None
        )

    def forward(self, features: Tensor) -> Tensor:
        if self.pos_emb is not None:
            features = features + self.pos_emb.weight[: features.shape[1]]
        x, latents = self.proj_in(features), self.latents.expand(len(features), -1, -1)
        if self.to_latents_from_mean_pooled_seq is not None:
            mean = self.to_latents_from_mean_pooled_seq(x.mean(1)).unflatten(-1, (self.pooled, -1))
            latents = torch.cat([mean, latents], 1)
        return self.read(latents, x)


class IdentityPlusProjection(nn.Module):
    """FaceID-Plus: the tokens of a face (B, E) read CLIP's penultimate states (B, L, H) -> (B, T, C).

    "v2" adds what was read to the face's own tokens, times `shortcut`; the first version (None) keeps only what was
    read. The files of both have the same tensors.
    """

    def __init__(self, identity: IdentityProjection, perceiver: Perceiver):
        super().__init__()
        self.tokens, self.proj, self.norm = identity.tokens, identity.proj, identity.norm
        self.perceiver_resampler = perceiver

    def forward(self, identity: Tensor, features: Tensor, shortcut: float | None = None) -> Tensor:
        own = self.norm(self.proj(identity).unflatten(-1, (self.tokens, -1)))
        read = self.perceiver_resampler.read(own, self.perceiver_resampler.proj_in(features))
        return read if shortcut is None else own + shortcut * read


class TimeBlock(nn.Module):
    """A Perceiver block whose norms of the latents are shifted and scaled by the clock, under diffusers' names."""

    def __init__(self, dim: int, inner: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.ln0, self.ln1, self.adaln_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.adaln_proj = nn.Linear(dim, 4 * dim)
        to_q, to_kv = nn.Linear(dim, inner, bias=False), nn.Linear(dim, 2 * inner, bias=False)
        to_out = nn.ModuleList([nn.Linear(inner, dim, bias=False)])
        self.attn = nn.ModuleDict({"to_q": to_q, "to_kv": to_kv, "to_out": to_out})
        up = nn.ModuleDict({"proj": nn.Linear(dim, hidden, bias=False)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([up, nn.Identity(), nn.Linear(hidden, dim, bias=False)])})

    def forward(self, x: Tensor, latents: Tensor, clock: Tensor) -> Tensor:
        shift, scale, shift_mlp, scale_mlp = self.adaln_proj(F.silu(clock))[:, None].chunk(4, -1)
        h = self.ln1(latents) * (1 + scale) + shift
        q, kv = self.attn["to_q"](h), self.attn["to_kv"](torch.cat([self.ln0(x), h], 1))
        latents = latents + self.attn.get_submodule("to_out.0")(perceive(q, kv, self.heads))
        h = self.adaln_norm(latents) * (1 + scale_mlp) + shift_mlp
        up, down = (self.ff.get_submodule(path) for path in ("net.0.proj", "net.2"))
        return latents + down(F.gelu(up(h)))


class TimeResampler(nn.Module):
    """InstantX's SD3.5 projector: features (B, L, E) at a time (B,) in [0, 1000] -> tokens (B, Q, C) and the clock
    (B, dim) that the layers read. Both depend on the step, so they are computed at each step, not once a run."""

    def __init__(
        self,
        features: int,
        dim: int,
        out: int,
        *,
        queries: int,
        inner: int,
        heads: int,
        depth: int,
        hidden: int,
        t: int,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)
        self.proj_in, self.proj_out, self.norm_out = nn.Linear(features, dim), nn.Linear(dim, out), nn.LayerNorm(out)
        self.layers = nn.ModuleList(TimeBlock(dim, inner, heads, hidden) for _ in range(depth))
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(t, dim), "linear_2": nn.Linear(dim, dim)})
        self.time_dim = t

    def forward(self, features: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.time_embedding["linear_1"], self.time_embedding["linear_2"]
        clock = second(F.silu(first(timestep_features(t, self.time_dim).to(features.dtype))))
        x, latents = self.proj_in(features) + clock[:, None], self.latents.expand(len(features), -1, -1)
        for block in self.layers:
            latents = block(x, latents, clock)
        return self.norm_out(self.proj_out(latents)), clock


# K', V' of a layer, and what a file holds of an adapter


class KeyValue(nn.Module):
    """K' and V' of one site."""

    def __init__(self, dim: int, width: int, *, bias: bool = False):
        super().__init__()
        self.to_k_ip = nn.Linear(dim, width, bias=bias)
        self.to_v_ip = nn.Linear(dim, width, bias=bias)


@dataclass(frozen=True)
class Layer:
    """The attention layer that K', V' number `number` of a file belong to."""

    number: int
    path: str
    width: int
    heads: int


@dataclass(frozen=True)
class IPParts:
    """An adapter as its file holds it: tensors under the names of a module with K', V' of `layers` and none of
    `absent`; FaceID's LoRA, numbered by the paths of all attention layers."""

    config: IPConfig
    layers: Sequence[Layer]
    tensors: Mapping[str, Tensor]
    projector: nn.Module | None = None
    absent: Sequence[Layer] = ()
    encoder: CLIPImage | None = None
    lora: LoRA | None = None
    attentions: tuple[str, ...] = ()


def layers_of(backbone: nn.Module, sites: Sequence[Site], form: Form) -> list[Layer]:
    """Every layer of a backbone that an adapter of this form may have K', V' for, with the published number: on UNets
    the place among all attention layers (odd: those to the text), on FLUX that of the double block."""
    chosen = {
        "cross": [(i, s) for i, s in enumerate(sites) if s.kind == "cross"],
        "residual": [(i, s) for i, s in enumerate(sites) if not s.path.startswith("single_")],
        "joint": list(enumerate(sites)),
    }[form]
    layers = []
    for number, site in chosen:
        attention: Any = backbone.get_submodule(site.path)
        layers.append(Layer(number, site.path, attention.to_q.out_features, attention.heads))
    return layers
