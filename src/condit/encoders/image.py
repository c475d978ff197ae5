"""Image encoders behind one call: images -> a feature for image prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.encoders.clip import embed_image, style_statistics

if TYPE_CHECKING:
    from transformers import CLIPModel


class TinyImage(nn.Module):
    """The embedded CLIP's image tower: its embedding (256) beside the statistics of two middle layers (768)."""

    features = 256 + 768
    embedding = slice(0, 256)  # the part that shares a space with the text tower
    gain = 11.3  # of that part: its two halves of unit length become entries of about unit variance

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        self.size = clip.config.vision_config.image_size

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, 1024)."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        hidden, embedding = embed_image(self.clip, images.clamp(-1, 1))
        return torch.cat([embedding.float() * self.gain, style_statistics(hidden)], -1)
