"""How far two drawings have the same lines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def edge_f1(found: Tensor, given: Tensor, tolerance: int = 2) -> Tensor:
    """F1 of edge pixels, bool (N, H, W) twice -> (N,): precision = found pixels with a given one within `tolerance`
    pixels (Euclidean), recall = the other way round. Two empty maps agree."""
    grown_given, grown_found = _grow(given, tolerance), _grow(found, tolerance)
    precision = (found & grown_given).flatten(1).sum(1) / found.flatten(1).sum(1).clamp(min=1)
    recall = (given & grown_found).flatten(1).sum(1) / given.flatten(1).sum(1).clamp(min=1)
    both_empty = ~found.flatten(1).any(1) & ~given.flatten(1).any(1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-8)
    return torch.where(both_empty, torch.ones_like(f1), f1)


def _grow(lines: Tensor, radius: int) -> Tensor:
    offsets = torch.arange(-radius, radius + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).float()[None, None]
    return F.conv2d(lines[:, None].float(), disk, padding=radius)[:, 0] > 0
