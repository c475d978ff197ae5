"""Rulers that need no network: edges, colours. Pictures are uint8 (N, 3, H, W), results fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = torch.tensor([0.299, 0.587, 0.114])


def luma(images: Tensor) -> Tensor:
    """ITU-R 601 luma in 0..1: (N, 3, H, W) uint8 -> (N, H, W)."""
    return torch.einsum("c,nchw->nhw", _LUMA, images.float() / 255)


def soft_edges(images: Tensor, sigma: float = 2.0) -> Tensor:
    """The largest Sobel gradient over the channels, blurred by a Gaussian of sigma pixels: -> (N, H, W)."""
    n, c, h, w = images.shape
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    kernels = torch.stack([across, across.T])[:, None]
    planes = F.pad(images.float().reshape(n * c, 1, h, w) / 255, (1, 1, 1, 1), mode="replicate")
    strength = F.conv2d(planes, kernels).norm(dim=1).view(n, c, h, w).amax(1, keepdim=True)
    reach = round(3 * sigma)
    bell = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    bell = bell / bell.sum()
    strength = F.conv2d(strength, bell.view(1, 1, -1, 1), padding=(reach, 0))
    return F.conv2d(strength, bell.view(1, 1, 1, -1), padding=(0, reach))[:, 0]


def edge_similarity(images: Tensor, truth: Tensor, sigma: float = 2.0) -> Tensor:
    """Pearson's correlation of two pictures' soft edges: 1 = the same lines, 0 = unrelated; a blank picture has 0.
    (N, 3, H, W) twice -> (N,). The blur forgives about sigma pixels of displacement."""
    a, b = (edge_feature(x, sigma) for x in (images, truth))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-8)


def edge_feature(images: Tensor, sigma: float = 2.0) -> Tensor:
    """Soft edges less their mean, flat: the cosine of two is `edge_similarity`. (N, 3, H, W) -> (N, H W)."""
    edges = soft_edges(images, sigma).flatten(1)
    return edges - edges.mean(1, keepdim=True)
