"""DiffiT in pixels: the U-shape of residual blocks with TMSA (Hatamizadeh et al. 2023, arXiv:2312.02139, section 3.2).

It follows the paper, as there is no official code of it. Attention and blocks are those of `diffit.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.backbones.diffit import TMSA, DiffiTBlock, DiffiTContext, initialise_blocks
from condit.backbones.latent_transformer import TimestepEmbedder
from condit.nn.attention import BlockControl, Site
from condit.nn.layers import dropout, recomputed
from condit.nn.lora import LoRA, name_linears


@dataclass(frozen=True)
class DiffiTImageConfig:
    """The U-shape (section 3.2, Fig. 4). blocks: L_i of each resolution, finest first; widths: channels of each.

    The paper does not specify head_dim, mlp_ratio, time_features, concatenated skips and affine norms.
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


def to_windows(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, M, side^2, C), windows and their pixels row by row."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, Hs, s, Ws, s)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, side: int, height: int) -> Tensor:
    """(B, M, side^2, C) -> (B, C, H, W): the inverse of `to_windows`."""
    x = x.unflatten(2, (side, side)).unflatten(1, (height // side, -1))  # (B, Hs, Ws, s, s, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def noise_features(c_noise: Tensor, dim: int) -> Tensor:
    """EDM's features (B,) -> (B, dim) float32: sine first, frequencies from 1 to 1/10,000 with the end included."""
    omega = 10_000.0 ** (-torch.arange(dim // 2, device=c_noise.device) / (dim // 2 - 1))
    angle = c_noise[:, None].float() * omega
    return torch.cat([angle.sin(), angle.cos()], -1)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """h = Conv3x3(Swish(GN(x))), then DiffiTBlock(h, xt) + x on windows that do not overlap (Eq. 9-10)."""

    def __init__(self, c: DiffiTImageConfig, n_in: int, width: int, site: Site):
        super().__init__()
        self.window = c.window
        self.norm, self.conv = group_norm(n_in), nn.Conv2d(n_in, width, 3, padding=1)
        self.shortcut = nn.Identity() if n_in == width else nn.Conv2d(n_in, width, 1)
        attn = TMSA(width, c.time_dim, width // c.head_dim, (c.window, c.window), site)
        self.block = DiffiTBlock(attn, width, c.mlp_ratio, affine=c.norm_affine)

    def forward(self, x: Tensor, context: DiffiTContext) -> Tensor:
        h = dropout(self.conv(F.silu(self.norm(x))), context.dropout, context.generator)
        h = self.block(to_windows(h, self.window), context)
        return from_windows(h, self.window, x.shape[2]) + self.shortcut(x)


class DiffiTStage(nn.Module):
    """One resolution on one side of the U: a change of resolution (identity at the top), then residual blocks."""

    def __init__(self, c: DiffiTImageConfig, resample: nn.Module, n_in: int, level: int, path: str, index: int):
        super().__init__()
        self.resample = resample
        widths = [n_in, *[c.widths[level]] * c.blocks[level]]
        self.blocks = nn.ModuleList(
            ResBlock(c, before, after, Site(f"{path}.blocks.{i}.block.attn", "self", index + i))
            for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False))
        )

    def forward(
        self, x: Tensor, context: DiffiTContext, skip: Tensor | None = None, *, checkpointing: bool = False
    ) -> Tensor:
        x = self.resample(x)
        if skip is not None:
            x = torch.cat([x, skip], 1)
        for block in self.blocks:
            if checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, context, rate=context.dropout, generator=context.generator)
            else:
                x = block(x, context)
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
        self.t_embedder = TimestepEmbedder(c.time_dim, c.time_features, noise_features)
        self.tokenizer = nn.Conv2d(c.in_channels, c.widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            DiffiTStage(
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
        self.decoder = nn.ModuleList()  # coarse to fine: decoder.0 follows the bottleneck
        for j, i in enumerate(reversed(range(last))):
            below = c.widths[i + 1]
            self.decoder.append(DiffiTStage(c, upsample(below), below + c.widths[i], i, f"decoder.{j}", done))
            done += c.blocks[i]
        self.head = nn.ModuleList([group_norm(c.widths[0]), nn.Conv2d(c.widths[0], c.in_channels, 3, padding=1)])
        name_linears(self)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """The paper specifies none: blocks as in the latent model, torch's for convolutions, zero for the last one."""
        initialise_blocks(self, generator)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(cast("Tensor", module.bias), -bound, bound, generator=generator)
        for parameter in self.head[1].parameters():
            nn.init.zeros_(parameter)

    @property
    def sites(self) -> list[Site]:
        """Every attention layer in the order of execution."""
        return [module.site for module in self.modules() if isinstance(module, TMSA)]

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        lora: LoRA | None = None,
        controls: Sequence[BlockControl] = (),
        generator: torch.Generator | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """(B, 3, H, W), c_noise (B,) = ln(sigma) / 4 -> (B, 3, H, W). `generator`, on the model's device, is for
        dropout in training. checkpointing: in training, keep the blocks' inputs only and compute each block twice."""
        c = self.config
        if x.ndim != 4 or x.shape[1] != c.in_channels or x.shape[2] % c.stride or x.shape[3] % c.stride:
            raise ValueError(
                f"Images (B, {c.in_channels}, H, W) with H and W multiples of {c.stride} are expected (a window of "
                f"{c.window} at the coarsest resolution); found {tuple(x.shape)}."
            )
        rate = c.dropout if self.training else 0.0
        context = DiffiTContext(
            self.t_embedder(c_noise, lora), (c.window, c.window), lora, tuple(controls), rate, generator
        )
        x = self.tokenizer(x)
        skips = []
        for stage in self.encoder:
            x = stage(x, context, checkpointing=checkpointing)
            skips.append(x)
        for stage, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            x = stage(x, context, skip, checkpointing=checkpointing)
        # No swish between norm and convolution: section 3.2 has these two only.
        norm, conv = self.head
        return conv(norm(x))
