"""Joint attention of the MM-DiT: which tokens of which stream attend to which, and with what weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from condit.nn.attention import BlockControl, Call, Reduction, Site, attend, join_heads, reduction, split_heads
from condit.nn.layers import RMSNorm, Rope, apply_rope
from condit.nn.lora import Linear, LowRank
from condit.nn.streams import Group, row_weights


@dataclass(frozen=True)
class MMDiTContext:
    """The inputs that all blocks of one forward share: the streams' LoRAs, embeddings, positions and visibility."""

    loras: tuple[LowRank | None, ...]
    embeddings: tuple[Tensor, ...]
    ropes: tuple[Rope, ...]
    groups: tuple[Group, ...]
    text: int | None  # index of the text stream
    image: tuple[int, int] | None  # (stream index, first row within it) of the noisy image
    controls: tuple[BlockControl, ...]
    memories: tuple[dict[str, tuple[Tensor, Tensor]] | None, ...]  # of each stream, for its keys and values
    merged: Reduction | None = None

    @property
    def main(self) -> tuple[int, ...]:
        """Indices of the streams of text and image."""
        return tuple(i for i in (self.text, self.image and self.image[0]) if i is not None)

    def image_part(self, stream: int, length: int) -> slice:
        """The tokens of a main stream that belong to the noisy image."""
        if self.image is None or stream != self.image[0]:
            return slice(0, 0)
        return slice(self.image[1], length)

    def reduction(self, site: Site, xs: Sequence[Tensor]) -> Reduction | None:
        """How controls merge tokens of the noisy image at a site; xs are the streams after the norm."""
        if self.image is None or not self.controls:
            return None
        stream, begin = self.image
        return reduction(site, xs[stream], slice(begin, xs[stream].shape[1]), self.controls)

    def reduced(self, merged: Reduction) -> MMDiTContext:
        """The context of merged tokens: positions of one token of each group, strengths of conditions as means."""
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
        """The streams, of which `change` is applied to that of the noisy image."""
        return [change(x) if self.image and i == self.image[0] else x for i, x in enumerate(xs)]


class JointAttention(nn.Module):
    """Attention of every stream to the streams that it may see; with_text: text has projections of its own."""

    def __init__(self, dim: int, heads: int, site: Site, *, with_text: bool):
        super().__init__()
        self.heads, self.site, self.with_text = heads, site, with_text
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(dim // heads, eps=1e-6) for _ in range(2))
        if with_text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(dim, dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (RMSNorm(dim // heads, eps=1e-6) for _ in range(2))
            self.to_out, self.to_add_out = nn.ModuleList([Linear(dim, dim)]), Linear(dim, dim)

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

    def forward(self, xs: Sequence[Tensor], context: MMDiTContext) -> tuple[list[Tensor], Tensor | None]:
        """Attention output of every stream, and the noisy image's queries before rotary positions."""
        merged = context.merged
        if merged is None:
            return self.attended(xs, context)
        out, plain = self.attended(context.on_image(xs, merged.merge), context)
        return context.on_image(out, merged.unmerge), None if plain is None else merged.unmerge(plain)

    def attended(self, xs: Sequence[Tensor], context: MMDiTContext) -> tuple[list[Tensor], Tensor | None]:
        """`forward` for tokens that are merged already."""
        q, k, v, plain = zip(
            *(
                self.qkv(x, lora, rope, text=i == context.text)
                for i, (x, lora, rope) in enumerate(zip(xs, context.loras, context.ropes, strict=True))
            ),
            strict=True,
        )
        for memory, keys, values in zip(context.memories, k, v, strict=True):
            if memory is not None:
                memory[self.site.path] = keys, values
        out: list[Tensor] = []
        for group in context.groups:
            lengths = [q[i].shape[2] for i in group.rows]
            call = Call(
                join([q[i] for i in group.rows]),
                join([k[j] for j in group.cols]),
                join([v[j] for j in group.cols]),
                self.site,
                bias=score_bias(group, k, context),
                image=image_rows(group, lengths, context),
                plain=join([plain[i] for i in group.rows]) if context.controls else None,
                keys=image_part_of(group.cols, [k[j].shape[2] for j in group.cols], context),
                merged=context.merged if set(group.rows) & set(context.main) else None,
            )
            out += join_heads(attend(call, context.controls)).split(lengths, 1)
        if self.with_text:
            out = [
                self.to_add_out(o, lora) if i == context.text else self.to_out[0](o, lora)
                for i, (o, lora) in enumerate(zip(out, context.loras, strict=True))
            ]
        return out, None if context.image is None else plain[context.image[0]]


def join(parts: Sequence[Tensor]) -> Tensor:
    """Tokens side by side, (B, H, N_i, D) -> (B, H, sum N_i, D)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)


def with_residuals(xs: list[Tensor], site: Site, plain: Tensor | None, context: MMDiTContext) -> list[Tensor]:
    """The streams after a block, plus the residuals of controls on the noisy image's rows."""
    if context.image is None or plain is None:
        return xs
    stream, begin = context.image
    for control in context.controls:
        addition = control.residual(site, plain[:, :, begin:])
        if addition is not None:
            x = xs[stream]
            joined = x + addition if begin == 0 else torch.cat([x[:, :begin], x[:, begin:] + addition], 1)
            xs = [*xs[:stream], joined, *xs[stream + 1 :]]
    return xs


def score_bias(group: Group, keys: Sequence[Tensor], context: MMDiTContext) -> Tensor | None:
    """Log weights that add to the group's scores, None if all weights are 1. One row over the keys (1, 1, 1, Nk) serves
    every query, unless a weight depends on the image token: (B or 1, 1, Nq or 1, Nk)."""
    if all(w is None for w in group.weights):
        return None
    blocks = []
    for j, weight in zip(group.cols, group.weights, strict=True):
        n = keys[j].shape[2]
        zeros = keys[j].new_zeros(1, 1, 1, n)
        if weight is None or weight.ndim == 0:
            blocks.append(zeros if weight is None else zeros + weight.to(zeros))
        elif j in context.main:  # queries of a condition: one weight for each key
            blocks.append(row_weights(weight, n, context.image_part(j, n))[:, None, None].to(zeros))
        else:
            rows = [row_weights(weight, keys[i].shape[2], context.image_part(i, keys[i].shape[2])) for i in group.rows]
            blocks.append(torch.cat(rows, 1)[:, None, :, None].to(zeros).expand(-1, -1, -1, n))
    shape = torch.broadcast_shapes(*(b.shape[:-1] for b in blocks))
    return torch.cat([b.expand(*shape, -1) for b in blocks], -1)


def image_rows(group: Group, lengths: Sequence[int], context: MMDiTContext) -> slice | None:
    """The noisy image's rows among the group's queries: an empty slice for text alone, None for a condition."""
    if context.image is None or not set(group.rows) & set(context.main):
        return None
    return image_part_of(group.rows, lengths, context) or slice(0, 0)


def image_part_of(streams: Sequence[int], lengths: Sequence[int], context: MMDiTContext) -> slice | None:
    """The noisy image's tokens in these streams side by side, None if it is not among them."""
    if context.image is None or context.image[0] not in streams:
        return None
    index = streams.index(context.image[0])
    begin = sum(lengths[:index])
    return slice(begin + context.image[1], begin + lengths[index])
