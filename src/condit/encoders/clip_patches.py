"""CLIP's image tower without its last block: all tokens of an image, for Q-Formers (BLIP-Diffusion, arXiv:2305.14720).

Images are prepared as in DEADiff's released code, with the antialiased resize of kornia 0.6.8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.encoders.clip_model import VisionTower
from condit.encoders.pickling import picklable_state

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class TowerSizes(Protocol):
    """Sizes in the configuration of a CLIP tower; only image towers have image_size and patch_size."""

    hidden_size: int
    projection_dim: int
    num_hidden_layers: int
    image_size: int
    patch_size: int


class ClipPatches(nn.Module):
    """Images -> tokens (B, 1 + patches, width), class token first, after the last but one block, without a norm.

    `tower` is used up to `blocks`, by default all but one; DEADiff's file has no last block. mean, std: of the training
    pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: CLIPVisionModel | VisionTower,
        blocks: int | None = None,
        *,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ):
        super().__init__()
        config = cast("TowerSizes", tower.config)
        self.tower, self.blocks = tower, config.num_hidden_layers - 1 if blocks is None else blocks
        self.size: int = config.image_size
        self.features: int = config.hidden_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    __getstate__ = picklable_state

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], heads: int | None = None) -> ClipPatches:
        """A tower without its last block from tensors in transformers' names, which also give patches and size. heads
        None: heads of width 64."""
        from transformers import CLIPVisionConfig, CLIPVisionModel

        width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
        blocks = len({name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")})
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=blocks,
            num_attention_heads=heads or width // 64,
            patch_size=patch,
            image_size=patch * math.isqrt(len(tensors["embeddings.position_embedding.weight"]) - 1),
        )
        tower = CLIPVisionModel(config)
        # The layers after the last block are never run here, and DEADiff's file does not have them.
        unused = {n: v for n, v in tower.state_dict().items() if n.startswith("post_layernorm.")}
        tower.load_state_dict({n: v.float() for n, v in tensors.items()} | unused, strict=True)
        return cls(tower.eval().requires_grad_(False), blocks)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], of any size."""
        return self.tokens(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> pixels (B, 3, size, size), normalised."""
        images = resize_antialiased((images + 1) / 2, (self.size, self.size))
        return (images - self.mean) / self.std

    def tokens(self, pixels: Tensor) -> Tensor:
        """Prepared pixels -> tokens, in float32."""
        dtype = self.tower.embeddings.patch_embedding.weight.dtype
        states = self.tower(pixels.to(dtype), output_hidden_states=True).hidden_states
        return states[self.blocks].float()


def resize_antialiased(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with aligned corners, (B, C, H, W) -> (B, C, *size). If either side shrinks, a Gaussian is applied first
    along both axes: sigma = (f - 1) / 2 for the factor f of an axis, an odd width of about 4 sigma, reflected borders.

    This is kornia 0.6.8's `resize(..., antialias=True)`; torch's antialias gives other numbers.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    factors = [before / after for before, after in zip(images.shape[-2:], size, strict=True)]
    if max(factors) > 1:
        for axis, factor in zip((-2, -1), factors, strict=True):
            images = _blur(images, max((factor - 1) / 2, 0.001), axis)
    return F.interpolate(images, size=size, mode="bicubic", align_corners=True)


def _blur(images: Tensor, sigma: float, axis: int) -> Tensor:
    """A Gaussian along one axis."""
    width = int(max(4 * sigma, 3)) | 1  # odd
    x = torch.arange(width, dtype=images.dtype, device=images.device) - width // 2
    kernel = (-(x**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum())[:, None] if axis == -2 else (kernel / kernel.sum())[None]
    margin = (0, 0, width // 2, width // 2) if axis == -2 else (width // 2, width // 2, 0, 0)
    channels = images.shape[1]
    padded = F.pad(images, margin, mode="reflect")
    return F.conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)
