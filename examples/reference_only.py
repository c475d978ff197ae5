"""Reference-only attention, a control in one file: the image attends to the keys and values that its reference has in a
pass of its own ("reference_only" of sd-webui-controlnet, 2023). Nothing is trained; it works on every backbone.

    condit generate "a house" --control ./examples/reference_only.py:ReferenceOnly=key.png:0.8
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from condit.controls.control import Control, Run, Step, When, match_batch
from condit.data.images import ImageSource
from condit.nn.attention import Attend, Call

Memory = dict[str, tuple[Tensor, Tensor]]  # keys and values (B, H, N, D) by the path of their layer


@dataclass(frozen=True)
class Recorder(Control):
    """Keeps the keys and values of the image in every layer where it attends to itself."""

    memory: Memory

    def around(self, call: Call, attend: Attend) -> Tensor:
        if call.image is not None and call.site.kind != "cross":
            columns = slice(0, call.k.shape[2]) if call.keys is None else call.keys
            self.memory[call.site.path] = call.k[:, :, columns], call.v[:, :, columns]
        return attend(call)


@dataclass(frozen=True)
class ReferenceOnly(Control):
    """reference: one image, or one for each prompt. strength: the weight of its keys in the softmax, 0 is none."""

    reference: ImageSource | list[ImageSource]
    strength: float = 1.0
    when: When = field(default_factory=When)
    seed: int = 0  # of the noise that is added to the reference
    # Of a run:
    latents: Tensor | None = None
    noise: Tensor | None = None
    run: Run | None = None
    # Of a step:
    memory: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    log_weight: Tensor | None = None

    def sized(self, size: tuple[int, int], pipe) -> ReferenceOnly:
        images = pipe.read_images(self.reference, None, size)
        return replace(self, latents=pipe.encode_images(images))

    def prepare(self, run: Run) -> ReferenceOnly:
        if self.latents is None or run.cells is not None:
            raise ValueError("ReferenceOnly acts in a pipeline call, on whole images.")
        latents = match_batch(self.latents, run.batch, "reference")
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(self.seed)).to(latents)
        return replace(self, latents=latents, noise=noise.expand_as(latents), run=run)

    def at(self, step: Step) -> ReferenceOnly | None:
        strength = self.strength * self.when.factor(step)
        if strength <= 0:
            return None
        assert self.run is not None and self.run.apart is not None
        assert self.latents is not None and self.noise is not None
        memory: Memory = {}
        self.run.apart(self.latents, self.noise, step, [Recorder(memory)])
        weight = torch.full((), strength, device=self.latents.device)
        return replace(self, memory=memory, log_weight=weight.log())

    def around(self, call: Call, attend: Attend) -> Tensor:
        if call.image is None or call.image.start == call.image.stop or call.site.path not in self.memory:
            return attend(call)
        keys, values = self.memory[call.site.path]
        return attend(call.append_kv(keys, values, self.log_weight))

    def describe(self) -> dict:
        return {"method": "ReferenceOnly", "strength": self.strength, "seed": self.seed}
