"""What is measured: pure functions. Pictures are uint8 (N, 3, H, W) on white, results fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.rulers.pixels import luma


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
