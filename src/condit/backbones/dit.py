"""DiT: scalable diffusion models with transformers (Peebles & Xie 2022, arXiv:2212.09748).

A plain transformer over latent patches whose norms and gates come from time and class. Parameter names are those of the
official repository (facebookresearch/DiT). diffusers' `DiTTransformer2DModel` computes something else from the same
weights (see `condit.weights.dit`); this is the official function.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.diffusion.objectives import drop
from condit.nn.attention import Call, Reduction, Site, attend, join_heads, reduction, split_heads
from condit.nn.layers import modulated_norm, recomputed, timestep_features
from condit.nn.lora import Linear, LoRA, name_linears


@dataclass(frozen=True)
class LatentConfig:
    """What DiT's and DiffiT's official constructors have in common. input_size: side, or (height, width), of the latent
    that the network is made for.

    num_classes 0 or None: unconditional. class_dropout_prob > 0 gives the label table one row more, the null class.
    """

    input_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int | None = 1000
    learn_sigma: bool = True

    def __post_init__(self):
        if min(self.patch_size, self.in_channels, self.hidden_size, self.num_heads, *self.latent) < 1 or self.depth < 0:
            raise ValueError(f"Sizes of a latent transformer must be at least 1; found {self}.")
        if any(side % self.patch_size for side in self.latent):
            raise ValueError(f"input_size {self.input_size} must be a multiple of patch_size {self.patch_size}.")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 4."
            )
        if not 0 <= self.class_dropout_prob <= 1 or (self.num_classes or 0) < 0:
            raise ValueError(
                f"class_dropout_prob must lie in [0, 1] and num_classes be 0 or more; "
                f"found {self.class_dropout_prob} and {self.num_classes}."
            )

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latent that the position table is made for."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.latent[0] // self.patch_size, self.latent[1] // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True)
class DiTConfig(LatentConfig):
    """gates, zero_init: True, True is adaLN-Zero; False, False is the plain adaLN of Table 4."""

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


def sincos_positions(grid: tuple[int, int], dim: int, *, device: torch.device | None = None) -> Tensor:
    """The fixed position table (rows * columns, dim) in float64; row-major, positions are integers from 0.

    The first half of the channels tells the column, the second the row; each half is sines, then cosines.
    """
    omega = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))

    def axis(count: int) -> Tensor:
        angle = torch.arange(count, dtype=torch.float64, device=device)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], -1)

    rows, columns = grid
    return torch.cat([axis(columns).repeat(rows, 1), axis(rows).repeat_interleave(columns, 0)], -1)


def token_grid(x: Tensor, channels: int, patch: int) -> tuple[int, int]:
    """Rows and columns of the tokens of a latent (B, channels, H, W); ValueError if it does not fit."""
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(
            f"A latent (B, {channels}, H, W) with H and W multiples of {patch} is expected; found {tuple(x.shape)}."
        )
    return x.shape[2] // patch, x.shape[3] // patch


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, T, p p C), channels fastest, -> (B, C, H, W)."""
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # (B, Hp, Wp, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


@dataclass(frozen=True)
class Frame:
    """What one forward holds fixed over its blocks; `embedding` (B, D) is time plus class."""

    embedding: Tensor
    lora: LoRA | None = None
    controls: tuple = ()


class Modulation(nn.ModuleList):
    """SiLU, then a linear under the official name `1`: the chunks of shifts, scales and gates, each (B, 1, D)."""

    def __init__(self, dim: int, chunks: int):
        super().__init__([nn.SiLU(), Linear(dim, chunks * dim)])
        self.chunks = chunks

    def forward(self, frame: Frame) -> tuple[Tensor, ...]:
        return self[1](self[0](frame.embedding), frame.lora)[:, None].chunk(self.chunks, -1)


class PatchEmbedder(nn.Module):
    """Patches to tokens, row by row: (B, C, H, W) -> (B, T, D)."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """256 sinusoidal features, Linear, SiLU, Linear: (B,) -> (B, D). Fractional timesteps are allowed."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.ModuleList([Linear(256, dim), nn.SiLU(), Linear(dim, dim)])

    def forward(self, t: Tensor, lora: LoRA | None = None) -> Tensor:
        first, activation, second = self.mlp
        dtype = cast("Linear", first).weight.dtype
        return second(activation(first(timestep_features(t).to(dtype), lora)), lora)


class LabelEmbedder(nn.Module):
    """One row a class; the null class, where there is one, comes last."""

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for q, k and v."""

    def __init__(self, dim: int, heads: int, site: Site):
        super().__init__()
        self.heads, self.site = heads, site
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)

    def forward(self, x: Tensor, frame: Frame, merged: Reduction | None = None) -> tuple[Tensor, Tensor]:
        """The output (B, T, D), and the queries (B, H, T, d)."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x, frame.lora).chunk(3, -1))
        rows = slice(0, x.shape[1])
        plain = q if frame.controls else None
        call = Call(q, k, v, self.site, image=rows, plain=plain, keys=rows, merged=merged)
        return self.proj(join_heads(attend(call, frame.controls)), frame.lora), q


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor, lora: LoRA | None = None) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, lora), approximate="tanh"), lora)


class Block(nn.Module):
    """x + g Attn(norm(x)), then x + g MLP(norm(x)): shift, scale and gate g of each come from the embedding."""

    def __init__(self, c: DiTConfig, site: Site):
        super().__init__()
        self.attn = Attention(c.hidden_size, c.num_heads, site)
        self.mlp = MLP(c.hidden_size, int(c.hidden_size * c.mlp_ratio))
        self.adaLN_modulation = Modulation(c.hidden_size, 6 if c.gates else 4)
        self.gates = c.gates

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        if self.gates:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(frame)
        else:
            (shift, scale, shift_mlp, scale_mlp), gate, gate_mlp = self.adaLN_modulation(frame), 1, 1
        h = modulated_norm(x, shift, scale)
        merged = reduction(self.attn.site, h, slice(0, x.shape[1]), frame.controls)
        if merged is None:
            attended, query = self.attn(h, frame)
        else:
            attended, query = (merged.unmerge(y) for y in self.attn(merged.merge(h), frame, merged))
        x = x + gate * attended
        h = modulated_norm(x, shift_mlp, scale_mlp)
        if merged is not None and merged.mlp:
            x = x + gate_mlp * merged.unmerge(self.mlp(merged.merge(h), frame.lora))
        else:
            x = x + gate_mlp * self.mlp(h, frame.lora)
        for control in frame.controls:
            addition = control.residual(self.attn.site, query)
            if addition is not None:
                x = x + addition
        return x


class FinalLayer(nn.Module):
    """Adaptive norm, then a linear to the pixels of each patch."""

    def __init__(self, dim: int, n_out: int):
        super().__init__()
        self.linear, self.adaLN_modulation = Linear(dim, n_out), Modulation(dim, 2)

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        shift, scale = self.adaLN_modulation(frame)
        return self.linear(modulated_norm(x, shift, scale), frame.lora)


class LatentTransformer(nn.Module):
    """What DiT and DiffiT share: patches in and out, time and class, the table of positions."""

    def __init__(self, config: LatentConfig):
        super().__init__()
        c = self.config = config
        self.pos_embed = nn.Parameter(torch.empty(1, c.grid[0] * c.grid[1], c.hidden_size), requires_grad=False)
        self.x_embedder = PatchEmbedder(c.in_channels, c.hidden_size, c.patch_size)
        self.t_embedder = TimestepEmbedder(c.hidden_size)
        if c.num_classes:
            self.y_embedder = LabelEmbedder(c.num_classes + (c.class_dropout_prob > 0), c.hidden_size)
        self.blocks = nn.ModuleList()

    def initialise_embedders(self, generator: torch.Generator | None) -> None:
        """Both papers' initial weights of what stands before the blocks."""
        self.pos_embed.copy_(sincos_positions(self.config.grid, self.config.hidden_size)[None])
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1), generator=generator)
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]  # it has one
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)  # type: ignore[arg-type]
        if self.config.num_classes:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)

    @property
    def sites(self) -> list[Site]:
        """Every attention layer in the order of execution."""
        return [block.attn.site for block in cast("Iterable[Block]", self.blocks)]

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        if not (self.config.num_classes and self.config.class_dropout_prob):
            raise ValueError(
                "This network has no null class, so it can be neither guided nor asked without labels: "
                "a null class needs num_classes > 0 and class_dropout_prob > 0 in training."
            )
        return self.config.num_classes

    def drop_labels(self, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Training labels (B,) of which class_dropout_prob become the null class; drawn on the generator's device."""
        if not self.config.class_dropout_prob:
            return y
        return torch.where(drop(len(y), self.config.class_dropout_prob, generator).to(y.device), self.null_label, y)

    def embed(self, t: Tensor, y: Tensor | None, lora: LoRA | None = None) -> Tensor:
        """The embedding (B, D) of timesteps (B,) and labels (B,); y None: the null class, or an unconditional DiT."""
        time = self.t_embedder(t, lora)
        if not self.config.num_classes:
            if y is not None:
                raise ValueError("This network is unconditional (num_classes 0), so it takes no labels; leave y out.")
            return time
        if y is None:
            y = torch.full_like(t, self.null_label, dtype=torch.long)
        check_labels(y, t.shape[0], self.y_embedder.embedding_table.num_embeddings)
        return time + self.y_embedder(y)

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the tokens of a latent; ValueError if it does not fit."""
        return token_grid(x, self.config.in_channels, self.config.patch_size)


class DiT(LatentTransformer):
    """Noise, and how much of it is variance, for a latent at a timestep, of a class or of none."""

    config: DiTConfig
    merges = True  # its blocks ask `reduction`

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        c = config
        self.blocks.extend(Block(c, Site(f"blocks.{i}.attn", "self", i)) for i in range(c.depth))
        self.final_layer = FinalLayer(c.hidden_size, c.patch_size**2 * c.out_channels)
        name_linears(self)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """The official initial weights: with zero_init and gates a fresh network is the identity, and it puts out 0."""
        for module in self.modules():
            if isinstance(module, Linear):  # q, k and v as one matrix, so their bound is smaller than each one's own
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        self.initialise_embedders(generator)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)  # type: ignore[arg-type]
        if self.config.zero_init:
            for block in self.blocks:
                nn.init.zeros_(block.adaLN_modulation[1].weight)  # type: ignore[index]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table (1, T, D) for a token grid: the stored one where it fits, else the same function computed."""
        # Fixed, even where requires_grad_() has run over the whole model.
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
        controls: Sequence = (),
        checkpointing: bool = False,
    ) -> Tensor:
        """Noise (B, C, H, W) or, with learn_sigma, noise and the variance's interpolation value (B, 2 C, H, W).

        x (B, C, H, W), any multiple of the patch; t (B,) in 0 ... 999, whole or fractional; y (B,) class numbers.
        checkpointing: in training, keep the inputs of the blocks only and compute each block twice.
        """
        grid = self.grid_of(x)
        frame = Frame(self.embed(t, y, lora), lora, tuple(controls))
        tokens = self.x_embedder(x) + self.positions(grid)
        for block in self.blocks:
            if checkpointing and torch.is_grad_enabled():
                tokens = recomputed(block, tokens, frame)
            else:
                tokens = block(tokens, frame)
        return unpatchify(self.final_layer(tokens, frame), grid, self.config.patch_size)


def check_labels(y: Tensor, batch: int, rows: int) -> None:
    """ValueError unless y holds one class number in 0 ... rows - 1 for each image.

    Numbers are looked at on the CPU only: elsewhere, and while compiling, that would make the device wait.
    """
    if y.shape != (batch,) or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"Labels must be {batch} whole numbers, one per image; found {tuple(y.shape)} of {y.dtype}.")
    if not torch.compiler.is_compiling() and y.device.type == "cpu":
        wrong = y[(y < 0) | (y >= rows)]
        if len(wrong):
            raise ValueError(f"No class {wrong[0].item()}: this DiT has the labels 0 to {rows - 1}.")
