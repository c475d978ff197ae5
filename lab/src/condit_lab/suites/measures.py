"""What is measured: pure functions. Pictures are uint8 (N, 3, H, W) on white, results fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 2000
_LUMA = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over n pictures."""

    value: float
    low: float
    high: float
    n: int


def _draws(clusters: Sequence | None, n: int, resamples: int, seed: int) -> tuple[NDArray, NDArray]:
    """How often each resample draws each cluster (R, K), and the cluster number of every picture (n,)."""
    if clusters is not None and len(clusters) != n:
        raise ValueError(f"There are {len(clusters)} clusters for {n} values. Give one for each value.")
    numbers = np.arange(n) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    k = int(numbers.max()) + 1
    weights = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=resamples)
    return weights.astype(np.float64), numbers


def _resampled(values: NDArray, weights: NDArray, numbers: NDArray) -> NDArray:
    """The mean in every resample, (R,)."""
    k = weights.shape[1]
    sums, counts = np.bincount(numbers, values, k), np.bincount(numbers, minlength=k)
    return (weights @ sums) / (weights @ counts)


def _values(values: Sequence | Tensor | NDArray) -> NDArray:
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1 or not row.size or not np.isfinite(row).all():
        raise ValueError(f"A mean needs a row of finite numbers; found shape {row.shape}, {row[:4]}.")
    return row


def bootstrap(
    values: Sequence | Tensor | NDArray,
    clusters: Sequence | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean and percentile interval (Efron 1979). Whole clusters are drawn: pictures of one concept hang together."""
    sample = _values(values)
    means = _resampled(sample, *_draws(clusters, len(sample), resamples, seed))
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(sample.mean()), float(low), float(high), len(sample))


def resample(
    rows: Sequence[Sequence | Tensor | NDArray],
    clusters: Sequence | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> NDArray:
    """Means of several values of the same n pictures, M rows of (n,), in every resample, drawn together: (M, R)."""
    samples = [_values(row) for row in rows]
    if len({len(row) for row in samples}) != 1:
        raise ValueError(
            f"All rows must be of the same images; found rows of {sorted({len(row) for row in samples})} values."
        )
    draws = _draws(clusters, len(samples[0]), resamples, seed)
    return np.stack([_resampled(row, *draws) for row in samples])


def ratio(
    values: Sequence | Tensor | NDArray,
    ceiling: Sequence | Tensor | NDArray,
    clusters: Sequence | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """mean(values) / mean(ceiling) over the same pictures, drawn together. None where the ceiling can be 0."""
    above, below = _values(values), _values(ceiling)
    if len(above) != len(below):
        raise ValueError(f"Values and ceiling must be of the same images; found {len(above)} and {len(below)} values.")
    draws = _draws(clusters, len(above), resamples, seed)
    bases = _resampled(below, *draws)
    if below.mean() == 0 or (bases == 0).any():
        return None
    low, high = np.percentile(_resampled(above, *draws) / bases, [2.5, 97.5])
    return Interval(float(above.mean() / below.mean()), float(low), float(high), len(above))


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


def agreement(said: Tensor, wanted: Tensor) -> Tensor:
    """Whether the judge's style is the wanted one: probabilities (N, S), numbers (N,) -> bool (N,)."""
    return said.argmax(1) == wanted


def concept_ranks(images: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """How many labels are nearer to the picture than the true one: embeddings (N, D), (C, D), numbers (N,) -> (N,).
    Rank 0 is top-1, rank below 5 is top-5. A tie counts against the picture."""
    scores = images.float() @ labels.float().T
    own = scores.gather(1, truth[:, None])
    return (scores >= own).sum(1) - 1


def leaks(images: Tensor, labels: Tensor, prompted: Tensor, references: Tensor) -> Tensor:
    """Whether some reference's own concept is nearer than the prompted one; references (N, R) -> bool (N,)."""
    scores = images.float() @ labels.float().T
    return (scores.gather(1, references) > scores.gather(1, prompted[:, None])).any(1)


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
    a, b = (soft_edges(x, sigma).flatten(1) for x in (images, truth))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-8)


def thumbnails(images: Tensor, side: int = 32) -> Tensor:
    """Mean colours in 0..1 of side x side cells: (N, 3, H, W) -> (N, 3 * side**2)."""
    return F.avg_pool2d(images.float() / 255, images.shape[-1] // side).flatten(1)


def nearest(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """RMS distance to the nearest row of the bank, and its number: (N, D), (M, D) -> (N,), (N,)."""
    indices = torch.cat([torch.cdist(part, bank).argmin(1) for part in queries.split(256)])
    # cdist multiplies matrices and loses the last digits near 0, so the winner's distance is taken again.
    return (queries - bank[indices]).square().mean(1).sqrt(), indices


def luma_psnr(images: Tensor, gray: Tensor) -> Tensor:
    """PSNR in dB of the pictures' luma to a gray picture's: (N, 3, H, W) twice -> (N,), at most 60."""
    error = (luma(images) - luma(gray)).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-6).log10()


def chroma(images: Tensor) -> Tensor:
    """a* and b* of CIELAB (D65): (N, 3, H, W) uint8 -> (N, H, W, 2)."""
    from skimage.color import rgb2lab

    return torch.from_numpy(rgb2lab(images.permute(0, 2, 3, 1).numpy())[..., 1:]).float()


def colour_distance(images: Tensor, truth: Tensor) -> Tensor:
    """Mean distance in the a*, b* plane where the true picture has ink: (N, 3, H, W) twice -> (N,). Lightness is left
    out: a gray picture has that for nothing."""
    ink = (truth.amin(1) < 231).float()  # a tenth below white, as the judge's frame has it
    distance = (chroma(images) - chroma(truth)).norm(dim=-1)
    return (distance * ink).flatten(1).sum(1) / ink.flatten(1).sum(1).clamp(min=1)
