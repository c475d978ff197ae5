"""Guidance: combinations of the predictions with and without conditions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), Eq. 6: u + s (c - u)."""
    return unconditional + scale * (conditional - unconditional)


def guide_text_image(both: Tensor, text: Tensor, none: Tensor, text_scale: float, image_scale: float) -> Tensor:
    """Two scales: none + s_T (text - none) + s_I (both - text).

    Brooks et al. 2022 (arXiv:2211.09800), section 3.2, with the text first. Equal scales give `guide(both, none)`.
    """
    return none + text_scale * (text - none) + image_scale * (both - text)


def rescale(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """The guided prediction with, by `share`, the deviation of the conditional one, against washed-out images (Lin et
    al. 2023, arXiv:2305.08891, section 3.4; the paper has 0.7)."""
    dims = list(range(1, guided.ndim))
    factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return share * guided * factor + (1 - share) * guided


def power_cosine_scale(t: Tensor, scale: float, *, power: float = 4.0, steps: int = 1000) -> Tensor:
    """DiffiT's scale per timestep (arXiv:2312.02139, section 5.8): s_t = 1 + (s - 1) (1 - cos(pi (1 - t/T)^power)) / 2.

    Nearly 1 where there is much noise, `scale` at t = 0. t: timesteps of the trained process (T = steps), not the
    sampler's index. As released: `class_guidance(..., partial(power_cosine_scale, scale=4.4))` at 256 px, a constant
    1.49 at 512 px.
    """
    phase = math.pi * (1 - t.float() / steps) ** power
    return 1 + (scale - 1) * (1 - phase.cos()) / 2


def guide_channels(conditional: Tensor, unconditional: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    """`guide` on the first `channels` of (B, C, H, W); the others stay the conditional ones. scale: (B, 1, 1, 1)."""
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([guided, conditional[:, channels:]], 1)


def class_guidance(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_label: int,
    scale: float | Callable[[Tensor], Tensor],
    *,
    channels: int | None = 3,
) -> Callable[[Tensor, Tensor], Tensor]:
    """denoise(x, t) from network(x, t, y): classes `labels` (B,) against the null class, in one doubled batch.

    Guides `channels` of the latent's channels, None: all; the variance stays that of the class. Three of four is an
    accident of the official code on which the published figures depend: scale 1 + s on three does what 1 + 0.75 s does
    on four (arXiv:2212.09748, appendix A). scale: a number, or of the timesteps, (B,) -> (B,), as DiffiT's.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1:
            return network(x, t, labels)
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, null_label)]))
        conditional, unconditional = both.chunk(2)
        s = scale(t).reshape(-1, *[1] * (x.ndim - 1)) if callable(scale) else scale
        return guide_channels(conditional, unconditional, s, min(channels or x.shape[1], x.shape[1]))

    return denoise
