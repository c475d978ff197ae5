"""What a `Pipeline` is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from condit.backbones.mmdit import MMDiT
from condit.diffusion.schedules import DynamicShift


@dataclass(frozen=True)
class Parts:
    """A model's parts and defaults. shift: of the noise levels, a number, or None for one that grows with the image
    (`dynamic`). eta: of the sampler. image: an image encoder or None."""

    name: str
    hash: str
    backbone: MMDiT
    text: Callable
    vae: Any
    image: Any
    prediction: str
    shift: float | None
    size: tuple[int, int]
    steps: int
    guidance: float
    distilled: bool  # guidance is an input of the model (FLUX.1-dev) or absent (schnell), not two predictions
    dynamic: DynamicShift = DynamicShift()
    eta: float = 0.0

    def shift_of(self, tokens: int) -> float:
        """The shift for an image of so many noisy tokens."""
        return self.dynamic(tokens) if self.shift is None else self.shift
