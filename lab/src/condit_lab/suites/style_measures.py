"""What says whether a style transfer worked: pure functions, and the comparison with a baseline's curve.

Features are rows (N, D) of N pictures, results fp32 or bool (N,). Which feature measures what:
docs/papers/style-evaluation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 3


@dataclass(frozen=True)
class Scale:
    """Features brought to zero mean and unit deviation over real icons, then to unit length: a product is a cosine."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, real: Tensor) -> Scale:
        return cls(real.mean(0), real.std(0).clamp(min=1e-6))

    def __call__(self, features: Tensor) -> Tensor:
        return F.normalize((features - self.mean) / self.deviation, dim=-1)


def retrieved(pictures: Tensor, references: Tensor, styles: Sequence[str]) -> Tensor:
    """Whether a picture is nearer to its own reference than to every reference of another style: unit features (N, D)
    twice, the style of each reference -> bool (N,). References of its own style are left out: they are as right."""
    other = torch.tensor([[a != b for b in styles] for a in styles])
    scores = pictures @ references.T
    nearest = scores.masked_fill(~other, -torch.inf).amax(1)
    return scores.diagonal() > nearest


def retrieval_chance(styles: Sequence[str]) -> float:
    """The share that `retrieved` finds by chance: 1 / (references of other styles + its own), averaged."""
    return float(np.mean([1 / (1 + sum(other != own for other in styles)) for own in styles]))


def cosines(pictures: Tensor, texts: Tensor) -> Tensor:
    """Of each picture with its own text, (N, D) twice -> (N,)."""
    return F.cosine_similarity(pictures.float(), texts.float(), dim=-1)


def above_others(pictures: Tensor, texts: Tensor, numbers: Tensor) -> Tensor:
    """The cosine with a picture's own text less its mean cosine with the others' texts, those of another number; with
    none of them, less nothing. (N, D) twice, (N,) -> (N,)."""
    scores = F.normalize(pictures.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    other = (numbers[:, None] != numbers[None]).float()
    return scores.diagonal() - (scores * other).sum(1) / other.sum(1).clamp(min=1)


def reach(bank: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """How far each real picture reaches: the distance to its k-th neighbour in the bank, (M, D) -> (M,)."""
    if len(bank) <= neighbours:
        raise ValueError(f"A manifold needs more than {neighbours} real icons; found {len(bank)}.")
    # The nearest of all is the picture itself.
    return torch.cat([torch.cdist(p, bank).topk(neighbours + 1, largest=False)[0][:, -1] for p in bank.split(256)])


def realistic(pictures: Tensor, bank: Tensor, reaches: Tensor) -> Tensor:
    """Whether a picture lies in the manifold of real ones: within reach of some real picture. Its mean is the improved
    precision of Kynkäänniemi et al. 2019 (arXiv:1904.06991). (N, D), (M, D), (M,) -> bool (N,)."""
    return torch.cat([(torch.cdist(part, bank) <= reaches).any(1) for part in pictures.split(256)])
