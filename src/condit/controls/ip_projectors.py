"""IP-Adapter's projectors: features of an image encoder -> T tokens of the text's width (Ye et al. 2023,
arXiv:2308.06721, section 3.2.1). Parameter names are those of the published files, under `image_proj.`"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.nn.attention import join_heads, split_heads
from condit.nn.layers import timestep_features

HEAD_DIM = 64  # of every published Perceiver; no tensor tells it


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
    """Attention (B, Q, inner) with fused keys and values (B, N, 2 inner). Queries and keys are scaled apart and the
    softmax is in float32, as published."""
    query, key, value = (split_heads(x, heads) for x in (q, *kv.chunk(2, -1)))
    scale = query.shape[-1] ** -0.25
    scores = (query * scale) @ (key * scale).mT
    return join_heads(scores.float().softmax(-1).to(value) @ value)


def feed_forward(dim: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, inner, bias=False), nn.GELU(), nn.Linear(inner, dim, bias=False)
    )


class Perceiver(nn.Module):
    """Given latents (B, Q, dim) read features (B, L, E) -> (B, Q, C). FaceID-Plus gives its own latents."""

    def __init__(self, features: int, dim: int, out: int, *, inner: int, heads: int, depth: int, hidden: int):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(features, dim), nn.Linear(dim, out)
        self.norm_out = nn.LayerNorm(out)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, inner, heads), feed_forward(dim, hidden)]) for _ in range(depth)
        )

    def read(self, latents: Tensor, x: Tensor) -> Tensor:
        """x (B, L, dim) is projected already."""
        for attention, mlp in self.layers:  # type: ignore[misc]
            latents = latents + attention(x, latents)
            latents = latents + mlp(latents)
        return self.norm_out(self.proj_out(latents))

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        return self.read(latents, self.proj_in(features))


class Resampler(Perceiver):
    """The "plus" files: learned latents read the encoder's tokens (B, L, E) -> (B, Q, C).

    positions: rows of a learned position table, 0 without one. pooled: how many latents more are made from the mean
    of the features; they stand in front.
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

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
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
        read = self.perceiver_resampler(own, features)
        return read if shortcut is None else own + shortcut * read


class TimeBlock(nn.Module):
    """A Perceiver block whose norms of the latents are shifted and scaled by the clock, under diffusers' names."""

    def __init__(self, dim: int, inner: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.ln0, self.ln1, self.adaln_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.adaln_proj = nn.Linear(dim, 4 * dim)
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(dim, inner, bias=False)
        self.attn.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.attn.to_out = nn.ModuleList([nn.Linear(inner, dim, bias=False)])
        up = nn.Module()
        up.proj = nn.Linear(dim, hidden, bias=False)
        self.ff = nn.Module()
        self.ff.net = nn.ModuleList([up, nn.Identity(), nn.Linear(hidden, dim, bias=False)])

    def forward(self, x: Tensor, latents: Tensor, clock: Tensor) -> Tensor:
        shift, scale, shift_mlp, scale_mlp = self.adaln_proj(F.silu(clock))[:, None].chunk(4, -1)
        h = self.ln1(latents) * (1 + scale) + shift
        q, kv = self.attn.to_q(h), self.attn.to_kv(torch.cat([self.ln0(x), h], 1))  # type: ignore[operator]
        latents = latents + self.attn.to_out[0](perceive(q, kv, self.heads))  # type: ignore[index]
        h = self.adaln_norm(latents) * (1 + scale_mlp) + shift_mlp
        net: Any = self.ff.net
        return latents + net[2](F.gelu(net[0].proj(h)))


class TimeResampler(nn.Module):
    """InstantX's SD3.5 projector: features (B, L, E) at a time (B,) in [0, 1000] -> tokens (B, Q, C) and the clock
    (B, dim) that the layers read. Both depend on the step, so they are made once a step, not once a run."""

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
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1, self.time_embedding.linear_2 = nn.Linear(t, dim), nn.Linear(dim, dim)
        self.time_dim = t

    def forward(self, features: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.time_embedding.linear_1, self.time_embedding.linear_2
        clock = second(F.silu(first(timestep_features(t, self.time_dim).to(features.dtype))))  # type: ignore[operator]
        x, latents = self.proj_in(features) + clock[:, None], self.latents.expand(len(features), -1, -1)
        for block in self.layers:
            latents = block(x, latents, clock)
        return self.norm_out(self.proj_out(latents)), clock


# A projector is told from its tensors


def projector_of(tensors: Mapping[str, Tensor], head_dim: int = HEAD_DIM) -> nn.Module:
    """The projector of these tensors (without `image_proj.`), sizes from their shapes, strictly loaded. head_dim: of a
    Perceiver. ValueError for tensors of no projector that is known here."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # On the meta device: what is built here is filled by the file a moment later.
    with torch.device("meta"):
        if "time_embedding.linear_1.weight" in shape:
            found: nn.Module = _time_resampler(shape, head_dim)
        elif "latents" in shape:
            found = _resampler(shape, head_dim)
        elif "perceiver_resampler.proj_in.weight" in shape:
            perceiver = {name.removeprefix("perceiver_resampler."): s for name, s in shape.items()}
            found = IdentityPlusProjection(_identity(shape), Perceiver(**_sizes(perceiver, HEAD_DIM)))
        elif "proj.3.weight" in shape:
            found = FullProjection(shape["proj.0.weight"][1], shape["proj.2.weight"][0])
        elif "proj.2.weight" in shape and "norm.weight" in shape:
            found = _identity(shape)
        elif len(shape.get("proj.weight", ())) == 2 and "norm.weight" in shape:
            rows, features = shape["proj.weight"]
            (dim,) = shape["norm.weight"]
            found = ImageProjection(features, dim, rows // dim)
        else:
            first = next(iter(shape), "nothing")
            raise ValueError(f"no projector known here: expected proj, latents or perceiver_resampler; found {first!r}")
    wanted = {name: tuple(value.shape) for name, value in found.state_dict().items()}
    if wanted != shape:
        wrong = sorted(n for n in {*wanted, *shape} if wanted.get(n) != shape.get(n))
        raise ValueError(
            f"projector {type(found).__name__}: {len(wrong)} tensors do not fit (first: {wrong[0]!r}, expected "
            f"{wanted.get(wrong[0])}, found {shape.get(wrong[0])})"
        )
    found.load_state_dict(dict(tensors), strict=True, assign=True)
    return found


Shapes = Mapping[str, tuple[int, ...]]


def _identity(shape: Shapes) -> IdentityProjection:
    (hidden, features), (rows, _), (dim,) = shape["proj.0.weight"], shape["proj.2.weight"], shape["norm.weight"]
    return IdentityProjection(features, hidden, dim, rows // dim)


def _sizes(shape: Shapes, head_dim: int) -> dict[str, int]:
    """Of a Perceiver in the official names."""
    inner = shape["layers.0.0.to_q.weight"][0]
    return {
        "features": shape["proj_in.weight"][1],
        "dim": shape["proj_in.weight"][0],
        "out": shape["proj_out.weight"][0],
        "inner": inner,
        "heads": _heads(inner, head_dim),
        "depth": sum(name.endswith(".0.to_q.weight") for name in shape),
        "hidden": shape["layers.0.1.1.weight"][0],
    }


def _resampler(shape: Shapes, head_dim: int) -> Resampler:
    pooled, dim = shape.get("to_latents_from_mean_pooled_seq.1.weight", (0,))[0], shape["latents"][2]
    positions = shape.get("pos_emb.weight", (0,))[0]
    queries = shape["latents"][1]
    return Resampler(**_sizes(shape, head_dim), queries=queries, positions=positions, pooled=pooled // dim)


def _time_resampler(shape: Shapes, head_dim: int) -> TimeResampler:
    inner = shape["layers.0.attn.to_q.weight"][0]
    return TimeResampler(
        features=shape["proj_in.weight"][1],
        dim=shape["proj_in.weight"][0],
        out=shape["proj_out.weight"][0],
        queries=shape["latents"][1],
        inner=inner,
        heads=_heads(inner, head_dim),
        depth=sum(name.endswith(".attn.to_q.weight") for name in shape),
        hidden=shape["layers.0.ff.net.0.proj.weight"][0],
        t=shape["time_embedding.linear_1.weight"][1],
    )


def _heads(inner: int, head_dim: int) -> int:
    if inner % head_dim:
        raise ValueError(
            f"a Perceiver of inner width {inner} has no heads of {head_dim}. Published ones have {HEAD_DIM}; for "
            "another give head_dim="
        )
    return inner // head_dim
