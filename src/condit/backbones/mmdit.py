"""MM-DiT: the multi-modal diffusion transformer of FLUX.1 (Black Forest Labs 2024; block design: Esser et al. 2024,
arXiv:2403.03206), over streams. Parameter names are those of diffusers' `FluxTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.nn.attention import Call, Reduction, Site, attend, join_heads, reduction, split_heads
from condit.nn.layers import (
    AdaNorm,
    FeedForward,
    RMSNorm,
    Rope,
    apply_rope,
    modulated_norm,
    rope_frequencies,
    timestep_features,
)
from condit.nn.lora import Linear, LowRank, name_linears
from condit.nn.streams import Group, Stream, groups, row_weights


@dataclass(frozen=True)
class MMDiTConfig:
    """Fields and defaults of diffusers' `FluxTransformer2DModel` (the defaults are FLUX.1-schnell)."""

    in_channels: int = 64
    out_channels: int | None = None  # None: in_channels. FLUX.1 Fill and Canny feed more channels than they predict.
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    patch_size: int = 1

    @property
    def dim(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {self.axes_dims_rope} must add up to attention_head_dim {self.attention_head_dim}."
            )


PRESETS: dict[str, MMDiTConfig] = {
    "flux-dev": MMDiTConfig(guidance_embeds=True),  # black-forest-labs/FLUX.1-dev, transformer/config.json; 11.9 B
    "flux-schnell": MMDiTConfig(),  # black-forest-labs/FLUX.1-schnell
    "flux-fill": MMDiTConfig(in_channels=384, out_channels=64, guidance_embeds=True),  # FLUX.1-Fill-dev
    # Ours: 64 tokens of 16 px at 128 px; 16 channels more carry the text's canvas (docs/tiny.md).
    "tiny": MMDiTConfig(
        in_channels=144,
        out_channels=128,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=192,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
    ),
}


@dataclass(frozen=True)
class Frame:
    """What one forward holds fixed over its blocks: the streams, their clocks, positions and who sees whom."""

    loras: tuple[LowRank | None, ...]
    embeddings: tuple[Tensor, ...]
    ropes: tuple[Rope, ...]
    groups: tuple[Group, ...]
    text: int | None  # index of the text stream
    image: tuple[int, int] | None  # (stream index, first row within it) of the noisy image
    controls: tuple
    memories: tuple[dict[str, tuple[Tensor, Tensor]] | None, ...]  # of each stream, for its keys and values
    merged: Reduction | None = None

    @property
    def main(self) -> tuple[int, ...]:
        """The streams of text and image."""
        return tuple(i for i in (self.text, self.image and self.image[0]) if i is not None)

    def image_part(self, stream: int, length: int) -> slice:
        """Which tokens of a main stream are the noisy image's."""
        if self.image is None or stream != self.image[0]:
            return slice(0, 0)
        return slice(self.image[1], length)

    def reduction(self, site: Site, xs: Sequence[Tensor]) -> Reduction | None:
        """How controls merge tokens of the noisy image at a site; xs are the streams behind the norm."""
        if self.image is None or not self.controls:
            return None
        stream, begin = self.image
        return reduction(site, xs[stream], slice(begin, xs[stream].shape[1]), self.controls)

    def reduced(self, merged: Reduction) -> Frame:
        """The frame of fewer tokens: positions of one of each group, strengths of conditions as means."""
        stream = self.image[0] if self.image else 0
        cos, sin = self.ropes[stream]
        rope = merged.pick(cos), merged.pick(sin)

        def fewer(weight: Tensor | None) -> Tensor | None:
            return weight if weight is None or weight.ndim == 0 else merged.merge(weight[..., None])[..., 0]

        return replace(
            self,
            ropes=(*self.ropes[:stream], rope, *self.ropes[stream + 1 :]),
            groups=tuple(replace(g, weights=tuple(fewer(w) for w in g.weights)) for g in self.groups),
            merged=merged,
        )

    def on_image(self, xs: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The streams with that of the noisy image changed."""
        return [change(x) if self.image and i == self.image[0] else x for i, x in enumerate(xs)]


class Embedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, n_in: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = Linear(n_in, dim), Linear(dim, dim)

    def forward(self, x: Tensor, lora: LowRank | None = None) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x, lora)), lora)


class TimeTextEmbed(nn.Module):
    """The clock of a stream: MLP(t) + MLP(guidance) + MLP(pooled text)."""

    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.timestep_embedder = Embedder(256, c.dim)
        if c.guidance_embeds:
            self.guidance_embedder = Embedder(256, c.dim)
        self.text_embedder = Embedder(c.pooled_projection_dim, c.dim)

    def forward(self, stream: Stream) -> Tensor:
        """(B, dim)."""
        dtype, lora = stream.tokens.dtype, stream.lora
        embedding = self.timestep_embedder(timestep_features(stream.timestep.to(dtype) * 1000).to(dtype), lora)
        if stream.guidance is not None:
            features = timestep_features(stream.guidance.to(dtype) * 1000).to(dtype)
            embedding = embedding + self.guidance_embedder(features, lora)
        return embedding + self.text_embedder(stream.pooled, lora)


class JointAttention(nn.Module):
    """Queries of every stream over the keys of the streams that it may see."""

    def __init__(self, c: MMDiTConfig, site: Site, *, with_text: bool):
        super().__init__()
        self.heads, self.site, self.with_text = c.num_attention_heads, site, with_text
        self.to_q, self.to_k, self.to_v = (Linear(c.dim, c.dim) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(c.attention_head_dim, eps=1e-6) for _ in range(2))
        if with_text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(c.dim, c.dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (RMSNorm(c.attention_head_dim, eps=1e-6) for _ in range(2))
            self.to_out, self.to_add_out = nn.ModuleList([Linear(c.dim, c.dim)]), Linear(c.dim, c.dim)

    def qkv(self, x: Tensor, lora: LowRank | None, rope: Rope, *, text: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and the queries before rotary positions, each (B, H, N, D)."""
        if text and self.with_text:
            linears = self.add_q_proj, self.add_k_proj, self.add_v_proj
            norm_q, norm_k = self.norm_added_q, self.norm_added_k
        else:
            linears, norm_q, norm_k = (self.to_q, self.to_k, self.to_v), self.norm_q, self.norm_k
        q, k, v = (split_heads(linear(x, lora), self.heads) for linear in linears)
        plain = norm_q(q)
        return apply_rope(plain, rope), apply_rope(norm_k(k), rope), v, plain

    def forward(self, xs: Sequence[Tensor], frame: Frame) -> tuple[list[Tensor], Tensor | None]:
        """Attention output of every stream, and the noisy image's queries before rotary positions."""
        merged = frame.merged
        if merged is None:
            return self.attended(xs, frame)
        out, plain = self.attended(frame.on_image(xs, merged.merge), frame)
        return frame.on_image(out, merged.unmerge), None if plain is None else merged.unmerge(plain)

    def attended(self, xs: Sequence[Tensor], frame: Frame) -> tuple[list[Tensor], Tensor | None]:
        """The same of tokens that are merged already."""
        q, k, v, plain = zip(
            *(
                self.qkv(x, lora, rope, text=i == frame.text)
                for i, (x, lora, rope) in enumerate(zip(xs, frame.loras, frame.ropes, strict=True))
            ),
            strict=True,
        )
        for memory, keys, values in zip(frame.memories, k, v, strict=True):
            if memory is not None:
                memory[self.site.path] = keys, values
        out: list[Tensor] = []
        for group in frame.groups:
            lengths = [q[i].shape[2] for i in group.rows]
            call = Call(
                join([q[i] for i in group.rows]),
                join([k[j] for j in group.cols]),
                join([v[j] for j in group.cols]),
                self.site,
                bias=score_bias(group, k, frame),
                image=image_rows(group, lengths, frame),
                plain=join([plain[i] for i in group.rows]) if frame.controls else None,
                keys=image_part_of(group.cols, [k[j].shape[2] for j in group.cols], frame),
                merged=frame.merged if set(group.rows) & set(frame.main) else None,
            )
            out += join_heads(attend(call, frame.controls)).split(lengths, 1)
        if self.with_text:
            out = [
                self.to_add_out(o, lora) if i == frame.text else self.to_out[0](o, lora)
                for i, (o, lora) in enumerate(zip(out, frame.loras, strict=True))
            ]
        return out, None if frame.image is None else plain[frame.image[0]]


def join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)


def with_residuals(xs: list[Tensor], site: Site, plain: Tensor | None, frame: Frame) -> list[Tensor]:
    """The streams after a block, with what controls add to the rows of the noisy image."""
    if frame.image is None or plain is None:
        return xs
    stream, begin = frame.image
    for control in frame.controls:
        addition = control.residual(site, plain[:, :, begin:])
        if addition is not None:
            x = xs[stream]
            joined = x + addition if begin == 0 else torch.cat([x[:, :begin], x[:, begin:] + addition], 1)
            xs = [*xs[:stream], joined, *xs[stream + 1 :]]
    return xs


def score_bias(group: Group, keys: Sequence[Tensor], frame: Frame) -> Tensor | None:
    """Log weights of the group's scores; None if all are 1. One row over the keys (1, 1, 1, Nk) serves every query,
    unless a weight differs from token to token of the image: (B or 1, 1, Nq or 1, Nk)."""
    if all(w is None for w in group.weights):
        return None
    blocks = []
    for j, weight in zip(group.cols, group.weights, strict=True):
        n = keys[j].shape[2]
        zeros = keys[j].new_zeros(1, 1, 1, n)
        if weight is None or weight.ndim == 0:
            blocks.append(zeros if weight is None else zeros + weight.to(zeros))
        elif j in frame.main:  # a condition's queries: the weight stands with the keys
            blocks.append(row_weights(weight, n, frame.image_part(j, n))[:, None, None].to(zeros))
        else:
            rows = [row_weights(weight, keys[i].shape[2], frame.image_part(i, keys[i].shape[2])) for i in group.rows]
            blocks.append(torch.cat(rows, 1)[:, None, :, None].to(zeros).expand(-1, -1, -1, n))
    shape = torch.broadcast_shapes(*(b.shape[:-1] for b in blocks))
    return torch.cat([b.expand(*shape, -1) for b in blocks], -1)


def image_rows(group: Group, lengths: Sequence[int], frame: Frame) -> slice | None:
    """Where the noisy image's rows stand among the group's queries; empty for text alone, None for a condition."""
    if frame.image is None or not set(group.rows) & set(frame.main):
        return None
    return image_part_of(group.rows, lengths, frame) or slice(0, 0)


def image_part_of(streams: Sequence[int], lengths: Sequence[int], frame: Frame) -> slice | None:
    """Where the noisy image stands in these streams side by side; None if it is not among them."""
    if frame.image is None or frame.image[0] not in streams:
        return None
    place = streams.index(frame.image[0])
    begin = sum(lengths[:place])
    return slice(begin + frame.image[1], begin + lengths[place])


class DoubleBlock(nn.Module):
    """Text and image tokens with weights of their own, one joint attention. Conditions run through the image side."""

    def __init__(self, c: MMDiTConfig, site: Site):
        super().__init__()
        self.norm1, self.norm1_context = AdaNorm(c.dim, 6), AdaNorm(c.dim, 6)
        self.attn = JointAttention(c, site, with_text=True)
        self.ff, self.ff_context = FeedForward(c.dim), FeedForward(c.dim)

    def forward(self, xs: Sequence[Tensor], frame: Frame) -> list[Tensor]:
        normed = [
            (self.norm1_context if i == frame.text else self.norm1)(x, embedding, lora)
            for i, (x, embedding, lora) in enumerate(zip(xs, frame.embeddings, frame.loras, strict=True))
        ]
        hs = [n[0] for n in normed]
        merged = frame.reduction(self.attn.site, hs)
        attended, plain = self.attn(hs, frame if merged is None else frame.reduced(merged))
        out = []
        for i, (x, a, (_, gate, shift, scale, gate_mlp)) in enumerate(zip(xs, attended, normed, strict=True)):
            x = x + gate * a
            h, ff = modulated_norm(x, shift, scale), self.ff_context if i == frame.text else self.ff
            if merged is not None and merged.mlp and frame.image and i == frame.image[0]:
                out.append(x + gate_mlp * merged.unmerge(ff(merged.merge(h), frame.loras[i])))
            else:
                out.append(x + gate_mlp * ff(h, frame.loras[i]))
        return with_residuals(out, self.attn.site, plain, frame)


class SingleBlock(nn.Module):
    """Attention and MLP in parallel, text and image with the same weights."""

    def __init__(self, c: MMDiTConfig, site: Site):
        super().__init__()
        self.norm = AdaNorm(c.dim, 3)
        self.attn = JointAttention(c, site, with_text=False)
        self.proj_mlp, self.proj_out = Linear(c.dim, 4 * c.dim), Linear(5 * c.dim, c.dim)

    def forward(self, xs: Sequence[Tensor], frame: Frame) -> list[Tensor]:
        normed = [self.norm(x, e, lora) for x, e, lora in zip(xs, frame.embeddings, frame.loras, strict=True)]
        hs = [n[0] for n in normed]
        merged = frame.reduction(self.attn.site, hs)
        if merged is None:
            outs, plain = self.both(hs, frame)
        elif not merged.mlp:
            outs, plain = self.both(hs, frame.reduced(merged))
        else:
            # Attention and MLP run on the same merged tokens; the attention must not merge them again.
            outs, plain = self.both(frame.on_image(hs, merged.merge), frame.reduced(merged), merged_already=True)
            outs, plain = frame.on_image(outs, merged.unmerge), None if plain is None else merged.unmerge(plain)
        out = [x + gate * y for x, y, (_, gate) in zip(xs, outs, normed, strict=True)]
        return with_residuals(out, self.attn.site, plain, frame)

    def both(self, hs: Sequence[Tensor], frame: Frame, *, merged_already: bool = False):
        """Attention and MLP of every stream, projected together; and the noisy image's queries."""
        attended, plain = (self.attn.attended if merged_already else self.attn)(hs, frame)
        outs = []
        for h, a, lora in zip(hs, attended, frame.loras, strict=True):
            mlp = F.gelu(self.proj_mlp(h, lora), approximate="tanh")
            outs.append(self.proj_out(torch.cat([a, mlp], -1), lora))
        return outs, plain


class MMDiT(nn.Module):
    """FLUX's transformer. `forward` predicts for the noisy image; `prefill` runs conditions on their own."""

    merges = True  # its blocks ask `reduction`

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        c = self.config = config
        self.time_text_embed = TimeTextEmbed(c)
        self.context_embedder, self.x_embedder = Linear(c.joint_attention_dim, c.dim), Linear(c.in_channels, c.dim)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(c, Site(f"transformer_blocks.{i}.attn", "joint", i)) for i in range(c.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(c, Site(f"single_transformer_blocks.{i}.attn", "joint", c.num_layers + i))
            for i in range(c.num_single_layers)
        )
        self.norm_out, self.proj_out = AdaNorm(c.dim, 2), Linear(c.dim, c.out_channels or c.in_channels)
        name_linears(self)

    @property
    def sites(self) -> list[Site]:
        """Every attention layer in the order of execution."""
        return [m.site for m in self.modules() if isinstance(m, JointAttention)]

    def embed(self, stream: Stream) -> tuple[Tensor, Tensor, Rope]:
        """Tokens, clock and positions of an image-like stream."""
        rope = rope_frequencies(stream.ids, self.config.axes_dims_rope)
        return self.x_embedder(stream.tokens, stream.lora), self.time_text_embed(stream), rope

    def forward(
        self,
        image: Stream,
        text: Tensor,
        text_ids: Tensor,
        *,
        conditions: Sequence[Stream] = (),
        controls: Sequence = (),
    ) -> Tensor:
        """Prediction for the noisy image, (B, N, out_channels). text (B, L, joint_attention_dim), text_ids (L, 3).

        Text shares the image's clock. `conditions` join the sequence; `controls` wrap the attention calls.
        """
        x, clock, rope = self.embed(image)
        rope_text = rope_frequencies(text_ids, self.config.axes_dims_rope)
        embedded = [self.embed(s) for s in conditions]
        streams = (None, None, *conditions)
        double = Frame(
            loras=(image.lora, image.lora, *(s.lora for s in conditions)),
            embeddings=(clock, clock, *(e[1] for e in embedded)),
            ropes=(rope_text, rope, *(e[2] for e in embedded)),
            groups=tuple(groups(0, 1, streams, apart=bool(controls))),
            text=0,
            image=(1, 0),
            controls=tuple(controls),
            memories=(None, None, *(s.memory for s in conditions)),
        )
        xs = [self.context_embedder(text, image.lora), x, *(e[0] for e in embedded)]
        for block in self.transformer_blocks:
            xs = block(xs, double)
        # In the single blocks text and image share weights and clock, so they run as one stream, text first -
        # unless a strength must tell their rows apart.
        split = any(s.log_weight is not None and not s.weight_text for s in conditions)
        single = double if split else merge_main(double, text.shape[1], streams)
        if not split:
            xs = [torch.cat(xs[:2], 1), *xs[2:]]
        for block in self.single_transformer_blocks:
            xs = block(xs, single)
        h = xs[1] if split else xs[0][:, text.shape[1] :]
        # diffusers' norm_out stores (scale, shift); every other AdaNorm stores (shift, scale).
        scale, shift = self.norm_out.modulation(clock, image.lora)
        return self.proj_out(modulated_norm(h, shift, scale), image.lora)

    def prefill(self, condition: Stream, controls: Sequence) -> None:
        """Run one independent condition alone; `controls` see its calls (OminiControl2, arXiv:2503.08280: its keys and
        values depend on neither noise nor time, so one pass serves every step)."""
        x, clock, rope = self.embed(condition)
        frame = Frame(
            loras=(condition.lora,),
            embeddings=(clock,),
            ropes=(rope,),
            groups=(Group((0,), (0,), (None,)),),
            text=None,
            image=None,
            controls=tuple(controls),
            memories=(condition.memory,),
        )
        xs = [x]
        for block in chain(self.transformer_blocks, self.single_transformer_blocks):
            xs = block(xs, frame)


def merge_main(frame: Frame, text_length: int, streams: Sequence[Stream | None]) -> Frame:
    """The frame of the single blocks: text and image as stream 0, conditions behind."""
    (cos_text, sin_text), (cos, sin) = frame.ropes[:2]
    if cos.ndim == 4:  # per-sample image positions
        cos_text, sin_text = (r.expand(cos.shape[0], 1, -1, -1) for r in (cos_text, sin_text))
    rope = torch.cat([cos_text, cos], -2), torch.cat([sin_text, sin], -2)
    return replace(
        frame,
        loras=frame.loras[1:],
        embeddings=frame.embeddings[1:],
        memories=frame.memories[1:],
        ropes=(rope, *frame.ropes[2:]),
        groups=tuple(groups(None, 0, streams[1:], apart=bool(frame.controls))),
        text=None,
        image=(0, text_length),
    )
