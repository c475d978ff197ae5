"""What can be measured on a raster: its colours by name, whether it is see-through or shaded, and a descriptor by which
near-duplicates are found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MIN_INK = 40  # pixels with alpha above 1/8: fewer is a blank drawing
GRID = 16  # side of the descriptor

# Name (English, Chinese) and reference colours. The nearest one in a luma-chroma space names a pixel.
COLOURS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("black", "黑色", ("000000", "1c1c1e", "2b2b33")),
    ("dark gray", "深灰色", ("4a4a4a", "5c5c66")),
    ("gray", "灰色", ("808080", "999999", "8a8f98")),
    ("light gray", "浅灰色", ("c4c4c4", "d8d8dc", "b9c0c8")),
    ("white", "白色", ("ffffff", "f3f4f6")),
    ("red", "红色", ("e02020", "d81b1b", "f44336", "b71c1c")),
    ("pink", "粉色", ("ff80b0", "f9a8c8", "ffb6c1", "e85a9b")),
    ("orange", "橙色", ("ff8c00", "f57c1f", "ff7043")),
    ("yellow", "黄色", ("ffd600", "ffcc33", "fdee6b")),
    ("beige", "米色", ("f5deb3", "f3d9b8", "e8d0a9", "fde2c4")),
    ("brown", "棕色", ("8b5a2b", "6d4c41", "a5673f", "5d3a1a")),
    ("green", "绿色", ("2e9e3f", "43a047", "1b7a2f", "5cb85c")),
    ("light green", "浅绿色", ("a5d86a", "b7e4a0", "8bd450")),
    ("teal", "青色", ("009688", "26a69a", "2bb5a8")),
    ("light blue", "浅蓝色", ("8ec9f5", "a8d8ff", "bfe3ff", "7fc4ea")),
    ("blue", "蓝色", ("1e6fe0", "2f88ff", "1565c0", "3b82f6")),
    ("dark blue", "深蓝色", ("10285c", "1a237e", "22356f")),
    ("purple", "紫色", ("7b2fbf", "9b59d0", "6a1b9a", "a77be0")),
)
_SHARE = 0.12  # of the visible pixels: fewer do not name a colour
_MAX_COLOURS = 3


@dataclass(frozen=True)
class PixelMeasures:
    """colours: indices into COLOURS, the largest area first. translucent: a good part of the ink is neither opaque nor
    an edge. shaded: many tones within a colour (gradient, shadow)."""

    colours: tuple[int, ...]
    translucent: bool
    shaded: bool
    ink: float


def _opponent(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Square-root RGB as luma and two chroma axes, chroma weighted twice: hue names a colour more than light does."""
    root = np.sqrt(rgb / 255)
    luma = root @ np.array([0.3, 0.6, 0.1], np.float32)
    red, green, blue = root[..., 0], root[..., 1], root[..., 2]
    axes = [luma, 2 * (red - green), 2 * (0.5 * (red + green) - blue)]
    return np.asarray(np.stack(axes, -1), np.float32)


def _name_table() -> NDArray[np.uint8]:
    """The nearest colour of every RGB with 5 bits a channel, (32768,)."""
    codes = [(index, code) for index, (_, _, codes) in enumerate(COLOURS) for code in codes]
    references = _opponent(np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for _, code in codes], np.float32))
    level = np.arange(32, dtype=np.float32) * 255 / 31
    cube = _opponent(np.stack(np.meshgrid(level, level, level, indexing="ij"), -1, dtype=np.float32).reshape(-1, 3))
    distance = ((cube[:, None] - references[None]) ** 2).sum(-1)
    return np.array([index for index, _ in codes], np.uint8)[distance.argmin(1)]


_NAMES = _name_table()


def measure(rgba: NDArray[np.uint8]) -> PixelMeasures | None:
    """Measures of a raster (128, 128, 4); None for a blank one."""
    alpha = rgba[..., 3]
    if np.count_nonzero(alpha > 32) < MIN_INK:
        return None
    small = rgba[::2, ::2]
    seen = small[small[..., 3] > 96]
    if len(seen) < 8:
        seen = rgba[alpha > 32]
    packed = (seen[:, :3].astype(np.int32) >> 3) @ np.array([1024, 32, 1], np.int32)
    counts = np.bincount(_NAMES[packed], minlength=len(COLOURS)) / len(packed)
    order = sorted(range(len(COLOURS)), key=lambda index: (-counts[index], index))
    colours = tuple(index for index in order[:_MAX_COLOURS] if counts[index] >= _SHARE) or (order[0],)
    tones = len(np.unique(packed))
    return PixelMeasures(colours, _translucent(alpha), tones > 60, float((alpha > 96).mean()))


def descriptor(rgba: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Shape and tones of the drawing, (512,): alpha and luma on white, cropped to the ink, scaled to 16 x 16 each, mean
    0 and length 1 together. Margins and small changes of size do not move it. The product of two descriptors is near
    1 when the drawings look the same."""
    alpha = rgba[..., 3].astype(np.float32)
    rows, columns = np.flatnonzero((alpha > 16).any(1)), np.flatnonzero((alpha > 16).any(0))
    if not len(rows):
        return np.zeros(2 * GRID * GRID, np.float32)
    dark = alpha
    if rgba[..., :3].any():
        dark = alpha * (1 - rgba[..., :3].astype(np.float32) @ np.array([0.3, 0.6, 0.1], np.float32) / 255)
    halves = []
    for plane in (alpha, dark):
        box = plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        side = max(box.shape)
        square = np.zeros((side, side), np.float32)
        top, left = (side - box.shape[0]) // 2, (side - box.shape[1]) // 2
        square[top : top + box.shape[0], left : left + box.shape[1]] = box
        grid = np.asarray(Image.fromarray(square).resize((GRID, GRID), Image.Resampling.BOX), np.float32).ravel()
        grid = grid - grid.mean()
        halves.append(grid / max(float(np.linalg.norm(grid)), 1e-6))
    return np.concatenate(halves) / np.sqrt(np.float32(2))


def _translucent(alpha: NDArray[np.uint8]) -> bool:
    """Half-transparent pixels whose four neighbours have nearly the same alpha: areas, not edges."""
    level = alpha.astype(np.int16)
    inner = level[1:-1, 1:-1]
    flat = np.ones(inner.shape, bool)
    for neighbour in (level[:-2, 1:-1], level[2:, 1:-1], level[1:-1, :-2], level[1:-1, 2:]):
        flat &= np.abs(neighbour - inner) < 6
    area = flat & (inner > 24) & (inner < 232)
    return bool(area.sum() > 0.08 * (inner > 24).sum())
