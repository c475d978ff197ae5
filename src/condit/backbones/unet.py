"""The UNet of Stable Diffusion 1.x, 2.x and SDXL (Rombach et al. 2022, arXiv:2112.10752; Podell et al. 2023,
arXiv:2307.01952). Parameter names are those of diffusers' `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.backbones.unet_config import CROSS_DOWN, CROSS_MID, CROSS_UP, DOWN, PRESETS, UP, Depth, UNetConfig
from condit.nn.attention import BlockControl, Call, Site, attend, join_heads, split_heads
from condit.nn.layers import Embedder, UpProjection, timestep_features
from condit.nn.lora import Conv, Linear, LowRank, Pointwise, name_linears
from condit.nn.offload import OffloadedBlocks, on_device

__all__ = ["CROSS_DOWN", "CROSS_UP", "DOWN", "PRESETS", "UP", "KeyValues", "UNet", "UNetConfig"]

KeyValues = Mapping[str, tuple[Tensor, Tensor]]  # path of a cross-attention -> keys and values, each (B, H, L, D)


@dataclass(frozen=True)
class UNetContext:
    """The inputs that all blocks of one forward share; `clock` (B, time_dim) is the time embedding."""

    clock: Tensor
    text: KeyValues
    lora: LowRank | None
    controls: tuple[BlockControl, ...]


class Resnet(nn.Module):
    """Two convolutions, the time embedding added between them; x (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c: UNetConfig, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(c.norm_num_groups, c_in, eps=c.norm_eps)
        self.conv1 = Conv(c_in, c_out, 3, padding=1)
        self.time_emb_proj = Linear(c.time_dim, c_out)
        self.norm2 = nn.GroupNorm(c.norm_num_groups, c_out, eps=c.norm_eps)
        self.conv2 = Conv(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, context: UNetContext) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), context.lora)
        h = h + self.time_emb_proj(F.silu(context.clock), context.lora)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)), context.lora)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x, context.lora))


class UNetAttention(nn.Module):
    """Attention of the image to itself ("self") or to the text ("cross")."""

    def __init__(self, dim: int, kv_dim: int, heads: int, site: Site):
        super().__init__()
        self.heads, self.site = heads, site
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k, self.to_v = Linear(kv_dim, dim, bias=False), Linear(kv_dim, dim, bias=False)
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def keys_values(self, tokens: Tensor, lora: LowRank | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, kv_dim) -> keys and values, each (B, H, L, D)."""
        return split_heads(self.to_k(tokens, lora), self.heads), split_heads(self.to_v(tokens, lora), self.heads)

    def forward(self, x: Tensor, context: UNetContext) -> Tensor:
        k, v = context.text[self.site.path] if self.site.kind == "cross" else self.keys_values(x, context.lora)
        q = split_heads(self.to_q(x, context.lora), self.heads)
        call = Call(q, k, v, self.site, image=slice(0, q.shape[2]), plain=q)
        return self.to_out[0](join_heads(attend(call, context.controls)), context.lora)


class GatedFeedForward(nn.Module):
    """Linear, exact GELU as a gate, Linear under diffusers' names `net.0.proj` and `net.2` (Shazeer 2020,
    arXiv:2002.05202)."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([UpProjection(dim, 8 * dim), nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, x: Tensor, lora: LowRank | None) -> Tensor:
        h, gate = self.net[0](x, lora).chunk(2, -1)
        return self.net[2](h * F.gelu(gate), lora)


class UNetBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; a LayerNorm before each."""

    def __init__(self, dim: int, heads: int, text_dim: int, path: str):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = UNetAttention(dim, dim, heads, Site(f"{path}.attn1", "self", -1))  # numbered by the UNet
        self.attn2 = UNetAttention(dim, text_dim, heads, Site(f"{path}.attn2", "cross", -1))
        self.ff = GatedFeedForward(dim)

    def forward(self, x: Tensor, context: UNetContext) -> Tensor:
        x = x + self.attn1(self.norm1(x), context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x), context.lora)


class Transformer(nn.Module):
    """Blocks on the cells of a feature map as tokens, row-major; x (B, dim, H, W) -> the same shape."""

    def __init__(self, c: UNetConfig, dim: int, depth: int, heads: int, path: str):
        super().__init__()
        self.norm = nn.GroupNorm(c.norm_num_groups, dim, eps=1e-6)
        self.linear = c.use_linear_projection
        make = Linear if self.linear else Pointwise
        self.proj_in, self.proj_out = make(dim, dim), make(dim, dim)
        self.transformer_blocks = nn.ModuleList(
            UNetBlock(dim, heads, c.cross_attention_dim, f"{path}.transformer_blocks.{i}") for i in range(depth)
        )

    def forward(self, x: Tensor, context: UNetContext) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2), context.lora)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h, context.lora).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Half the resolution, by a strided convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = Conv(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, lora: LowRank | None) -> Tensor:
        return self.conv(x, lora)


class Upsample(nn.Module):
    """Nearest cells to a resolution (height, width), then a convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = Conv(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int], lora: LowRank | None) -> Tensor:
        return self.conv(F.interpolate(x, size=list(size), mode="nearest"), lora)


class Level(nn.Module):
    """The resnets of one resolution, each followed by a transformer if the level has attention, and the change of
    resolution: "down", "up" or "" for none."""

    def __init__(
        self, c: UNetConfig, widths: Sequence[int], dim: int, attentions: Sequence[Transformer], resample: str
    ):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c, width, dim) for width in widths)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers = nn.ModuleList([Downsample(dim)]) if resample == "down" else None
        self.upsamplers = nn.ModuleList([Upsample(dim)]) if resample == "up" else None

    def step(self, i: int, x: Tensor, context: UNetContext) -> Tensor:
        """The i-th resnet and transformer."""
        x = self.resnets[i](x, context)
        return x if self.attentions is None else self.attentions[i](x, context)

    def down(self, x: Tensor, context: UNetContext, features: Tensor | None = None) -> list[Tensor]:
        """The skips of this level; the last one is the input of the next level. features: those of a T2I-Adapter, which
        add to the last attention or, without attention, to what leaves the level."""
        skips = []
        for i in range(len(self.resnets)):
            skips.append(x := self.step(i, x, context))
        if features is not None and self.attentions is not None:
            x = skips[-1] = x + features
        if self.downsamplers is not None:
            skips.append(self.downsamplers[0](x, context.lora))
        if features is not None and self.attentions is None:
            skips[-1] = skips[-1] + features
        return skips

    def middle(self, x: Tensor, context: UNetContext) -> Tensor:
        x = self.step(0, x, context)
        return self.resnets[1](x, context) if len(self.resnets) > 1 else x

    def up(self, x: Tensor, skips: list[Tensor], context: UNetContext) -> Tensor:
        """The way up, which removes the level's skips from the end of `skips`."""
        for i in range(len(self.resnets)):
            x = self.step(i, torch.cat([x, skips.pop()], 1), context)
        if self.upsamplers is None:
            return x
        # The size of the next skip is twice this one, or one less where the way down rounded up.
        return self.upsamplers[0](x, skips[-1].shape[2:], context.lora)


class UNet(nn.Module):
    """Stable Diffusion's network: predicts the noise, or v, of latents at a timestep from a text."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = self.config = config
        dims, levels = c.block_out_channels, len(c.block_out_channels)
        self.conv_in = Conv(c.in_channels, dims[0], 3, padding=1)
        self.time_embedding = Embedder(dims[0], c.time_dim)
        added = c.projection_class_embeddings_input_dim
        if c.time_cond_proj_dim is not None:
            self.time_embedding.cond_proj = Linear(c.time_cond_proj_dim, dims[0], bias=False)
        self.add_embedding = Embedder(added, c.time_dim) if c.addition_embed_type and added else None

        def transformers(path: str, level: int, depth: Depth, n: int) -> list[Transformer]:
            depths = (depth,) * n if isinstance(depth, int) else depth
            return [Transformer(c, dims[level], depths[i], c.heads[level], f"{path}.attentions.{i}") for i in range(n)]

        self.down_blocks, self.up_blocks, skips = nn.ModuleList(), nn.ModuleList(), [dims[0]]
        for i, dim in enumerate(dims):
            widths = [skips[-1], *[dim] * (c.layers_per_block - 1)]
            n = c.layers_per_block if c.down_block_types[i] == CROSS_DOWN else 0
            last = i == levels - 1
            attentions = transformers(f"down_blocks.{i}", i, c.depths[i], n)
            self.down_blocks.append(Level(c, widths, dim, attentions, "" if last else "down"))
            skips += [dim] * (c.layers_per_block + (not last))
        before = dims[-1]
        for i, dim in enumerate(reversed(dims)):
            n = c.layers_per_block + 1
            widths = [width + skips.pop() for width in (before, *[dim] * c.layers_per_block)]
            n, last, before = n if c.up_block_types[i] == CROSS_UP else 0, i == levels - 1, dim
            attentions = transformers(f"up_blocks.{i}", levels - 1 - i, c.depths_up[i], n)
            self.up_blocks.append(Level(c, widths, dim, attentions, "" if last else "up"))
        # Constructed last, as in diffusers: published adapters number the middle's attention after that of the way up.
        self.mid_block = None
        if c.mid_block_type is not None:
            n = int(c.mid_block_type == CROSS_MID)
            attentions = transformers("mid_block", levels - 1, c.depths[-1], n)
            self.mid_block = Level(c, [dims[-1]] * (n + 1), dims[-1], attentions, "")
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, dims[0], eps=c.norm_eps)
        self.conv_out = Conv(dims[0], c.out_channels, 3, padding=1)
        for i, block in enumerate(m for m in self.modules() if isinstance(m, UNetBlock)):
            block.attn1.site, block.attn2.site = replace(block.attn1.site, index=i), replace(block.attn2.site, index=i)
        self._attentions = [
            m for m in self.modules() if isinstance(m, UNetAttention)
        ]  # in a list: no second registration
        name_linears(self)

    @property
    def sites(self) -> list[Site]:
        """Every attention layer in the order of diffusers' `attn_processors`: down, up, middle. The index is the number
        N of `ip_adapter.N.to_k_ip.weight` in published adapters; odd ones attend to the text."""
        return [attention.site for attention in self._attentions]

    def text_keys_values(self, text: Tensor, lora: LowRank | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Text (B, L, cross_attention_dim) -> keys and values of every cross-attention, the same in all steps."""
        layers = [a for a in self._attentions if a.site.kind == "cross"]
        if isinstance(self.down_blocks, OffloadedBlocks):
            layers = [on_device(a, text.device) for a in layers]
        return {a.site.path: a.keys_values(text, lora) for a in layers}

    def clock(
        self,
        t: Tensor,
        pooled: Tensor | None,
        sizes: Tensor | None,
        lora: LowRank | None,
        dtype: torch.dtype,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """MLP(t), and for SDXL + MLP(pooled text and sinusoidal features of the sizes): (B, time_dim). Raises
        ValueError if SDXL's are missing."""
        features = timestep_features(t, self.config.block_out_channels[0]).to(dtype)
        if guidance is not None:
            features = features + cast("Linear", self.time_embedding.cond_proj)(guidance.to(dtype), lora)
        clock = self.time_embedding(features, lora)
        if self.add_embedding is None:
            return clock
        if pooled is None or sizes is None:
            raise ValueError("This UNet (SDXL) needs pooled= and sizes=.")
        features = timestep_features(sizes.flatten(), self.config.addition_time_embed_dim or 256)
        added = torch.cat([pooled, features.unflatten(0, sizes.shape).flatten(1).to(dtype)], -1)
        return clock + self.add_embedding(added, lora)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor | KeyValues,
        *,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        lora: LowRank | None = None,
        controls: Sequence[BlockControl] = (),
        residuals: Sequence[Tensor] = (),
        features: Sequence[Tensor] = (),
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, in_channels, H, W), t (B,) in [0, 1000) -> (B, out_channels, H, W).

        text: states (B, L, cross_attention_dim), or their `text_keys_values`. SDXL: pooled text (B, P) and sizes (B, 6)
        in pixels: height and width of the original, top and left of the crop, height and width of the target.
        residuals: those of a ControlNet (arXiv:2302.05543); the last adds to the middle, the others to the skips.
        features: those of a T2I-Adapter (arXiv:2302.08453), one a level and one of the middle's size, or fewer.
        guidance (B, time_cond_proj_dim): the embedded guidance scale of an LCM (arXiv:2310.04378).
        """
        keys_values = self.text_keys_values(text, lora) if isinstance(text, Tensor) else text
        context = UNetContext(self.clock(t, pooled, sizes, lora, x.dtype, guidance), keys_values, lora, tuple(controls))
        skips, added = [self.conv_in(x, lora)], list(features)
        for level in cast("Iterable[Level]", self.down_blocks):
            skips += level.down(skips[-1], context, added.pop(0) if added else None)
        x = skips[-1] if self.mid_block is None else self.mid_block.middle(skips[-1], context)
        if added and added[0].shape == x.shape:
            x = x + added[0]
        if residuals:
            x = x + residuals[-1]
            skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
        for level in cast("Iterable[Level]", self.up_blocks):
            x = level.up(x, skips, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)), lora)
