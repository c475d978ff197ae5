"""A 3D look of our own that no set has: flat silhouettes blown up like balloons of glossy plastic."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from condit.data.files import hash_fraction
from condit_lab.icons.world import SIZE

STYLE = "inflated"
SHAPES = "ph-fill"  # the style whose silhouettes are blown up
_LIGHT = np.array([-0.45, -0.65, 0.62], np.float32)
_RADII = (1.5, 3.0, 6.0, 12.0)


def inflate(rgba: NDArray[np.uint8], key: str) -> NDArray[np.uint8]:
    """The silhouette of a raster as a shaded solid; the colour depends on key alone."""
    side = 2 * SIZE
    mask = Image.fromarray(rgba[..., 3]).resize((side, side), Image.Resampling.BICUBIC)
    alpha = np.asarray(mask, np.float32) / 255
    # Blurs of several widths rise steeply at the edge and flatten towards the middle, as a balloon does.
    height = sum(np.asarray(mask.filter(ImageFilter.GaussianBlur(2 * radius)), np.float32) / 255 for radius in _RADII)
    height = np.sqrt(np.clip(height / len(_RADII) - 0.35, 0, None) / 0.65) * 26 * alpha
    height = _smooth(_smooth(np.asarray(height, np.float32)).T).T
    slope_y, slope_x = np.gradient(height)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(height)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    light = _LIGHT / np.linalg.norm(_LIGHT)
    diffuse = np.clip(normal @ light, 0, 1)
    half = light + np.array([0, 0, 1], np.float32)
    gloss = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 40
    hue = hash_fraction(f"inflated/{key}")
    base = np.array(colorsys.hls_to_rgb(hue, 0.56, 0.72), np.float32)
    dark = np.array(colorsys.hls_to_rgb((hue + 0.05) % 1, 0.26, 0.65), np.float32)
    tone = np.clip(0.15 + 0.95 * diffuse, 0, 1)[..., None]
    colour = np.clip(dark + (base - dark) * tone + 0.75 * gloss[..., None], 0, 1)
    out = np.concatenate([colour, alpha[..., None]], -1)
    small = Image.fromarray((out * 255 + 0.5).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BOX)
    result = np.array(small)
    result[result[..., 3] == 0] = 0
    return result


def _smooth(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weighted mean of nine neighbours along the last axis; Pillow blurs no floats."""
    weights = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1], np.float32) / 256
    padded = np.pad(plane, ((0, 0), (4, 4)), mode="edge")
    shifted = [weight * padded[:, at : at + plane.shape[1]] for at, weight in enumerate(weights)]
    return np.asarray(np.sum(shifted, axis=0, dtype=np.float32), np.float32)
