"""PixArt: text-to-image diffusion transformers (PixArt-alpha, Chen et al. 2023, arXiv:2310.00426; PixArt-Sigma, Chen et
al. 2024, arXiv:2403.04692).

A DiT conditioned on text: every block attends to the text after its self-attention, and all blocks share one modulation
by the time. Parameter names are those of diffusers' `PixArtTransformer2DModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.backbones.latent_transformer import token_grid, unpatchify
from condit.nn.attention import BlockControl, Call, Reduction, Site, attend, join_heads, reduction, split_heads
from condit.nn.layers import Embedder, FeedForward, PatchEmbedder, modulated_norm, timestep_features
from condit.nn.lora import Linear, LowRank, name_linears

MASKED = -10_000.0  # added to the score of a padded text token, as in diffusers


@dataclass(frozen=True)
class PixArtConfig:
    """Fields and defaults of diffusers' `PixArtTransformer2DModel`; None: derived from sample_size, as there."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8  # noise, and the learned variance's interpolation value, which ODE samplers ignore
    num_layers: int = 28
    sample_size: int = 128  # side of the latents in training
    patch_size: int = 2
    caption_channels: int = 4096
    interpolation_scale: float | None = None  # None: max(sample_size // 64, 1)
    use_additional_conditions: bool | None = None  # None: True if sample_size is 128

    def __post_init__(self):
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} must be a multiple of patch_size {self.patch_size}.")
        if self.dim % 4 or (self.sized and self.dim % 3):
            raise ValueError(
                f"heads x head_dim must be a multiple of 4, and of 3 with size embedders; found {self.dim}."
            )

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def scale(self) -> float:
        """The divisor of positions."""
        return max(self.sample_size // 64, 1) if self.interpolation_scale is None else self.interpolation_scale

    @property
    def sized(self) -> bool:
        """Whether the size in pixels and the aspect ratio are inputs."""
        return self.sample_size == 128 if self.use_additional_conditions is None else self.use_additional_conditions


# transformer/config.json of each repository; widths and depth: PixArt-alpha, section 3.1 (0.6 B).
PRESETS: dict[str, PixArtConfig] = {
    "pixart-alpha-256": PixArtConfig(sample_size=32),  # PixArt-alpha/PixArt-XL-2-256x256
    "pixart-alpha-512": PixArtConfig(sample_size=64),  # PixArt-alpha/PixArt-XL-2-512x512
    "pixart-alpha-1024": PixArtConfig(sample_size=128),  # PixArt-alpha/PixArt-XL-2-1024-MS
    # PixArt-alpha/PixArt-Sigma-XL-2-512-MS and -1024-MS: no size embedders, 300 text tokens.
    "pixart-sigma-512": PixArtConfig(sample_size=64, use_additional_conditions=False),
    "pixart-sigma-1024": PixArtConfig(sample_size=128, use_additional_conditions=False),
    # The embedded model: 64 tokens of 16 px at 128 px in the embedded latent (32 channels, patch 2), 4.9M parameters.
    "pixart-tiny": PixArtConfig(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=32,
        out_channels=32,
        num_layers=4,
        sample_size=16,
        caption_channels=192,
    ),
}


def scaled_positions(grid: tuple[int, int], dim: int, *, base: int, scale: float, device: torch.device) -> Tensor:
    """Sine-cosine table (rows * columns, dim) in float32, row-major; the first half of the channels encodes the column.

    Positions on an axis of n cells are i * base / n / scale: a larger image has finer steps over the same range.
    """
    omega = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))

    def axis(count: int) -> Tensor:
        # Positions in float32 and angles in float64, as in diffusers.
        position = torch.arange(count, dtype=torch.float32, device=device) / (count / base) / scale
        angle = position.double()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], -1).float()

    rows, columns = grid
    return torch.cat([axis(columns).repeat(rows, 1), axis(rows).repeat_interleave(columns, 0)], -1)


@dataclass(frozen=True)
class PixArtContext:
    """The inputs that all blocks of one forward share: the modulation (B, 6, dim), the text and its bias."""

    modulation: Tensor
    text: Tensor
    bias: Tensor | None
    lora: LowRank | None
    controls: tuple[BlockControl, ...]


class PixArtAttention(nn.Module):
    """Attention of the image to itself ("self") or to the text ("cross")."""

    def __init__(self, c: PixArtConfig, site: Site):
        super().__init__()
        self.heads, self.site = c.num_attention_heads, site
        self.to_q, self.to_k, self.to_v = (Linear(c.dim, c.dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(c.dim, c.dim)])

    def forward(self, x: Tensor, context: PixArtContext, merged: Reduction | None = None) -> tuple[Tensor, Tensor]:
        """The output (B, N, dim), and the queries (B, H, N, d), both of tokens (B, N, dim)."""
        cross, lora = self.site.kind == "cross", context.lora
        source = context.text if cross else x
        q, k, v = (
            split_heads(linear(y, lora), self.heads)
            for linear, y in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        call = Call(
            q,
            k,
            v,
            self.site,
            bias=context.bias if cross else None,
            image=slice(0, x.shape[1]),
            plain=q if context.controls else None,
            keys=slice(k.shape[2], k.shape[2]) if cross else slice(0, x.shape[1]),
            merged=merged,
        )
        return self.to_out[0](join_heads(attend(call, context.controls)), lora), q


class PixArtBlock(nn.Module):
    """x + g Attn(norm(x)), then + Cross(x, text), then + g MLP(norm(x)) (PixArt-alpha, Fig. 4)."""

    def __init__(self, c: PixArtConfig, i: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(6, c.dim), std=c.dim**-0.5))
        self.attn1 = PixArtAttention(c, Site(f"transformer_blocks.{i}.attn1", "self", i))
        self.attn2 = PixArtAttention(c, Site(f"transformer_blocks.{i}.attn2", "cross", i))
        self.ff = FeedForward(c.dim)

    def forward(self, x: Tensor, context: PixArtContext) -> Tensor:
        table = (self.scale_shift_table + context.modulation).unsqueeze(2)  # adaLN-single (section 2.3): (B, 6, 1, dim)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)
        h = modulated_norm(x, shift, scale)
        merged = reduction(self.attn1.site, h, slice(0, x.shape[1]), context.controls)
        if merged is None:
            attended, query = self.attn1(h, context)
        else:
            attended, query = (merged.unmerge(y) for y in self.attn1(merged.merge(h), context, merged))
        x = x + gate * attended
        # The attention to the text has neither a norm before it nor a gate after it.
        x = x + self.attn2(x, context)[0]
        x = x + gate_mlp * self.mlp(modulated_norm(x, shift_mlp, scale_mlp), context, merged)
        for control in context.controls:
            addition = control.residual(self.attn1.site, query)
            if addition is not None:
                x = x + addition
        return x

    def mlp(self, h: Tensor, context: PixArtContext, merged: Reduction | None) -> Tensor:
        if merged is None or not merged.mlp:
            return self.ff(h, context.lora)
        return merged.unmerge(self.ff(merged.merge(h), context.lora))


class SizeEmbedding(nn.Module):
    """MLP(t), plus the embeddings of height, width and aspect ratio if the network has size embedders."""

    def __init__(self, c: PixArtConfig):
        super().__init__()
        self.features: Callable[[Tensor, int], Tensor] = timestep_features
        self.timestep_embedder = Embedder(256, c.dim)
        if c.sized:
            self.resolution_embedder = Embedder(256, c.dim // 3)
            self.aspect_ratio_embedder = Embedder(256, c.dim // 3)

    def forward(self, t: Tensor, size: Tensor | None, dtype: torch.dtype, lora: LowRank | None) -> Tensor:
        """t (B,), size (B, 2) or None -> (B, dim)."""
        embedding = self.timestep_embedder(self.features(t, 256).to(dtype), lora)
        if size is None:
            return embedding
        size = size.float()
        sides = self.resolution_embedder(timestep_features(size.flatten()).to(dtype), lora).unflatten(0, (-1, 2))
        aspect = (size[:, 0] / size[:, 1]).to(dtype)
        ratio = self.aspect_ratio_embedder(timestep_features(aspect).to(dtype), lora)
        return embedding + torch.cat([sides.flatten(1), ratio], 1)


class AdaLNSingle(nn.Module):
    """One modulation for all blocks."""

    def __init__(self, c: PixArtConfig):
        super().__init__()
        self.emb, self.linear = SizeEmbedding(c), Linear(c.dim, 6 * c.dim)


class CaptionProjection(nn.Module):
    """Text states to the width of the blocks."""

    def __init__(self, n_in: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = Linear(n_in, dim), Linear(dim, dim)

    def forward(self, text: Tensor, lora: LowRank | None) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text, lora), approximate="tanh"), lora)


class PixArt(nn.Module):
    """Predicts noise, and the variance, of a latent at a timestep from a text."""

    merges = True  # its blocks call `reduction`

    def __init__(self, config: PixArtConfig):
        super().__init__()
        c = self.config = config
        self.pos_embed = PatchEmbedder(c.in_channels, c.dim, c.patch_size)
        self.transformer_blocks = nn.ModuleList(PixArtBlock(c, i) for i in range(c.num_layers))
        self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(2, c.dim), std=c.dim**-0.5))
        self.proj_out = Linear(c.dim, c.patch_size**2 * c.out_channels)
        self.adaln_single = AdaLNSingle(c)
        self.caption_projection = CaptionProjection(c.caption_channels, c.dim)
        name_linears(self)

    @property
    def sites(self) -> list[Site]:
        """Every attention layer in the order of execution."""
        return [module.site for module in self.modules() if isinstance(module, PixArtAttention)]

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the tokens of a latent. Raises ValueError for another shape."""
        return token_grid(x, self.config.in_channels, self.config.patch_size)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        *,
        size: Tensor | None = None,
        lora: LowRank | None = None,
        controls: Sequence[BlockControl] = (),
    ) -> Tensor:
        """(B, out_channels, H, W) for a latent x (B, C, H, W) of any size, t (B,) in 0 ... 999, text (B, L, E).

        text_mask (B, L): 1 for a token, 0 for padding. size (B, 2): height and width in pixels, only for networks with
        size embedders (PixArt-alpha at 1024 px).
        """
        c, grid = self.config, self.grid_of(x)
        if (size is None) == c.sized:
            raise ValueError(
                f"This PixArt {'needs' if c.sized else 'takes no'} size (B, 2) in pixels; "
                f"{'none' if size is None else 'one'} was given."
            )
        tokens = self.pos_embed(x)
        table = scaled_positions(grid, c.dim, base=c.sample_size // c.patch_size, scale=c.scale, device=x.device)
        tokens = (tokens + table).to(tokens.dtype)
        clock = self.adaln_single.emb(t, size, x.dtype, lora)
        context = PixArtContext(
            modulation=self.adaln_single.linear(F.silu(clock), lora).unflatten(-1, (6, -1)),
            text=self.caption_projection(text, lora),
            bias=None if text_mask is None else ((1 - text_mask.to(x.dtype)) * MASKED)[:, None, None],
            lora=lora,
            controls=tuple(controls),
        )
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        shift, scale = (self.scale_shift_table + clock[:, None]).unsqueeze(2).unbind(1)
        return unpatchify(self.proj_out(modulated_norm(tokens, shift, scale), lora), grid, c.patch_size)
