"""ViT: an image is worth 16x16 words (Dosovitskiy et al. 2021, arXiv:2010.11929).

The authors publish JAX arrays with transposed kernels. Parameter names are those of timm, which publishes the same
weights for torch and whose block DiT's authors import. `condit.weights.vit` reads and writes the other layouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.nn.attention import BlockControl, Call, Site, attend, join_heads, split_heads
from condit.nn.layers import PatchEmbedder, dropout, recomputed
from condit.nn.lora import Linear, LoRA, name_linears

Resize = Literal["linear_aligned", "bicubic_antialias", "bicubic"]


@dataclass(frozen=True)
class Flavour:
    """How publications of the same weights differ in computation. Exact and tanh differ by about 7e-4 in logits."""

    gelu: Literal["exact", "tanh", "quick"]
    eps: float  # of every LayerNorm
    resize: Resize  # of the position table to another grid


FLAVOURS: dict[str, Flavour] = {
    "jax": Flavour("tanh", 1e-6, "linear_aligned"),  # flax's gelu default; vit_jax/checkpoint.py zooms with order 1
    "timm": Flavour("exact", 1e-6, "bicubic_antialias"),  # timm 1.0, resample_abs_pos_embed
    "transformers": Flavour("exact", 1e-12, "bicubic"),  # google/vit-*, config.json; interpolate_pos_encoding
}


@dataclass(frozen=True)
class ViTConfig:
    """Sizes (Table 1); the defaults are ViT-B/16 with an ImageNet-1k head. image_size: pixels or (height, width).

    classifier: "token" reads the class token, "gap" averages the patch tokens, "unpooled" keeps all tokens.
    """

    patch_size: int = 16
    image_size: int | tuple[int, int] = 224  # the size of the position table; images of another size resize the table
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    classes: int = 1000  # 0: no head
    representation_size: int | None = None  # width of tanh(Dense) before the head, which only pre-training has
    classifier: Literal["token", "gap", "unpooled"] = "token"
    class_token: bool = True  # the authors' "gap" and "unpooled" have none, their "token_unpooled" has one
    fc_norm: bool = False  # timm: the last LayerNorm follows the average instead of preceding it
    dropout: float = 0.0  # after positions and every dense layer except q, k, v
    in_channels: int = 3
    flavour: Flavour = FLAVOURS["jax"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def __post_init__(self):
        if min(self.patch_size, self.dim, self.depth, self.heads, self.mlp_dim, self.in_channels) < 1:
            raise ValueError(f"Sizes of a ViT must be at least 1; found {self}.")
        sides = (self.image_size,) if isinstance(self.image_size, int) else self.image_size
        if any(side % self.patch_size or side < 1 for side in sides):
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}.")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be a multiple of heads {self.heads}.")
        if self.classifier == "token" and not self.class_token:
            raise ValueError(
                "classifier 'token' needs class_token=True; without a class token use 'gap' or 'unpooled'."
            )
        if self.fc_norm and self.classifier != "gap":
            raise ValueError(
                f"fc_norm normalises the average of the tokens; it needs classifier 'gap', not {self.classifier!r}."
            )


_TI = ViTConfig(dim=192, depth=12, heads=3, mlp_dim=768)
_S = ViTConfig(dim=384, depth=12, heads=6, mlp_dim=1536)
_B = ViTConfig(dim=768, depth=12, heads=12, mlp_dim=3072)
_L = ViTConfig(dim=1024, depth=24, heads=16, mlp_dim=4096)
_H = ViTConfig(dim=1280, depth=32, heads=16, mlp_dim=5120)
# Sizes of B, L, H: Table 1; of Ti, S: arXiv:2106.10270, Table 2. Dropout: vit_jax/configs/models.py of the authors'
# repository. Parameters with a head of 1000 classes.
PRESETS: dict[str, ViTConfig] = {
    "ViT-Ti/16": _TI,  # 5.7 M, get_ti16_config
    "ViT-S/16": _S,  # 22.1 M, get_s16_config
    "ViT-S/32": replace(_S, patch_size=32),  # 22.9 M, get_s32_config
    "ViT-B/8": replace(_B, patch_size=8),  # 86.6 M, get_b8_config
    "ViT-B/16": _B,  # 86.6 M, get_b16_config
    "ViT-B/32": replace(_B, patch_size=32),  # 88.2 M, get_b32_config
    "ViT-L/16": replace(_L, dropout=0.1),  # 304 M, get_l16_config
    "ViT-L/32": replace(_L, patch_size=32),  # 307 M, get_l32_config sets dropout back to 0
    "ViT-H/14": replace(_H, patch_size=14, dropout=0.1),  # 632 M, get_h14_config; 384 px do not divide by 14: use 378
    "ViT-S/16-gap": replace(_S, classifier="gap", class_token=False),  # get_s16_gap_norep_config
    "ViT-S/32-gap": replace(_S, patch_size=32, classifier="gap", class_token=False),  # get_s32_gap_norep_config
    "ViT-B/16-gap": replace(_B, classifier="gap", class_token=False),  # get_b16_gap_norep_config
    "ViT-B/32-gap": replace(_B, patch_size=32, classifier="gap", class_token=False),  # get_b32_gap_norep_config
}


@dataclass(frozen=True)
class Features:
    """Tokens of a frozen encoder: patches (B, rows * columns, dim) row by row, cls (B, dim) or None."""

    patches: Tensor
    cls: Tensor | None
    grid: tuple[int, int]  # (rows, columns)


@dataclass(frozen=True)
class ViTContext:
    """The inputs that all blocks of one forward share. `first`: row of the first patch token."""

    first: int
    lora: LoRA | None = None
    controls: tuple[BlockControl, ...] = ()
    generator: torch.Generator | None = None
    dropout: float = 0.0

    def drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.generator)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], resize: Resize) -> Tensor:
    """A position table (1, [1 +] rows * columns, dim) for another grid; the class token's row does not change."""
    if old == new:
        return table
    prefix = table.shape[1] - math.prod(old)
    # (1, rows * columns, D) -> (1, D, rows, columns), in fp32 because bicubic weights do not survive bf16.
    grid = table[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
    if resize == "linear_aligned":
        grid = F.interpolate(grid, new, mode="bilinear", align_corners=True)
    else:
        grid = F.interpolate(grid, new, mode="bicubic", align_corners=False, antialias=resize == "bicubic_antialias")
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2).to(table.dtype)], 1)


class ViTAttention(nn.Module):
    """Multi-head self-attention (Appendix A). Rows of `qkv` are q, then k, then v, each head by head."""

    def __init__(self, c: ViTConfig, site: Site):
        super().__init__()
        self.heads, self.site = c.heads, site
        self.qkv, self.proj = Linear(c.dim, 3 * c.dim), Linear(c.dim, c.dim)

    def forward(self, x: Tensor, context: ViTContext) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x, context.lora).chunk(3, -1))
        call = Call(q, k, v, self.site, image=slice(context.first, x.shape[1]), plain=q if context.controls else None)
        return self.proj(join_heads(attend(call, context.controls)), context.lora)


class ViTMLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.gelu = c.flavour.gelu
        self.fc1, self.fc2 = Linear(c.dim, c.mlp_dim), Linear(c.mlp_dim, c.dim)

    def forward(self, x: Tensor, context: ViTContext) -> Tensor:
        x = self.fc1(x, context.lora)
        if self.gelu == "quick":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x, approximate="tanh" if self.gelu == "tanh" else "none")
        return self.fc2(context.drop(x), context.lora)


class ViTBlock(nn.Module):
    """One layer of the encoder, Eq. 2 and 3."""

    def __init__(self, c: ViTConfig, site: Site):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(c.dim, eps=c.flavour.eps) for _ in range(2))
        self.attn, self.mlp = ViTAttention(c, site), ViTMLP(c)

    def forward(self, x: Tensor, context: ViTContext) -> Tensor:
        x = x + context.drop(self.attn(self.norm1(x), context))
        return x + context.drop(self.mlp(self.norm2(x), context))


class PreLogits(nn.Module):
    """The representation layer: tanh(Dense)."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.fc = Linear(dim, size)

    def forward(self, x: Tensor, lora: LoRA | None = None) -> Tensor:
        return torch.tanh(self.fc(x, lora))


class ViT(nn.Module):
    """The vision transformer. Images are (B, 3, H, W) in [-1, 1]; H and W may be any multiples of the patch size."""

    def __init__(self, config: ViTConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        c = self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.dim)) if c.class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(c.grid) + c.class_token, c.dim))
        self.patch_embed = PatchEmbedder(c.in_channels, c.dim, c.patch_size)
        self.blocks = nn.ModuleList(ViTBlock(c, Site(f"blocks.{i}.attn", "self", i)) for i in range(c.depth))
        norm = nn.LayerNorm(c.dim, eps=c.flavour.eps)
        self.norm, self.fc_norm = (nn.Identity(), norm) if c.fc_norm else (norm, nn.Identity())
        self.pre_logits = None if c.representation_size is None else PreLogits(c.dim, c.representation_size)
        self.head = Linear(c.representation_size or c.dim, c.classes) if c.classes else None
        name_linears(self)
        initialise(self, generator)

    @property
    def sites(self) -> list[Site]:
        """Every attention layer in the order of execution."""
        return [block.attn.site for block in cast("Iterable[ViTBlock]", self.blocks)]

    def embed(self, images: Tensor) -> Tensor:
        """Patches, class token and positions, Eq. 1: (B, 3, H, W) -> (B, N, dim)."""
        grid = self.grid_of(images)
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + resize_positions(self.pos_embed, self.config.grid, grid, self.config.flavour.resize)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patch tokens of these images. Raises ValueError for an unsupported shape."""
        c = self.config
        if images.ndim != 4 or images.shape[1] != c.in_channels:
            raise ValueError(f"ViT takes images (B, {c.in_channels}, H, W); found shape {tuple(images.shape)}.")
        height, width = images.shape[2:]
        if height % c.patch_size or width % c.patch_size or not height * width:
            raise ValueError(
                f"An image of {height} x {width} pixels does not divide into patches of {c.patch_size}. "
                f"Resize it to multiples of {c.patch_size}, for example {c.grid[0] * c.patch_size} x "
                f"{c.grid[1] * c.patch_size}, the size in training."
            )
        return height // c.patch_size, width // c.patch_size

    def encode(self, images: Tensor, blocks: int, context: ViTContext, *, checkpointing: bool = False) -> Tensor:
        """Tokens (B, N, dim) after the first `blocks` blocks, before the last norm."""
        x = context.drop(self.embed(images))
        for block in self.blocks[:blocks]:
            if checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, context, rate=context.dropout, generator=context.generator)
            else:
                x = block(x, context)
        return x

    def features(
        self,
        images: Tensor,
        *,
        blocks: int | None = None,
        norm: bool = True,
        lora: LoRA | None = None,
        controls: Sequence[BlockControl] = (),
    ) -> Features:
        """Tokens after `blocks` blocks (None: all; 0: the embedding), with the last LayerNorm unless norm=False. There
        is no dropout, as in a frozen encoder. Raises ValueError for more blocks than the model has."""
        depth = self.config.depth
        if blocks is not None and not 0 <= blocks <= depth:
            raise ValueError(f"blocks must be within 0..{depth}, the depth of this model; found {blocks}.")
        first = int(self.config.class_token)
        x = self.encode(images, depth if blocks is None else blocks, ViTContext(first, lora, tuple(controls)))
        x = self.norm(x) if norm else x
        return Features(x[:, first:], x[:, 0] if first else None, self.grid_of(images))

    def represent(self, tokens: Tensor, lora: LoRA | None = None) -> Tensor:
        """The head's input from normalised tokens (B, N, dim): pooling and representation layer, Eq. 4."""
        c = self.config
        if c.classifier == "token":
            tokens = tokens[:, 0]
        elif c.classifier == "gap":
            tokens = self.fc_norm(tokens[:, int(c.class_token) :].mean(1))
        return tokens if self.pre_logits is None else self.pre_logits(tokens, lora)

    def forward(
        self,
        images: Tensor,
        *,
        lora: LoRA | None = None,
        controls: Sequence[BlockControl] = (),
        generator: torch.Generator | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Logits (B, classes); without a head the representation (B, dim). "unpooled": the same for every token,
        (B, N, ...). `generator`, on the model's device, is for dropout in training. checkpointing: in training, keep
        the inputs of the blocks only and compute each block twice."""
        c = self.config
        context = ViTContext(int(c.class_token), lora, tuple(controls), generator, c.dropout if self.training else 0.0)
        x = self.represent(self.norm(self.encode(images, c.depth, context, checkpointing=checkpointing)), lora)
        return x if self.head is None else self.head(x, lora)


@torch.no_grad()
def initialise(model: ViT, generator: torch.Generator | None = None) -> None:
    """The authors' initial weights (vit_jax/models_vit.py); the head is zero."""
    g = generator
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    nn.init.normal_(model.pos_embed, std=0.02, generator=g)
    lecun_normal_(model.patch_embed.proj, g)
    for block in cast("Iterable[ViTBlock]", model.blocks):
        # q, k and v are three matrices: Xavier's bound on the fused matrix would be smaller by sqrt(2).
        for weight in (
            *block.attn.qkv.weight.chunk(3),
            block.attn.proj.weight,
            block.mlp.fc1.weight,
            block.mlp.fc2.weight,
        ):
            nn.init.xavier_uniform_(weight, generator=g)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)
        nn.init.normal_(block.mlp.fc1.bias, std=1e-6, generator=g)
        nn.init.normal_(block.mlp.fc2.bias, std=1e-6, generator=g)
    if model.pre_logits is not None:
        lecun_normal_(model.pre_logits.fc, g)
    if model.head is not None:
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)


def lecun_normal_(layer: nn.Conv2d | nn.Linear, generator: torch.Generator | None) -> None:
    """flax's default kernel: variance 1 / fan in, from a normal truncated at two deviations; bias 0."""
    std = layer.weight[0].numel() ** -0.5 / 0.87962566103423978  # the deviation of a unit normal truncated at 2
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
