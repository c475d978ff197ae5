"""How a condition may enter the network, beside OminiControl's own way: the ablations of arXiv:2411.15098 in small."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.backbones.mmdit import MMDiT
from condit.controls.control import Control
from condit.controls.omini import keys_values
from condit.controls.omini_tasks import OminiConfig
from condit.nn.attention import Attend, Call
from condit.nn.streams import Stream


@dataclass(frozen=True)
class Variant:
    """what: "tokens" in the sequence; "double", the same in the double blocks only; "add", to the noisy latents, with
    the LoRA on text and image, as there is nothing else to adapt. delta None: as the task has it. strength: of a
    trained one, as a factor on attention."""

    what: Literal["tokens", "double", "add"] = "tokens"
    delta: tuple[float, float] | None = None
    scale: int = 1
    independent: bool = True
    strength: float = 1.0

    def __post_init__(self):
        if self.what not in ("tokens", "double", "add"):
            raise ValueError(f"what must be 'tokens', 'double' or 'add'; found {self.what!r}.")
        if self.what == "double" and not self.independent:
            raise ValueError("'double' shows keys and values of an independent condition to the double blocks.")
        if self.what == "add" and (self.scale != 1 or self.delta is not None or self.strength != 1):
            raise ValueError(
                "'add' adds the condition to the latent of the image. Leave scale, delta and strength out."
            )

    def config(self, config: OminiConfig) -> OminiConfig:
        delta = config.delta if self.delta is None else tuple(self.delta)
        return replace(config, delta=delta, scale=float(self.scale), independent=self.independent)  # type: ignore[arg-type]

    def small(self, images: Tensor) -> Tensor:
        """Pictures at the size of a compact condition."""
        return images if self.scale == 1 else F.avg_pool2d(images, self.scale)

    def entered(self, stream: Stream, backbone: MMDiT) -> tuple[list[Stream], list[Control]]:
        """Streams and controls of a condition that is not added."""
        if self.strength == 0:
            return [], []
        weight = None if self.strength == 1 else torch.tensor(math.log(self.strength))
        if self.what == "double":
            return [], [InDoubleBlocks(keys_values(stream, backbone), weight)]
        return [replace(stream, log_weight=weight)], []


@dataclass(frozen=True)
class InDoubleBlocks(Control):
    """Keys and values of a condition for the main rows of the double blocks alone."""

    memory: dict[str, tuple[Tensor, Tensor]]
    weight: Tensor | None = None

    def around(self, call: Call, attend: Attend) -> Tensor:
        if call.image is None or not call.site.path.startswith("transformer_blocks."):
            return attend(call)
        return attend(call.append_kv(*self.memory[call.site.path], self.weight))


def added(image: Stream, condition: Stream) -> Stream:
    """The noisy image with a condition laid on it: its tokens in the same channels, its LoRA on all tokens."""
    return replace(image, tokens=image.tokens + condition.tokens, lora=condition.lora)
