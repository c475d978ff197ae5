"""DiffiT: diffusion vision transformers (Hatamizadeh et al. 2023, arXiv:2312.02139), the latent model.

Time enters through attention (TMSA, Eq. 3-6) instead of norms and gates. Parameter names are those of the official
release (NVlabs/DiffiT, March 2026). The image-space model is in `diffit_image.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.backbones.latent_transformer import (
    MLP,
    LatentConfig,
    LatentTransformer,
    unpatchify,
)
from condit.nn.attention import BlockControl, Call, Site, attend, join_heads, split_heads
from condit.nn.layers import recomputed
from condit.nn.lora import Linear, LoRA, name_linears


@dataclass(frozen=True)
class DiffiTConfig(LatentConfig):
    """Arguments of the official constructor. Attention is global: its window is the token grid of `input_size`."""


PRESETS: dict[str, DiffiTConfig] = {
    # The released constructor: 561 M, 114 GMAC without the attention products, FID 1.73 (scale 4.4); Tables 2 and 9.
    # Appendix H.2 says 30 layers, but only 28 give Table 9's 561 M: `replace(PRESETS[name], depth=30)` for the other.
    "DiffiT-XL/2": DiffiTConfig(),
    "DiffiT-XL/2-512": DiffiTConfig(input_size=64),  # 564 M, FID 2.67 (scale 1.49)
}


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (C, h, w) at another size, bicubic, as Swin resizes its bias tables (Liu et al. 2021, arXiv:2103.14030).
    The centre of an odd map, the bias of a token to itself, stays the centre."""
    if tuple(maps.shape[1:]) == size:
        return maps
    return F.interpolate(maps[None].float(), size=size, mode="bicubic")[0].to(maps.dtype)


def offset_maps(table: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A bias table ((2h - 1) (2w - 1), heads) of a window (h, w) as maps (heads, 2 rows - 1, 2 columns - 1) of a grid.

    The bias of the offset (dr, dc), query minus key, is at (dr + rows - 1, dc + columns - 1).
    """
    maps = table.T.unflatten(1, (2 * window[0] - 1, 2 * window[1] - 1))
    return resize_maps(maps, (2 * grid[0] - 1, 2 * grid[1] - 1))


def relative_bias(table: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The bias of Eq. 6 for every pair of tokens of a grid, (1, heads, N, N); arguments as in `offset_maps`."""
    rows, columns = grid
    # A query in row r has the offsets r - r' for r' = 0 ... rows - 1: the rows of the map from r on, reversed. So no
    # index is needed. (H, 2h - 1, 2w - 1) -> (H, h, w, h', w')
    shifted = offset_maps(table, window, grid).unfold(1, rows, 1).unfold(2, columns, 1).flip(3, 4)
    return shifted.flatten(3).flatten(1, 2)[None]


@dataclass(frozen=True)
class DiffiTContext:
    """The inputs that all blocks of one forward share: the time token xt (B, Dt) and the grid of each attention."""

    time: Tensor
    grid: tuple[int, int]
    lora: LoRA | None = None
    controls: tuple[BlockControl, ...] = ()
    dropout: float = 0.0
    generator: torch.Generator | None = None


class TMSA(nn.Module):
    """Time-dependent multi-head self-attention: q, k, v = xs W_s + xt W_t (Eq. 3-5), softmax(q k^T / sqrt(d) + B) v."""

    def __init__(self, dim: int, time_dim: int, heads: int, window: tuple[int, int], site: Site):
        super().__init__()
        self.heads, self.window, self.site = heads, window, site
        rows, columns = window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1), heads))
        # As in the release, both have a bias, and there is no activation before the projection of the time token.
        self.qkv_temb, self.qkv, self.proj = Linear(time_dim, 3 * dim), Linear(dim, 3 * dim), Linear(dim, dim)

    def bias(self, grid: tuple[int, int]) -> Tensor:
        return relative_bias(self.relative_position_bias_table, self.window, grid)

    def forward(self, xs: Tensor, context: DiffiTContext, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """xs (B, M, N, D), M windows of N tokens -> the same shape, and the queries (B M, H, N, d).

        bias (1, H, N, N): the bias of the context's grid, computed here by default. Windows are rows of a batch to
        controls.
        """
        time = self.qkv_temb(context.time, context.lora)[:, None, None]
        qkv = (self.qkv(xs, context.lora) + time).flatten(0, 1)
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, -1))
        bias = (self.bias(context.grid) if bias is None else bias).to(q.dtype)
        image = slice(0, xs.shape[2])
        call = Call(q, k, v, self.site, bias=bias, image=image, plain=q if context.controls else None)
        out = join_heads(attend(call, context.controls)).unflatten(0, xs.shape[:2])
        return self.proj(out, context.lora), q


class DiffiTBlock(nn.Module):
    """x + TMSA(LN(x), xt), then x + MLP(LN(x)) (Eq. 7-8), without gates and shifts."""

    def __init__(self, attn: TMSA, dim: int, mlp_ratio: float, *, affine: bool):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine) for _ in range(2))
        self.attn, self.mlp = attn, MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, context: DiffiTContext, bias: Tensor | None = None) -> Tensor:
        attended, query = self.attn(self.norm1(x), context, bias)
        x = x + attended
        x = x + self.mlp(self.norm2(x), context.lora)
        for control in context.controls:
            addition = control.residual(self.attn.site, query)
            if addition is not None:
                x = x + addition.unflatten(0, x.shape[:2])
        return x


def initialise_blocks(model: nn.Module, generator: torch.Generator | None) -> None:
    """Xavier for every linear (q, k, v as one matrix), zero biases; bias tables truncated normal of deviation 0.02."""
    for module in model.modules():
        if isinstance(module, Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        if isinstance(module, TMSA):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02, generator=generator)


class DiffiTFinalLayer(nn.Module):
    """LN, SiLU, Linear. The paper's figure has the linear only; the release has the SiLU too."""

    def __init__(self, dim: int, n_out: int):
        super().__init__()
        self.linear = Linear(dim, n_out)

    def forward(self, x: Tensor, lora: LoRA | None = None) -> Tensor:
        return self.linear(F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6)), lora)


class DiffiT(LatentTransformer):
    """The latent model, class-conditional or unconditional; sides of latents are multiples of the patch."""

    config: DiffiTConfig

    def __init__(self, config: DiffiTConfig):
        super().__init__(config)
        c = config
        for i in range(c.depth):
            site = Site(f"blocks.{i}.attn", "self", i)
            attn = TMSA(c.hidden_size, c.hidden_size, c.num_heads, c.grid, site)
            self.blocks.append(DiffiTBlock(attn, c.hidden_size, c.mlp_ratio, affine=False))
        self.final_layer = DiffiTFinalLayer(c.hidden_size, c.patch_size**2 * c.out_channels)
        name_linears(self)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """The release's initial weights. The final layer is zero, so a new network predicts 0."""
        initialise_blocks(self, generator)
        self.initialise_embedders(generator)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def sites(self) -> list[Site]:
        """Every attention layer in the order of execution."""
        return [block.attn.site for block in cast("Iterable[DiffiTBlock]", self.blocks)]

    def biases(self, grid: tuple[int, int]) -> list[Tensor]:
        """The bias (1, heads, N, N) of every layer for a token grid. It is the same in all steps, so a sampler computes
        it once and passes it to `forward`; 117 MB in float32 at 256 px and 1.9 GB at 512 px for XL/2."""
        return [block.attn.bias(grid) for block in cast("Iterable[DiffiTBlock]", self.blocks)]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table (1, N, D): the stored one on the trained grid, else resized like the bias tables."""
        # Never trained, even after requires_grad_() of the whole model.
        maps = self.pos_embed.detach()[0].T.unflatten(1, self.config.grid)
        return resize_maps(maps, grid).flatten(1).T[None]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        biases: Sequence[Tensor] | None = None,
        lora: LoRA | None = None,
        controls: Sequence[BlockControl] = (),
        checkpointing: bool = False,
    ) -> Tensor:
        """Noise (B, C, H, W) or, with learn_sigma, noise and the variance's interpolation value (B, 2 C, H, W).

        x (B, C, H, W), H and W multiples of the patch; t (B,) in 0 ... 999, may be fractional; y (B,) class numbers.
        biases: `biases` of this grid. checkpointing: keep the blocks' inputs only and compute each block twice.
        """
        grid = self.grid_of(x)
        context = DiffiTContext(self.embed(t, y, lora), grid, lora, tuple(controls))
        if biases is not None and biases[0].shape[-1] != math.prod(grid):
            raise ValueError(
                f"biases are for {biases[0].shape[-1]} tokens; this latent has {math.prod(grid)}. Use biases({grid})."
            )
        tokens = (self.x_embedder(x) + self.positions(grid))[:, None]  # the whole grid is one window
        for i, block in enumerate(self.blocks):
            bias = None if biases is None else biases[i]
            if checkpointing and torch.is_grad_enabled():
                tokens = recomputed(block, tokens, context, bias)
            else:
                tokens = block(tokens, context, bias)
        return unpatchify(self.final_layer(tokens[:, 0], lora), grid, self.config.patch_size)


@torch.no_grad()
def resize(model: DiffiT, input_size: int | tuple[int, int]) -> DiffiT:
    """A copy for another latent size, to train further: its tables are resized as `forward` resizes them."""
    config = replace(model.config, input_size=input_size)
    state = dict(model.state_dict(), pos_embed=model.positions(config.grid))
    for i in range(config.depth):
        name = f"blocks.{i}.attn.relative_position_bias_table"
        state[name] = offset_maps(state[name], model.config.grid, config.grid).flatten(1).T
    with torch.device("meta"):
        copy = DiffiT(config)
    copy.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True, assign=True)
    return copy.train(model.training)
