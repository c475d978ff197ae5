"""Token integration of OminiControl2 (arXiv:2503.08280): a picture of which only some cells are drawn.

The noisy branch holds the cells to draw, the condition those that are known, both at their true positions: together as
many tokens as the picture has, not twice as many. Masks here are (rows, columns) on the token grid, True = drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from condit.data.images import load_image

if TYPE_CHECKING:
    from condit.data.images import ImageSource


def drawn_cells(mask: ImageSource, grid: tuple[int, int], pixels: int) -> Tensor:
    """Which cells (rows, columns) are drawn: those with a white pixel, for a cell is known whole or not at all.

    A mask of one pixel a cell is taken as it is. ValueError if nothing is drawn, or nothing known.
    """
    size = grid[1] * pixels, grid[0] * pixels
    white = np.asarray(load_image(mask).convert("L").resize(size, Image.Resampling.NEAREST)) > 127
    drawn = torch.from_numpy(white).unflatten(1, (grid[1], pixels)).unflatten(0, (grid[0], pixels)).any(3).any(1)
    if drawn.all() or not drawn.any():
        raise ValueError(
            f"The mask draws {'every cell' if drawn.all() else 'no cell'} of the {grid[0]} x {grid[1]}. White is "
            "drawn, black is kept; there must be both."
        )
    return drawn


def hide(image: ImageSource, mask: ImageSource) -> Image.Image:
    """The picture with the white part of the mask black: the condition of the published fill adapter, which draws the
    whole picture anew. Image and mask are put together at the picture's size."""
    picture = load_image(image)
    hidden = load_image(mask).convert("L").resize(picture.size, Image.Resampling.NEAREST)
    hidden = hidden.point([255 * (value > 127) for value in range(256)])
    return Image.composite(Image.new("RGB", picture.size), picture, hidden)


def from_official_mask(mask: Tensor) -> Tensor:
    """The official inference's mask of the condition (columns, rows), True = known -> drawn cells (rows, columns).

    Its `generate` and `Condition` transpose a mask before they flatten it; its trainer does not.
    """
    return ~mask.bool().mT


def sample_drawn_cells(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A training mask: a random rectangle of cells, in half of the cases all but it. Never all cells and never none.

    The official trainer lets a rectangle over the whole grid pass, which leaves no noisy token: a loss of NaN.
    """
    if grid[0] * grid[1] < 2:
        raise ValueError(f"A grid of {grid[0]} x {grid[1]} has no cell to keep beside one to draw.")
    while True:
        (top, bottom), (left, right) = (torch.randint(n, (2,), generator=generator).sort()[0].tolist() for n in grid)
        drawn = torch.zeros(grid, dtype=torch.bool)
        drawn[top : bottom + 1, left : right + 1] = True
        if not drawn.all():
            break
    return ~drawn if bool(torch.rand((), generator=generator) < 0.5) else drawn
