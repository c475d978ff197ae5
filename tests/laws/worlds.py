"""A random MM-DiT with its adapters, and the table of controls that the laws go through."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condit.controls.control import Control
from condit.controls.ip_adapter import IPAdapter
from condit.controls.omini import OminiControl
from condit.controls.reference_pass import Passed
from condit.controls.stylealigned import StyleAligned
from condit.controls.styleid import StyleID
from condit.drawing.pipeline import Pipeline

PROMPTS = ["a fox", "a rocket", "snow", "an apple"]


@dataclass(frozen=True)
class Untrained:
    """A control without an adapter, made as adapters make theirs."""

    kind: type[Passed]

    def control(self, reference, **how) -> Control:
        return self.kind(reference, **how)


@dataclass(frozen=True)
class World:
    pipe: Pipeline
    ip: IPAdapter
    joint: OminiControl
    cached: OminiControl
    filling: OminiControl
    filling_cached: OminiControl
    aligned: Untrained = Untrained(StyleAligned)
    injected: Untrained = Untrained(StyleID)

    def controls(self, name: str, references, **how) -> list[Control]:
        return [getattr(self, part).control(references, **how) for part in (TABLE | UNTRAINED)[name]]

    def draw(self, controls: Sequence[Control] = (), prompts: str | list[str] = "a fox", **how) -> Tensor:
        given = {"seed": 0, "output_type": "latent", **how}
        return self.pipe(prompts, controls=controls, **given).images

    @property
    def modules(self) -> list[nn.Module]:
        return [self.pipe.backbone, self.pipe.parts.vae, self.ip, self.joint, self.cached]


TABLE = {
    "ip": ("ip",),
    "omini_joint": ("joint",),
    "omini_cached": ("cached",),
    "all": ("ip", "joint", "cached"),
}
# Their strengths end at 1 or their references are not encoded by an adapter: the laws about images only.
UNTRAINED = {"aligned": ("aligned",), "injected": ("injected",)}
every_adapter = pytest.mark.parametrize("name", TABLE)
every_control = pytest.mark.parametrize("name", TABLE | UNTRAINED)


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


LEFT_HALF = np.zeros((32, 48), np.uint8)
LEFT_HALF[:, :24] = 255
