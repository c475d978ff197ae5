"""MM-DiT: the multi-modal diffusion transformer of FLUX.1 (Black Forest Labs 2024; block design: Esser et al. 2024,
arXiv:2403.03206), over streams. Parameter names are those of diffusers' `FluxTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from condit.backbones.joint_attention import JointAttention, MMDiTContext, with_residuals
from condit.nn.attention import BlockControl, Site
from condit.nn.layers import (
    AdaNorm,
    Embedder,
    FeedForward,
    Rope,
    modulated_norm,
    rope_frequencies,
    tanh_gelu,
    timestep_features,
)
from condit.nn.lora import Linear, name_linears
from condit.nn.streams import Group, Stream, groups


@dataclass(frozen=True)
class MMDiTConfig:
    """Fields and defaults of diffusers' `FluxTransformer2DModel`; the defaults are those of FLUX.1-schnell."""

    in_channels: int = 64
    out_channels: int | None = None  # None: in_channels. FLUX.1 Fill and Canny read more channels than they predict.
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
    # The embedded model: 64 tokens of 16 px at 128 px; 16 more channels for the text's canvas (docs/tiny.md).
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


class TimeTextEmbed(nn.Module):
    """The embedding of a stream: MLP(t) + MLP(guidance) + MLP(pooled text)."""

    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.features: Callable[[Tensor, int], Tensor] = timestep_features
        self.timestep_embedder = Embedder(256, c.dim)
        if c.guidance_embeds:
            self.guidance_embedder = Embedder(256, c.dim)
        self.text_embedder = Embedder(c.pooled_projection_dim, c.dim)

    def forward(self, stream: Stream) -> Tensor:
        """(B, dim)."""
        dtype, lora = stream.tokens.dtype, stream.lora
        embedding = self.timestep_embedder(self.features(stream.timestep.to(dtype) * 1000, 256).to(dtype), lora)
        if stream.guidance is not None:
            features = self.features(stream.guidance.to(dtype) * 1000, 256).to(dtype)
            embedding = embedding + self.guidance_embedder(features, lora)
        return embedding + self.text_embedder(stream.pooled, lora)


class DoubleBlock(nn.Module):
    """One joint attention of text and image, each with its own weights. Conditions use the image's weights."""

    def __init__(self, c: MMDiTConfig, site: Site):
        super().__init__()
        self.norm1, self.norm1_context = AdaNorm(c.dim, 6), AdaNorm(c.dim, 6)
        self.attn = JointAttention(c.dim, c.num_attention_heads, site, with_text=True)
        self.ff, self.ff_context = FeedForward(c.dim), FeedForward(c.dim)

    def forward(self, xs: Sequence[Tensor], context: MMDiTContext) -> list[Tensor]:
        normed = [
            (self.norm1_context if i == context.text else self.norm1)(x, embedding, lora)
            for i, (x, embedding, lora) in enumerate(zip(xs, context.embeddings, context.loras, strict=True))
        ]
        hs = [n[0] for n in normed]
        merged = context.reduction(self.attn.site, hs)
        attended, plain = self.attn(hs, context if merged is None else context.reduced(merged))
        out = []
        for i, (x, a, (_, gate, shift, scale, gate_mlp)) in enumerate(zip(xs, attended, normed, strict=True)):
            x = x + gate * a
            h, ff = modulated_norm(x, shift, scale), self.ff_context if i == context.text else self.ff
            if merged is not None and merged.mlp and context.image and i == context.image[0]:
                out.append(x + gate_mlp * merged.unmerge(ff(merged.merge(h), context.loras[i])))
            else:
                out.append(x + gate_mlp * ff(h, context.loras[i]))
        return with_residuals(out, self.attn.site, plain, context)


class SingleBlock(nn.Module):
    """Attention and MLP in parallel; text and image share the weights."""

    def __init__(self, c: MMDiTConfig, site: Site):
        super().__init__()
        self.norm = AdaNorm(c.dim, 3)
        self.attn = JointAttention(c.dim, c.num_attention_heads, site, with_text=False)
        self.proj_mlp, self.proj_out = Linear(c.dim, 4 * c.dim), Linear(5 * c.dim, c.dim)

    def forward(self, xs: Sequence[Tensor], context: MMDiTContext) -> list[Tensor]:
        normed = [self.norm(x, e, lora) for x, e, lora in zip(xs, context.embeddings, context.loras, strict=True)]
        hs = [n[0] for n in normed]
        merged = context.reduction(self.attn.site, hs)
        if merged is None:
            outs, plain = self.attention_and_mlp(hs, context)
        elif not merged.mlp:
            outs, plain = self.attention_and_mlp(hs, context.reduced(merged))
        else:
            # Attention and MLP run on the same merged tokens; the attention must not merge them again.
            hs = context.on_image(hs, merged.merge)
            outs, plain = self.attention_and_mlp(hs, context.reduced(merged), merged_already=True)
            outs, plain = context.on_image(outs, merged.unmerge), None if plain is None else merged.unmerge(plain)
        out = [x + gate * y for x, y, (_, gate) in zip(xs, outs, normed, strict=True)]
        return with_residuals(out, self.attn.site, plain, context)

    def attention_and_mlp(
        self, hs: Sequence[Tensor], context: MMDiTContext, *, merged_already: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """One projection of attention and MLP for every stream, and the noisy image's queries."""
        attended, plain = (self.attn.attended if merged_already else self.attn)(hs, context)
        outs = []
        for h, a, lora in zip(hs, attended, context.loras, strict=True):
            mlp = tanh_gelu(self.proj_mlp(h, lora))
            outs.append(self.proj_out(torch.cat([a, mlp], -1), lora))
        return outs, plain


class MMDiT(nn.Module):
    """FLUX's transformer. `forward` predicts the velocity of the noisy image; `prefill` runs a condition alone."""

    merges = True  # its blocks call `reduction`

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
        """Tokens, time embedding and positions of a stream of image tokens."""
        rope = rope_frequencies(stream.ids, self.config.axes_dims_rope)
        return self.x_embedder(stream.tokens, stream.lora), self.time_text_embed(stream), rope

    def forward(
        self,
        image: Stream,
        text: Tensor,
        text_ids: Tensor,
        *,
        conditions: Sequence[Stream] = (),
        controls: Sequence[BlockControl] = (),
    ) -> Tensor:
        """The prediction for the noisy image, (B, N, out_channels). text (B, L, joint_attention_dim), text_ids (L, 3).

        Text shares the image's time embedding. `conditions` join the sequence; `controls` act in every block.
        """
        x, clock, rope = self.embed(image)
        rope_text = rope_frequencies(text_ids, self.config.axes_dims_rope)
        embedded = [self.embed(s) for s in conditions]
        streams = (None, None, *conditions)
        double = MMDiTContext(
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
        # In the single blocks text and image share weights and time embedding, so they run as one stream, text first,
        # unless a strength acts on the image's rows only.
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

    def prefill(self, condition: Stream, controls: Sequence[BlockControl]) -> None:
        """Run one independent condition alone; `controls` receive its attention calls. Its keys and values depend on
        neither noise nor time, so one pass serves every step (OminiControl2, arXiv:2503.08280)."""
        x, clock, rope = self.embed(condition)
        context = MMDiTContext(
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
            xs = block(xs, context)


def merge_main(context: MMDiTContext, text_length: int, streams: Sequence[Stream | None]) -> MMDiTContext:
    """The context of the single blocks: text and image as stream 0, conditions after it."""
    (cos_text, sin_text), (cos, sin) = context.ropes[:2]
    if cos.ndim == 4:  # image positions of each sample
        cos_text, sin_text = (r.expand(cos.shape[0], 1, -1, -1) for r in (cos_text, sin_text))
    rope = torch.cat([cos_text, cos], -2), torch.cat([sin_text, sin], -2)
    return replace(
        context,
        loras=context.loras[1:],
        embeddings=context.embeddings[1:],
        memories=context.memories[1:],
        ropes=(rope, *context.ropes[2:]),
        groups=tuple(groups(None, 0, streams[1:], apart=bool(context.controls))),
        text=None,
        image=(0, text_length),
    )
