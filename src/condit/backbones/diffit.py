"""DiffiT: diffusion vision transformers (Hatamizadeh et al. 2023, arXiv:2312.02139), the latent model and the U-shape.

Time enters through attention (TMSA, Eq. 3-6) instead of norms and gates. `DiffiT` works on latents and carries the
parameter names of the official release (NVlabs/DiffiT, March 2026); `DiffiTImage` works on pixels and follows the
paper, as no official code of it exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from condit.backbones.dit import (
    MLP,
    LatentConfig,
    LatentTransformer,
    unpatchify,
)
from condit.nn.attention import Call, Site, attend, join_heads, split_heads
from condit.nn.layers import dropout
from condit.nn.lora import Linear, LoRA, name_linears


@dataclass(frozen=True)
class DiffiTConfig(LatentConfig):
    """Arguments of the official constructor. The window of attention is the token grid of `input_size`: global."""


PRESETS: dict[str, DiffiTConfig] = {
    # The released constructor: 561 M, 114 GMAC without the attention products, FID 1.73 (scale 4.4); Tables 2 and 9.
    # Appendix H.2 says 30 layers, but only 28 give Table 9's 561 M: `replace(PRESETS[name], depth=30)` for the other.
    "DiffiT-XL/2": DiffiTConfig(),
    "DiffiT-XL/2-512": DiffiTConfig(input_size=64),  # 564 M, FID 2.67 (scale 1.49)
}


@dataclass(frozen=True)
class DiffiTImageConfig:
    """The U-shape (section 3.2, Fig. 4). blocks: L_i a resolution, finest first; widths: channels a resolution.

    What the paper leaves open is chosen here: head_dim, mlp_ratio, time_features, concatenated skips, affine norms.
    """

    blocks: tuple[int, ...] = (4, 4, 4, 4)
    widths: tuple[int, ...] = (128, 256, 256, 256)  # Tables S.2 and S.3; 128 in the third row of S.2 is a slip
    window: int = 8
    dropout: float = 0.05
    time_dim: int = 512
    time_features: int = 128
    head_dim: int = 32
    mlp_ratio: float = 4.0
    in_channels: int = 3
    norm_affine: bool = True

    def __post_init__(self):
        if len(self.blocks) != len(self.widths):
            raise ValueError(f"blocks {self.blocks} and widths {self.widths} must name equally many resolutions.")
        if any(width % self.head_dim for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of head_dim {self.head_dim}.")

    @property
    def stride(self) -> int:
        """Height and width of an input must be multiples of this: one window at the coarsest resolution."""
        return self.window * 2 ** (len(self.blocks) - 1)


_FFHQ = DiffiTImageConfig()
_CIFAR = DiffiTImageConfig(blocks=(4, 4, 4), widths=(128, 256, 256), window=4, dropout=0.13)
# Appendices H.1 and I.1 disagree about the number of blocks; windows are I.1's, dropout is EDM's (Karras et al. 2022).
IMAGE_PRESETS: dict[str, DiffiTImageConfig] = {
    "DiffiT-FFHQ-64": _FFHQ,  # H.1; FID 2.22
    "DiffiT-FFHQ-64-I1": replace(_FFHQ, blocks=(1, 2, 2, 2)),  # I.1
    "DiffiT-CIFAR-10": _CIFAR,  # H.1; FID 1.95
    "DiffiT-CIFAR-10-I1": replace(_CIFAR, blocks=(2, 2, 2)),  # I.1
}


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (C, h, w) at another size, bicubic, as Swin does with its bias tables (Liu et al. 2021, arXiv:2103.14030).
    The middle of an odd map stays the middle: the bias of a token to itself."""
    if tuple(maps.shape[1:]) == size:
        return maps
    return F.interpolate(maps[None].float(), size=size, mode="bicubic")[0].to(maps.dtype)


def offset_maps(table: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A bias table ((2h - 1) (2w - 1), heads) of a window (h, w) as maps (heads, 2 rows - 1, 2 columns - 1) of a grid.

    The offset (dr, dc), query minus key, stands at (dr + rows - 1, dc + columns - 1).
    """
    maps = table.T.unflatten(1, (2 * window[0] - 1, 2 * window[1] - 1))
    return resize_maps(maps, (2 * grid[0] - 1, 2 * grid[1] - 1))


def relative_bias(table: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The bias of Eq. 6 for every pair of tokens of a grid, (1, heads, N, N); arguments as in `offset_maps`."""
    rows, columns = grid
    # A query in row r sees the offsets r - r' for r' = 0 ... rows - 1: the rows of the map from r on, reversed. So no
    # index is stored. (H, 2h - 1, 2w - 1) -> (H, h, w, h', w')
    shifted = offset_maps(table, window, grid).unfold(1, rows, 1).unfold(2, columns, 1).flip(3, 4)
    return shifted.flatten(3).flatten(1, 2)[None]


def to_windows(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, M, side^2, C), windows and their pixels row by row."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, Hs, s, Ws, s)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, side: int, height: int) -> Tensor:
    """(B, M, side^2, C) -> (B, C, H, W): the inverse of `to_windows`."""
    x = x.unflatten(2, (side, side)).unflatten(1, (height // side, -1))  # (B, Hs, Ws, s, s, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


@dataclass(frozen=True)
class Frame:
    """What one forward holds fixed over its blocks: the token xt (B, Dt) and the grid over which attention runs."""

    time: Tensor
    grid: tuple[int, int]
    lora: LoRA | None = None
    controls: tuple = ()
    dropout: float = 0.0
    generator: torch.Generator | None = None


class TMSA(nn.Module):
    """Time-dependent multi-head self-attention: q, k, v = xs W_s + xt W_t (Eq. 3-5), softmax(q k^T / sqrt(d) + B) v."""

    def __init__(self, dim: int, time_dim: int, heads: int, window: tuple[int, int], site: Site):
        super().__init__()
        self.heads, self.window, self.site = heads, window, site
        rows, columns = window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1), heads))
        # Both carry a bias, as released, and the time token meets no activation before its projection.
        self.qkv_temb, self.qkv, self.proj = Linear(time_dim, 3 * dim), Linear(dim, 3 * dim), Linear(dim, dim)

    def bias(self, grid: tuple[int, int]) -> Tensor:
        return relative_bias(self.relative_position_bias_table, self.window, grid)

    def forward(self, xs: Tensor, frame: Frame, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """xs (B, M, N, D), M windows of N tokens -> the same shape, and the queries (B M, H, N, d).

        bias (1, H, N, N): that of the frame's grid where it is formed already. Controls see windows as rows of a batch.
        """
        time = self.qkv_temb(frame.time, frame.lora)[:, None, None]
        qkv = (self.qkv(xs, frame.lora) + time).flatten(0, 1)
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, -1))
        bias = (self.bias(frame.grid) if bias is None else bias).to(q.dtype)
        image = slice(0, xs.shape[2])
        call = Call(q, k, v, self.site, bias=bias, image=image, plain=q if frame.controls else None)
        out = join_heads(attend(call, frame.controls)).unflatten(0, xs.shape[:2])
        return self.proj(out, frame.lora), q


class Block(nn.Module):
    """x + TMSA(LN(x), xt), then x + MLP(LN(x)) (Eq. 7-8): neither gates nor shifts."""

    def __init__(self, attn: TMSA, dim: int, mlp_ratio: float, *, affine: bool):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine) for _ in range(2))
        self.attn, self.mlp = attn, MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, frame: Frame, bias: Tensor | None = None) -> Tensor:
        attended, query = self.attn(self.norm1(x), frame, bias)
        x = x + attended
        x = x + self.mlp(self.norm2(x), frame.lora)
        for control in frame.controls:
            addition = control.residual(self.attn.site, query)
            if addition is not None:
                x = x + addition.unflatten(0, x.shape[:2])
        return x


def initialise_blocks(model: nn.Module, generator: torch.Generator | None) -> None:
    """Xavier for every linear (q, k, v as one matrix), biases zero; bias tables truncated normal of deviation 0.02."""
    for module in model.modules():
        if isinstance(module, Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        if isinstance(module, TMSA):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02, generator=generator)


class FinalLayer(nn.Module):
    """LN, SiLU, Linear. The paper draws the linear only; the release has the SiLU."""

    def __init__(self, dim: int, n_out: int):
        super().__init__()
        self.linear = Linear(dim, n_out)

    def forward(self, x: Tensor, lora: LoRA | None = None) -> Tensor:
        return self.linear(F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6)), lora)


class DiffiT(LatentTransformer):
    """The latent model: class-conditional or unconditional, on any latent whose sides are multiples of the patch."""

    config: DiffiTConfig

    def __init__(self, config: DiffiTConfig):
        super().__init__(config)
        c = config
        for i in range(c.depth):
            site = Site(f"blocks.{i}.attn", "self", i)
            attn = TMSA(c.hidden_size, c.hidden_size, c.num_heads, c.grid, site)
            self.blocks.append(Block(attn, c.hidden_size, c.mlp_ratio, affine=False))
        self.final_layer = FinalLayer(c.hidden_size, c.patch_size**2 * c.out_channels)
        name_linears(self)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """The release's initial weights. The final layer is zero, so a fresh network puts out 0."""
        initialise_blocks(self, generator)
        self.initialise_embedders(generator)
        nn.init.zeros_(self.final_layer.linear.weight)

    def biases(self, grid: tuple[int, int]) -> list[Tensor]:
        """The bias (1, heads, N, N) of every layer for a token grid. They hold for all steps of a run, so a sampler
        forms them once and hands them to `forward`; 117 MB in float32 at 256 px and 1.9 GB at 512 px for XL/2."""
        return [cast("TMSA", block.attn).bias(grid) for block in self.blocks]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table (1, N, D): the stored one on the trained grid, else resized like the bias tables."""
        # Fixed, even where requires_grad_() has run over the whole model.
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
        controls: Sequence = (),
        checkpointing: bool = False,
    ) -> Tensor:
        """Noise (B, C, H, W) or, with learn_sigma, noise and the variance's interpolation value (B, 2 C, H, W).

        x (B, C, H, W), any multiple of the patch; t (B,) in 0 ... 999, whole or fractional; y (B,) class numbers.
        biases: those of this grid. checkpointing: keep the blocks' inputs only and compute each block twice.
        """
        grid = self.grid_of(x)
        frame = Frame(self.embed(t, y, lora), grid, lora, tuple(controls))
        tokens = (self.x_embedder(x) + self.positions(grid))[:, None]  # the whole grid is one window
        for i, block in enumerate(self.blocks):
            bias = None if biases is None else biases[i]
            if checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, frame, bias, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, frame, bias)
        return unpatchify(self.final_layer(tokens[:, 0], lora), grid, self.config.patch_size)


@torch.no_grad()
def resize(model: DiffiT, input_size: int | tuple[int, int]) -> DiffiT:
    """A copy for another latent size, to be trained on: its tables are the resized ones that `forward` would form."""
    config = replace(model.config, input_size=input_size)
    state = dict(model.state_dict(), pos_embed=model.positions(config.grid))
    for i in range(config.depth):
        name = f"blocks.{i}.attn.relative_position_bias_table"
        state[name] = offset_maps(state[name], model.config.grid, config.grid).flatten(1).T
    with torch.device("meta"):
        copy = DiffiT(config)
    copy.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True, assign=True)
    return copy.train(model.training)


def noise_features(c_noise: Tensor, dim: int) -> Tensor:
    """EDM's features (B,) -> (B, dim) float32: sine first, frequencies from 1 to 1/10,000 with the end included."""
    omega = 10_000.0 ** (-torch.arange(dim // 2, device=c_noise.device) / (dim // 2 - 1))
    angle = c_noise[:, None].float() * omega
    return torch.cat([angle.sin(), angle.cos()], -1)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class NoiseEmbedder(nn.Module):
    """`noise_features`, Linear, SiLU, Linear: (B,) -> (B, Dt)."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.features, self.mlp = features, nn.ModuleList([Linear(features, dim), nn.SiLU(), Linear(dim, dim)])

    def forward(self, c_noise: Tensor, lora: LoRA | None = None) -> Tensor:
        first, activation, second = self.mlp
        dtype = cast("Linear", first).weight.dtype
        return second(activation(first(noise_features(c_noise, self.features).to(dtype), lora)), lora)


class ResBlock(nn.Module):
    """h = Conv3x3(Swish(GN(x))), then Block(h, xt) + x (Eq. 9-10), the block on windows that do not overlap."""

    def __init__(self, c: DiffiTImageConfig, n_in: int, width: int, site: Site):
        super().__init__()
        self.window = c.window
        self.norm, self.conv = group_norm(n_in), nn.Conv2d(n_in, width, 3, padding=1)
        self.shortcut = nn.Identity() if n_in == width else nn.Conv2d(n_in, width, 1)
        attn = TMSA(width, c.time_dim, width // c.head_dim, (c.window, c.window), site)
        self.block = Block(attn, width, c.mlp_ratio, affine=c.norm_affine)

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        h = dropout(self.conv(F.silu(self.norm(x))), frame.dropout, frame.generator)
        h = self.block(to_windows(h, self.window), frame)
        return from_windows(h, self.window, x.shape[2]) + self.shortcut(x)


class Stage(nn.Module):
    """One resolution on one side of the U: a change of resolution (none at the top), then residual blocks."""

    def __init__(self, c: DiffiTImageConfig, resample: nn.Module, n_in: int, level: int, path: str, index: int):
        super().__init__()
        self.resample = resample
        widths = [n_in, *[c.widths[level]] * c.blocks[level]]
        self.blocks = nn.ModuleList(
            ResBlock(c, before, after, Site(f"{path}.blocks.{i}.block.attn", "self", index + i))
            for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False))
        )

    def forward(self, x: Tensor, frame: Frame, skip: Tensor | None = None) -> Tensor:
        x = self.resample(x)
        if skip is not None:
            x = torch.cat([x, skip], 1)
        for block in self.blocks:
            x = block(x, frame)
        return x


def downsample(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def upsample(channels: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1))


class DiffiTImage(nn.Module):
    """The U-shape in pixel space (Fig. 4), unconditional: F(x, c_noise) of EDM's preconditioning (arXiv:2206.00364)."""

    def __init__(self, config: DiffiTImageConfig):
        super().__init__()
        c = self.config = config
        last = len(c.blocks) - 1
        self.t_embedder = NoiseEmbedder(c.time_features, c.time_dim)
        self.tokenizer = nn.Conv2d(c.in_channels, c.widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            Stage(
                c,
                downsample(c.widths[i - 1]) if i else nn.Identity(),
                c.widths[max(i - 1, 0)],
                i,
                f"encoder.{i}",
                sum(c.blocks[:i]),
            )
            for i in range(last + 1)
        )
        done = sum(c.blocks)
        self.decoder = nn.ModuleList()  # coarse to fine: decoder.0 stands above the bottleneck
        for j, i in enumerate(reversed(range(last))):
            below = c.widths[i + 1]
            self.decoder.append(Stage(c, upsample(below), below + c.widths[i], i, f"decoder.{j}", done))
            done += c.blocks[i]
        self.head = nn.ModuleList([group_norm(c.widths[0]), nn.Conv2d(c.widths[0], c.in_channels, 3, padding=1)])
        name_linears(self)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """The paper tells none: blocks as in the latent model, convolutions torch's, and zero for the last one."""
        initialise_blocks(self, generator)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)  # type: ignore[arg-type]
        for parameter in self.head[1].parameters():
            nn.init.zeros_(parameter)

    @property
    def sites(self) -> list[Site]:
        """Every attention layer in the order of execution."""
        stages = cast("list[Any]", [*self.encoder, *self.decoder])
        return [block.block.attn.site for stage in stages for block in stage.blocks]

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        lora: LoRA | None = None,
        controls: Sequence = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, 3, H, W), c_noise (B,) = ln(sigma) / 4 -> (B, 3, H, W). `generator` draws the dropout of training, on the
        device of the model."""
        c = self.config
        if x.ndim != 4 or x.shape[1] != c.in_channels or x.shape[2] % c.stride or x.shape[3] % c.stride:
            raise ValueError(
                f"Images (B, {c.in_channels}, H, W) with H and W multiples of {c.stride} are expected (a window of "
                f"{c.window} at the coarsest resolution); found {tuple(x.shape)}."
            )
        rate = c.dropout if self.training else 0.0
        frame = Frame(self.t_embedder(c_noise, lora), (c.window, c.window), lora, tuple(controls), rate, generator)
        x = self.tokenizer(x)
        skips = []
        for stage in self.encoder:
            x = stage(x, frame)
            skips.append(x)
        for stage, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            x = stage(x, frame, skip)
        # No swish between norm and convolution: section 3.2 names these two only.
        norm, conv = self.head
        return conv(norm(x))
