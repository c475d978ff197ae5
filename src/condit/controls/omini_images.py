"""The images of OminiControl's conditions: decoded once, encoded at the size of a call; and their
known cells (token integration of OminiControl2, arXiv:2503.08280)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from condit.controls.control import Fill
from condit.controls.host import Host
from condit.controls.omini_tasks import OminiConfig, condition_ids
from condit.data.images import load_image

if TYPE_CHECKING:
    from condit.data.images import ImageSource


@dataclass(frozen=True)
class Encoded:
    """Tokens (n, N, C) of the references, those of a black image (1, N, C), positions (N, 3); `whole`: the whole
    image, if the tokens are those of its known cells."""

    tokens: Tensor
    black: Tensor
    ids: Tensor
    whole: Fill | None = None


@dataclass(frozen=True)
class Originals:
    """Decoded references and how they are encoded. noise: the state of a generator for samples of the autoencoder's
    posterior, the same for every size; None: its mode."""

    images: tuple[Image.Image, ...]
    config: OminiConfig
    annotate: bool
    fill: Image.Image | None = None
    noise: tuple[torch.device, Tensor] | None = None

    @classmethod
    def of(
        cls,
        reference: ImageSource | Sequence[ImageSource],
        config: OminiConfig,
        *,
        annotate: bool,
        fill: ImageSource | None = None,
    ) -> Originals:
        sources = reference if isinstance(reference, list | tuple) else [reference]
        images = tuple(load_image(cast("ImageSource", source), mode="RGBA") for source in sources)
        return cls(images, config, annotate, None if fill is None else load_image(fill))

    @property
    def follows(self) -> bool:
        """Whether it is aligned with the generated image, so that it needs the same size."""
        return not isinstance(self.config.delta, str) and tuple(self.config.delta) == (0, 0)

    def encoded(self, pipe: Host, size: tuple[int, int]) -> Encoded:
        """Encoded by a pipeline's autoencoder for an image of `size` (height, width)."""
        c, generator = self.config, self.generator()
        small = size if c.scale == 1 else compact(size, c.scale, pipe.pixels)
        images = pipe.read_images(list(self.images), c.annotator if self.annotate else None, small)
        tokens, grid = pipe.encode_condition(images, generator)
        # The unconditional pass sees a black image, as in the official image guidance.
        black, _ = pipe.encode_condition(torch.full_like(images[:1], -1.0), generator)
        ids = condition_ids(c, grid)
        if self.fill is None:
            return Encoded(tokens, black, ids)
        whole = Fill(tokens, generated_cells(self.fill, grid, pipe.pixels))
        known = ~whole.generated.flatten()
        return Encoded(tokens[:, known], black[:, known], ids[known], whole)

    def sampled_by(self, generator: torch.Generator) -> Originals:
        """With the state that a generator has now."""
        return replace(self, noise=(generator.device, generator.get_state()))

    def generator(self) -> torch.Generator | None:
        """A generator in that state."""
        if self.noise is None:
            return None
        generator = torch.Generator(self.noise[0])
        generator.set_state(self.noise[1])
        return generator


def compact(size: tuple[int, int], scale: float, multiple: int) -> tuple[int, int]:
    """The size of a compact condition (OminiControl2): sides divided by `scale`, multiples of a token, so that
    positions spread by `scale` cover the image again."""
    height, width = (max(round(side / scale / multiple), 1) * multiple for side in size)
    return height, width


# Token integration: the noisy branch holds the cells to generate, the condition those that are known, both at their
# true positions: together as many tokens as the image has. Masks are (rows, columns) of tokens, True = generated.


def generated_cells(mask: ImageSource, grid: tuple[int, int], pixels: int) -> Tensor:
    """The cells (rows, columns) to generate: those with a white pixel. A mask may have one pixel for each cell.
    Raises ValueError unless it has both kinds.
    """
    size = grid[1] * pixels, grid[0] * pixels
    white = np.asarray(load_image(mask).convert("L").resize(size, Image.Resampling.NEAREST)) > 127
    cells = torch.from_numpy(white).unflatten(1, (grid[1], pixels)).unflatten(0, (grid[0], pixels)).any(3).any(1)
    if cells.all() or not cells.any():
        raise ValueError(
            f"The mask has white in {'every cell' if cells.all() else 'no cell'} of the {grid[0]} x {grid[1]}. White "
            "is generated, black is kept: the mask needs both."
        )
    return cells


def hide(image: ImageSource, mask: ImageSource) -> Image.Image:
    """The image, black where the mask is white: the condition of the published fill adapter, which generates the whole
    image. The mask is resized to the image."""
    shown = load_image(image)
    hidden = load_image(mask).convert("L").resize(shown.size, Image.Resampling.NEAREST)
    hidden = hidden.point([255 * (value > 127) for value in range(256)])
    return Image.composite(Image.new("RGB", shown.size), shown, hidden)


def sample_generated_cells(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A training mask: a random rectangle of cells, or in half of the cases its complement; never all cells or none.

    The official trainer may choose the whole grid, which leaves no noisy token and gives a loss of NaN.
    """
    if grid[0] * grid[1] < 2:
        raise ValueError(f"A grid of {grid[0]} x {grid[1]} is too small to keep one cell and generate another.")
    while True:
        (top, bottom), (left, right) = (torch.randint(n, (2,), generator=generator).sort()[0].tolist() for n in grid)
        cells = torch.zeros(grid, dtype=torch.bool)
        cells[top : bottom + 1, left : right + 1] = True
        if not cells.all():
            break
    return ~cells if bool(torch.rand((), generator=generator) < 0.5) else cells
