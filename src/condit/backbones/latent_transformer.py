"""The parts that DiT (arXiv:2212.09748) and DiffiT (arXiv:2312.02139) share: patches, time, class and positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.diffusion.objectives import drop
from condit.nn.layers import PatchEmbedder, tanh_gelu, timestep_features
from condit.nn.lora import Linear, LoRA


@dataclass(frozen=True)
class LatentConfig:
    """Arguments that the official constructors of DiT and DiffiT share. input_size: side, or (height, width), of the
    latent for which the network is made.

    num_classes 0 or None: unconditional. class_dropout_prob > 0 adds a row to the label table, the null class.
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
        """Height and width of the latent for which the position table is made."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.latent[0] // self.patch_size, self.latent[1] // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


def sincos_positions(grid: tuple[int, int], dim: int, *, device: torch.device | None = None) -> Tensor:
    """The fixed position table (rows * columns, dim) in float64, row-major; positions are integers from 0.

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines.
    """
    omega = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))

    def axis(count: int) -> Tensor:
        angle = torch.arange(count, dtype=torch.float64, device=device)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], -1)

    rows, columns = grid
    return torch.cat([axis(columns).repeat(rows, 1), axis(rows).repeat_interleave(columns, 0)], -1)


def token_grid(x: Tensor, channels: int, patch: int) -> tuple[int, int]:
    """Rows and columns of the tokens of a latent (B, channels, H, W). Raises ValueError for another shape."""
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(
            f"A latent (B, {channels}, H, W) with H and W multiples of {patch} is expected; found {tuple(x.shape)}."
        )
    return x.shape[2] // patch, x.shape[3] // patch


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, T, p p C), channels fastest, -> (B, C, H, W)."""
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # (B, Hp, Wp, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features, Linear, SiLU, Linear: (B,) -> (B, D). Fractional timesteps are allowed."""

    def __init__(self, dim: int, width: int = 256, features: Callable[[Tensor, int], Tensor] = timestep_features):
        super().__init__()
        self.width, self.features = width, features
        self.mlp = nn.ModuleList([Linear(width, dim), nn.SiLU(), Linear(dim, dim)])

    @property
    def linears(self) -> tuple[Linear, Linear]:
        return cast("Linear", self.mlp[0]), cast("Linear", self.mlp[2])

    def forward(self, t: Tensor, lora: LoRA | None = None) -> Tensor:
        first, second = self.linears
        return second(F.silu(first(self.features(t, self.width).to(first.weight.dtype), lora)), lora)


class LabelEmbedder(nn.Module):
    """One row for each class; the null class, if there is one, comes last."""

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor, lora: LoRA | None = None) -> Tensor:
        return self.fc2(tanh_gelu(self.fc1(x, lora)), lora)


class LatentTransformer(nn.Module):
    """The part that DiT and DiffiT share: patches in and out, time and class, the table of positions."""

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
        """Both papers' initial weights of the layers before the blocks."""
        self.pos_embed.copy_(sincos_positions(self.config.grid, self.config.hidden_size)[None])
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1), generator=generator)
        nn.init.zeros_(cast("Tensor", self.x_embedder.proj.bias))
        for linear in self.t_embedder.linears:
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        if self.config.num_classes:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)

    @property
    def null_label(self) -> int:
        """The label of the null class. Raises ValueError without one."""
        if not (self.config.num_classes and self.config.class_dropout_prob):
            raise ValueError(
                "This network has no null class, so it supports neither guidance nor a call without labels: "
                "a null class needs num_classes > 0 and class_dropout_prob > 0 in training."
            )
        return self.config.num_classes

    def drop_labels(self, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Training labels (B,), each replaced by the null class with probability class_dropout_prob. Random numbers
        come from the generator's device."""
        if not self.config.class_dropout_prob:
            return y
        return torch.where(drop(len(y), self.config.class_dropout_prob, generator).to(y.device), self.null_label, y)

    def embed(self, t: Tensor, y: Tensor | None, lora: LoRA | None = None) -> Tensor:
        """The embedding (B, D) of timesteps (B,) and labels (B,); y None: the null class, or no class in an
        unconditional network. Raises ValueError for labels that do not match."""
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
        """Rows and columns of the tokens of a latent. Raises ValueError for another shape."""
        return token_grid(x, self.config.in_channels, self.config.patch_size)


def check_labels(y: Tensor, batch: int, rows: int) -> None:
    """ValueError unless y holds one class number in 0 ... rows - 1 for each image.

    Values are checked on the CPU only: on another device the check would wait for it, and compilation would break.
    """
    if y.shape != (batch,) or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"Labels must be {batch} whole numbers, one per image; found {tuple(y.shape)} of {y.dtype}.")
    if not torch.compiler.is_compiling() and y.device.type == "cpu":
        wrong = y[(y < 0) | (y >= rows)]
        if len(wrong):
            raise ValueError(f"No class {wrong[0].item()}: this network has the labels 0 to {rows - 1}.")
