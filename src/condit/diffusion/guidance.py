"""Guidance: how the predictions with and without conditions are combined."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), Eq. 6: u + s (c - u)."""
    return unconditional + scale * (conditional - unconditional)


def guide_text_image(both: Tensor, text: Tensor, none: Tensor, text_scale: float, image_scale: float) -> Tensor:
    """Two scales: none + s_T (text - none) + s_I (both - text).

    Brooks et al. 2022 (arXiv:2211.09800), section 3.2, with the text first. Equal scales give `guide(both, none)`.
    """
    return none + text_scale * (text - none) + image_scale * (both - text)
