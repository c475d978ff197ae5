"""DiT: scalable diffusion models with transformers (Peebles & Xie 2022, arXiv:2212.09748).

A plain transformer over latent patches whose norms and gates depend on time and class. Parameter names and function are
those of the official repository (facebookresearch/DiT). diffusers' `DiTTransformer2DModel` computes something else from
the same weights (see `condit.weights.dit`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.backbones.latent_transformer import MLP, LatentConfig, LatentTransformer, sincos_positions, unpatchify
from condit.nn.attention import BlockControl, Call, Reduction, Site, attend, join_heads, reduction, split_heads
from condit.nn.layers import modulated_norm, recomputed
from condit.nn.lora import Linear, LoRA, name_linears


@dataclass(frozen=True)
class DiTConfig(LatentConfig):
    """gates and zero_init both True: adaLN-Zero; both False: the plain adaLN of Table 4."""

    gates: bool = True  # a factor from the embedding before every residual addition
    zero_init: bool = True  # the blocks' modulation starts at zero: with gates, every block as the identity


def _small(**fields) -> DiTConfig:
    return DiTConfig(depth=12, hidden_size=384, num_heads=6, **fields)


def _base(**fields) -> DiTConfig:
    return DiTConfig(depth=12, hidden_size=768, num_heads=12, **fields)


def _large(**fields) -> DiTConfig:
    return DiTConfig(depth=24, hidden_size=1024, num_heads=16, **fields)


# Tables 1 and 4: parameters, multiply-accumulates of one forward at a 32 x 32 latent, FID-50K after 400K steps without
# guidance. Published weights exist for XL/2 at 256 and 512 px.
PRESETS: dict[str, DiTConfig] = {
    "DiT-S/2": _small(patch_size=2),  # 33 M, 6.06 G, 68.40
    "DiT-S/4": _small(patch_size=4),  # 33 M, 1.41 G, 100.41
    "DiT-S/8": _small(patch_size=8),  # 33 M, 0.36 G, 153.60
    "DiT-B/2": _base(patch_size=2),  # 130 M, 23.01 G, 43.47
    "DiT-B/4": _base(patch_size=4),  # 130 M, 5.56 G, 68.38
    "DiT-B/8": _base(patch_size=8),  # 131 M, 1.42 G, 122.74
    "DiT-L/2": _large(patch_size=2),  # 458 M, 80.71 G, 23.33
    "DiT-L/4": _large(patch_size=4),  # 458 M, 19.70 G, 45.64
    "DiT-L/8": _large(patch_size=8),  # 459 M, 5.01 G, 118.87
    "DiT-XL/2": DiTConfig(patch_size=2),  # 675 M, 118.64 G, 19.47; after 7M steps 9.62, guided (1.50) 2.27
    "DiT-XL/4": DiTConfig(patch_size=4),  # 675 M, 29.05 G, 43.01
    "DiT-XL/8": DiTConfig(patch_size=8),  # 676 M, 7.39 G, 106.41
    "DiT-XL/2-512": DiTConfig(input_size=64),  # 675 M, 524.60 G; after 3M steps 12.03, guided (1.50) 3.04; Table 3
    "DiT-XL/2-adaLN": DiTConfig(gates=False, zero_init=False),  # 600 M, 118.56 G, 25.21; Table 4, never published
}


@dataclass(frozen=True)
class DiTContext:
    """The inputs that all blocks of one forward share; `embedding` (B, D) is time plus class."""

    embedding: Tensor
    lora: LoRA | None = None
    controls: tuple[BlockControl, ...] = ()


class Modulation(nn.ModuleList):
    """SiLU, then a linear under the official name `1`: the chunks of shifts, scales and gates, each (B, 1, D)."""

    def __init__(self, dim: int, chunks: int):
        super().__init__([nn.SiLU(), Linear(dim, chunks * dim)])
        self.chunks = chunks

    @property
    def linear(self) -> Linear:
        return cast("Linear", self[1])

    def forward(self, context: DiTContext) -> tuple[Tensor, ...]:
        return self.linear(F.silu(context.embedding), context.lora)[:, None].chunk(self.chunks, -1)


class DiTAttention(nn.Module):
    """Multi-head self-attention with one matrix for q, k and v."""

    def __init__(self, dim: int, heads: int, site: Site):
        super().__init__()
        self.heads, self.site = heads, site
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)

    def forward(self, x: Tensor, context: DiTContext, merged: Reduction | None = None) -> tuple[Tensor, Tensor]:
        """The output (B, T, D), and the queries (B, H, T, d)."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x, context.lora).chunk(3, -1))
        rows = slice(0, x.shape[1])
        plain = q if context.controls else None
        call = Call(q, k, v, self.site, image=rows, plain=plain, keys=rows, merged=merged)
        return self.proj(join_heads(attend(call, context.controls)), context.lora), q


class DiTBlock(nn.Module):
    """x + g Attn(norm(x)), then x + g MLP(norm(x)), with shift, scale and gate g from the embedding (Fig. 3)."""

    def __init__(self, c: DiTConfig, site: Site):
        super().__init__()
        self.attn = DiTAttention(c.hidden_size, c.num_heads, site)
        self.mlp = MLP(c.hidden_size, int(c.hidden_size * c.mlp_ratio))
        self.adaLN_modulation = Modulation(c.hidden_size, 6 if c.gates else 4)
        self.gates = c.gates

    def forward(self, x: Tensor, context: DiTContext) -> Tensor:
        if self.gates:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(context)
        else:
            (shift, scale, shift_mlp, scale_mlp), gate, gate_mlp = self.adaLN_modulation(context), 1, 1
        h = modulated_norm(x, shift, scale)
        merged = reduction(self.attn.site, h, slice(0, x.shape[1]), context.controls)
        if merged is None:
            attended, query = self.attn(h, context)
        else:
            attended, query = (merged.unmerge(y) for y in self.attn(merged.merge(h), context, merged))
        x = x + gate * attended
        h = modulated_norm(x, shift_mlp, scale_mlp)
        if merged is not None and merged.mlp:
            x = x + gate_mlp * merged.unmerge(self.mlp(merged.merge(h), context.lora))
        else:
            x = x + gate_mlp * self.mlp(h, context.lora)
        for control in context.controls:
            addition = control.residual(self.attn.site, query)
            if addition is not None:
                x = x + addition
        return x


class DiTFinalLayer(nn.Module):
    """Adaptive norm, then a linear to the pixels of each patch."""

    def __init__(self, dim: int, n_out: int):
        super().__init__()
        self.linear, self.adaLN_modulation = Linear(dim, n_out), Modulation(dim, 2)

    def forward(self, x: Tensor, context: DiTContext) -> Tensor:
        shift, scale = self.adaLN_modulation(context)
        return self.linear(modulated_norm(x, shift, scale), context.lora)


class DiT(LatentTransformer):
    """Predicts noise, and the variance with learn_sigma, of a latent at a timestep, of a class or unconditionally."""

    config: DiTConfig
    merges = True  # its blocks call `reduction`

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        c = config
        self.blocks.extend(DiTBlock(c, Site(f"blocks.{i}.attn", "self", i)) for i in range(c.depth))
        self.final_layer = DiTFinalLayer(c.hidden_size, c.patch_size**2 * c.out_channels)
        name_linears(self)
        self.initialise()

    @property
    def sites(self) -> list[Site]:
        """Every attention layer in the order of execution."""
        return [block.attn.site for block in cast("Iterable[DiTBlock]", self.blocks)]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """The official initial weights: with zero_init and gates every new block is the identity, and the output is
        0."""
        for module in self.modules():
            if isinstance(module, Linear):  # q, k and v are one matrix, so the bound is smaller than that of each
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        self.initialise_embedders(generator)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation.linear.weight)
        if self.config.zero_init:
            for block in cast("Iterable[DiTBlock]", self.blocks):
                nn.init.zeros_(block.adaLN_modulation.linear.weight)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table (1, T, D) for a token grid: the stored one if it has this size, else computed."""
        # Never trained, even after requires_grad_() of the whole model.
        table = self.pos_embed.detach()
        if grid == self.config.grid:
            return table
        return sincos_positions(grid, self.config.hidden_size, device=table.device)[None].to(table.dtype)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        lora: LoRA | None = None,
        controls: Sequence[BlockControl] = (),
        checkpointing: bool = False,
    ) -> Tensor:
        """Noise (B, C, H, W) or, with learn_sigma, noise and the variance's interpolation value (B, 2 C, H, W).

        x (B, C, H, W), H and W multiples of the patch; t (B,) in 0 ... 999, may be fractional; y (B,) class numbers.
        checkpointing: in training, keep the inputs of the blocks only and compute each block twice.
        """
        grid = self.grid_of(x)
        context = DiTContext(self.embed(t, y, lora), lora, tuple(controls))
        tokens = self.x_embedder(x) + self.positions(grid)
        for block in self.blocks:
            if checkpointing and torch.is_grad_enabled():
                tokens = recomputed(block, tokens, context)
            else:
                tokens = block(tokens, context)
        return unpatchify(self.final_layer(tokens, context), grid, self.config.patch_size)
