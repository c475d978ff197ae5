"""What rulers do with features: pure functions, one row a picture. Comparisons take (N, ...) twice and return (N,).

`rulers.encoders` makes the features, so that each picture is encoded once for all rulers. The constants of an equation
are in the features where that makes the comparison a plain distance. rulers.toml says which ruler compares what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Compare = Callable[[Tensor, Tensor], Tensor]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a, b): CSD (Somepalli et al. 2024, Eq. 5), CLIP-I, CLIP-T, DINO, SS, leakage."""
    return F.cosine_similarity(a, b, dim=-1)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2: Gram distance, LPIPS, CAS and structure distance, whose constants are in the features."""
    return (a - b).square().flatten(1).sum(1)


def norms(a: Tensor, b: Tensor) -> Tensor:
    """sum_l |a_l - b_l|: the style loss of AdaIN (Huang & Belongie 2017, Eq. 13) of rows of statistics (N, L, D)."""
    return (a - b).norm(dim=-1).sum(-1)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """sum_i min(a_i, b_i): histogram intersection (Swain & Ballard 1991, Eq. 1) of histograms that sum to 1."""
    return torch.minimum(a, b).sum(-1)


def earth_mover(a: Tensor, b: Tensor) -> Tensor:
    """Earth mover's distance (Rubner et al. 2000) of palettes (N, K, 3) whose colours weigh the same: the mean distance
    under the best assignment, in the palette's unit (CIELAB: delta E of 1976)."""
    from scipy.optimize import linear_sum_assignment

    costs = torch.cdist(a.double(), b.double()).numpy()
    best = [cost[linear_sum_assignment(cost)].mean() for cost in costs]
    return torch.tensor(best, dtype=torch.float64)


COMPARE: Mapping[str, Compare] = {
    "cosine": cosine,
    "squared": squared,
    "norms": norms,
    "intersection": intersection,
    "earth_mover": earth_mover,
}


# Features of maps (B, C, H, W)


def gram(maps: Sequence[Tensor]) -> Tensor:
    """Gram matrices of layers, so that `squared` is sum_l 1 / (4 N_l^2 M_l^2) sum_ij (G_ij - A_ij)^2 (Gatys et al.
    2016, Eq. 3 to 5, each layer weighing 1): the upper triangles (B, D), what is off the diagonal times sqrt(2)."""
    rows = []
    for x in maps:
        flat = x.flatten(2)
        product = flat @ flat.mT / (2 * flat.shape[1] * flat.shape[2])
        i, j = torch.triu_indices(flat.shape[1], flat.shape[1]).unbind()
        rows.append(product[:, i, j] * torch.where(i == j, 1.0, 2**0.5))
    return torch.cat(rows, 1)


def moments(maps: Sequence[Tensor]) -> Tensor:
    """Mean and deviation of each channel, a row for either of each layer, padded with zeros: (B, 2 L, D)."""
    widest = max(x.shape[1] for x in maps)
    rows = [y for x in maps for y in (x.flatten(2).mean(2), x.flatten(2).std(2))]
    return torch.stack([F.pad(row, (0, widest - row.shape[1])) for row in rows], 1)


def aligned(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Maps without their style, which is each channel's mean and deviation, for CAS (Xing et al. 2024, CSGO): `squared`
    is the mean square difference of Ada(phi(C)) and Ada(phi(T)), Ada(x) = (x - mu) / sigma. -> (B, D)."""
    flat = x.flatten(2)
    flat = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, keepdim=True, correction=0) + eps).sqrt()
    return flat.flatten(1) / flat[0].numel() ** 0.5


def self_similarity(keys: Tensor) -> Tensor:
    """Cosines of all pairs of patches' keys (B, T, D) (Tumanyan et al. 2022, Eq. 2), so that `squared` is their mean
    square difference, the structure distance: the upper triangles (B, T (T + 1) / 2)."""
    unit = F.normalize(keys, dim=-1)
    i, j = torch.triu_indices(keys.shape[1], keys.shape[1]).unbind()
    return (unit @ unit.mT)[:, i, j] * torch.where(i == j, 1.0, 2**0.5) / keys.shape[1]


def perceptual(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Unit maps times sqrt(w_l / (H_l W_l)), so that `squared` is LPIPS (Zhang et al. 2018, Eq. 1): (B, D). weights:
    (C_l,) each; negative ones, which published files do not have, count as 0."""
    rows = []
    for x, w in zip(maps, weights, strict=True):
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        rows.append((unit * (w.clamp(min=0) / x[0, 0].numel()).sqrt().view(1, -1, 1, 1)).flatten(1))
    return torch.cat(rows, 1)


# Features of pixels (H, W, 3) uint8


def colour_histogram(pixels: np.ndarray, bins: int = 8) -> Tensor:
    """The joint histogram of R, G and B, (bins^3,), which sums to 1."""
    index = (pixels.reshape(-1, 3).astype(np.int64) * bins) // 256 @ np.array([bins * bins, bins, 1])
    return torch.from_numpy(np.bincount(index, minlength=bins**3) / len(index)).float()


def palette(pixels: np.ndarray, halvings: int = 3) -> Tensor:
    """2^halvings mean colours in CIELAB of equally many pixels each (Heckbert's median cut): every part is halved at
    the median of its widest axis. (K, 3)."""
    from skimage.color import rgb2lab

    parts = [rgb2lab(pixels).reshape(-1, 3)]
    for _ in range(halvings):
        halves = []
        for part in parts:
            order = np.argsort(part[:, np.ptp(part, axis=0).argmax()], kind="stable")
            halves += [part[half] for half in np.array_split(order, 2)]
        parts = halves
    return torch.from_numpy(np.stack([part.mean(0) for part in parts])).float()
