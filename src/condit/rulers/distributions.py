"""Distances between sets of pictures, from their features: FID, KID, ArtFID."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def kernel_distance(
    generated: Tensor, real: Tensor, *, resamples: int = 200, seed: int = 0
) -> tuple[float, float, float]:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (KID, Binkowski et al. 2018, arXiv:1801.01401)
    of features (N, D) and (M, D), unbiased, so about 0 for the same distribution; with the 2.5 % and 97.5 % points over
    random halves of both, which are a little too wide."""
    if min(len(generated), len(real)) < 4:
        raise ValueError(
            f"A distance needs at least 4 images of each distribution; found {len(generated)} and {len(real)}."
        )

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    within_generated, within_real, across = kernel(generated, generated), kernel(real, real), kernel(generated, real)

    def mean_off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    def estimate(rows: Tensor, columns: Tensor) -> float:
        both = mean_off_diagonal(within_generated[rows][:, rows]) + mean_off_diagonal(within_real[columns][:, columns])
        return float(both - 2 * across[rows][:, columns].mean())

    generator = torch.Generator().manual_seed(seed)
    halves = [
        estimate(*(torch.randperm(len(x), generator=generator)[: len(x) // 2] for x in (generated, real)))
        for _ in range(resamples)
    ]
    low, high = np.percentile(halves, [2.5, 97.5])
    return estimate(torch.arange(len(generated)), torch.arange(len(real))), float(low), float(high)


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """FID (Heusel et al. 2017, arXiv:1706.08500, Eq. 6) of features (N, D) and (M, D) in fp64: |m - w|^2 + Tr(C + D
    - 2 (C D)^1/2). The last trace is the sum of the singular values of the centred features' product, exact without
    the root of a matrix. ValueError for fewer than two pictures of either."""
    if min(len(generated), len(real)) < 2:
        raise ValueError(f"FID needs two pictures of each set at least; found {len(generated)} and {len(real)}.")
    a, b = (x.double() for x in (generated, real))
    means = a.mean(0), b.mean(0)
    a, b = ((x - m) / (len(x) - 1) ** 0.5 for x, m in zip((a, b), means, strict=True))
    spread = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return float((means[0] - means[1]).square().sum() + spread)


def art_fid(lpips: float, fid: float) -> float:
    """ArtFID (Wright & Ommer 2022, arXiv:2207.12280, Eq. 1): (1 + LPIPS to the contents) (1 + FID to the styles)."""
    return (1 + lpips) * (1 + fid)
