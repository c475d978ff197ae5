"""Agreement of the lines of two images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def edge_f1(lines: Tensor, reference: Tensor, tolerance: int = 2) -> Tensor:
    """F1 of edge pixels, bool (N, H, W) twice -> (N,). Precision is the share of `lines` within `tolerance` pixels
    (Euclidean) of the reference, recall that of the reference within `tolerance` of `lines`. Two empty maps give 1."""
    near_reference, near_lines = _grow(reference, tolerance), _grow(lines, tolerance)
    precision = (lines & near_reference).flatten(1).sum(1) / lines.flatten(1).sum(1).clamp(min=1)
    recall = (reference & near_lines).flatten(1).sum(1) / reference.flatten(1).sum(1).clamp(min=1)
    both_empty = ~lines.flatten(1).any(1) & ~reference.flatten(1).any(1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-8)
    return torch.where(both_empty, torch.ones_like(f1), f1)


def _grow(lines: Tensor, radius: int) -> Tensor:
    offsets = torch.arange(-radius, radius + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).float()[None, None]
    return F.conv2d(lines[:, None].float(), disk, padding=radius)[:, 0] > 0
