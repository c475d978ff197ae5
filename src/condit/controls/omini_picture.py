"""The picture behind a condition: decoded once, encoded at the size at which it is to stand beside a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from condit.controls.control import Fill
from condit.controls.omini_fill import drawn_cells
from condit.controls.omini_tasks import OminiConfig, condition_ids
from condit.data.images import load_image

if TYPE_CHECKING:
    from PIL import Image

    from condit.data.images import ImageSource


@dataclass(frozen=True)
class Encoded:
    """Tokens (n, N, C) of the references, those of a black picture (1, N, C), positions (N, 3); `given`: the picture of
    which only the tokens of known cells are left."""

    tokens: Tensor
    black: Tensor
    ids: Tensor
    given: Fill | None = None


@dataclass(frozen=True)
class Picture:
    """References as decoded, and how they are read. noise: the state of a generator that draws from the autoencoder's
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
    ) -> Picture:
        sources: list[Any] = list(reference) if isinstance(reference, list | tuple) else [reference]
        images = tuple(load_image(source, mode="RGBA") for source in sources)
        return cls(images, config, annotate, None if fill is None else load_image(fill))

    @property
    def follows(self) -> bool:
        """Whether it lies on the drawing, so that it must have its size."""
        return not isinstance(self.config.delta, str) and tuple(self.config.delta) == (0, 0)

    def encoded(self, pipe, size: tuple[int, int], generator: torch.Generator | None = None) -> Encoded:
        """Through a pipeline's autoencoder, as for a drawing of `size` (height, width)."""
        c = self.config
        small = size if c.scale == 1 else compact(size, c.scale, pipe.pixels)
        images = pipe.read_images(list(self.images), c.annotator if self.annotate else None, small)
        tokens, grid = pipe.encode_condition(images, generator)
        # The unconditional pass sees a black picture, encoded like any other (spec of the official image guidance).
        black, _ = pipe.encode_condition(torch.full_like(images[:1], -1.0), generator)
        ids = condition_ids(c, grid)
        if self.fill is None:
            return Encoded(tokens, black, ids)
        given = Fill(tokens, drawn_cells(self.fill, grid, pipe.pixels))
        known = ~given.drawn.flatten()
        return Encoded(tokens[:, known], black[:, known], ids[known], given)

    def drawn_by(self, generator: torch.Generator | None) -> Picture:
        """With the state of a generator as it is before it draws."""
        return self if generator is None else replace(self, noise=(generator.device, generator.get_state()))

    def again(self) -> torch.Generator | None:
        """A generator that draws as the first one did."""
        if self.noise is None:
            return None
        generator = torch.Generator(self.noise[0])
        generator.set_state(self.noise[1])
        return generator


def compact(size: tuple[int, int], scale: float, multiple: int) -> tuple[int, int]:
    """The size of a compact condition (OminiControl2): sides divided by `scale`, multiples of a token, so that
    positions spread by `scale` cover the picture again."""
    height, width = (max(round(side / scale / multiple), 1) * multiple for side in size)
    return height, width
