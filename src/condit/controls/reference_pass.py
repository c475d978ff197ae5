"""Controls that run the network on their reference: its image's queries, keys and values in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn

from condit.controls.control import Control, Run, When, Where, finite, match_batch
from condit.controls.host import Host
from condit.data.images import ImageSource
from condit.diffusion.inversion import EditPath, NoisePath, alpha_sigma
from condit.diffusion.samplers import FlowPath
from condit.diffusion.steps import Step
from condit.encoders.text import Text
from condit.nn.attention import Attend, Call

# Queries, keys and values (B, H, N, D) of the image by the path of their layer.
Memory = dict[str, tuple[Tensor, Tensor, Tensor]]


@runtime_checkable
class Trajectory(Protocol):
    """`pipe.invert`'s trajectory to noise: latents (S + 1, n, ...), the noisiest first; size in pixels."""

    @property
    def trajectory(self) -> Tensor: ...
    @property
    def path(self) -> EditPath: ...
    @property
    def size(self) -> tuple[int, int]: ...


Source = ImageSource | Sequence[ImageSource] | Trajectory


def image_places(call: Call) -> tuple[slice, slice] | None:
    """Rows of q and columns of k that are the noisy image's, where it attends to itself; None in other calls."""
    if call.site.kind == "cross" or call.image is None or call.image.start == call.image.stop:
        return None
    # A UNet's image attends to itself alone; keys behind its own are those that other controls have appended.
    return call.image, slice(0, call.q.shape[2]) if call.keys is None else call.keys


def at_places(x: Tensor, places: slice, changed: Tensor) -> Tensor:
    """x (B, H, N, D) with `changed` at some of its tokens."""
    return torch.cat([x[:, :, : places.start], changed, x[:, :, places.stop :]], 2)


@dataclass(frozen=True)
class Recorder(Control):
    """Keeps queries, keys and values of the image in the layers `where` it attends to itself."""

    memory: Memory
    where: Where

    def around(self, call: Call, attend: Attend) -> Tensor:
        places = image_places(call)
        if places is not None and call.site in self.where:
            rows, columns = places
            self.memory[call.site.path] = call.q[:, :, rows], call.k[:, :, columns], call.v[:, :, columns]
        return attend(call)


@dataclass(frozen=True)
class ReferencePass:
    """The clean latents (B, ...) of a reference in a run, and its words; None: those of the generated image. An
    inversion's own latents are read at each step; others are noised, by the noise of `seed`."""

    run: Run
    latents: Tensor
    text: Text | None
    inversion: Trajectory | None
    seed: int

    def record(self, step: Step, where: Where) -> Memory:
        """The layers `where`, at the noise level of a step."""
        assert self.run.apart is not None
        memory: Memory = {}
        self.run.apart(self.latents, self.noise(step), step, [Recorder(memory, where)], self.text)
        return memory

    def noise(self, step: Step) -> Tensor:
        """Of an inversion it is (z_t - alpha_t z_0) / sigma_t at the level nearest to the step, so that the network
        reads z_t itself where the steps of both are the same."""
        if self.inversion is None:
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randn(self.latents.shape[1:], generator=generator).to(self.latents).expand_as(self.latents)
        path = cast("FlowPath | NoisePath", self.inversion.path)
        level = min(range(path.steps), key=lambda i: abs(path.step(i).t - step.t))
        if isinstance(path, FlowPath):
            alpha, sigma = 1 - path.sigmas[level], path.sigmas[level]
        else:
            alpha, sigma = alpha_sigma(path.ratio(level))
        z = match_batch(self.inversion.trajectory[level], len(self.latents), "reference").to(self.latents)
        return (z - alpha * self.latents) / sigma


@dataclass(frozen=True)
class Passed(Control):
    """A control that runs the network on its reference at each step, on every model with prompts.

    reference: an image, one for each prompt, or an inversion of them (`pipe.invert`). strength: 0 is off. prompt: the
    words of the reference; None: those of the image. where: the layers; None: `layers`. seed: of the noise on a
    reference that is not inverted.
    """

    reference: Source
    strength: float = 1.0
    prompt: str | None = ""
    when: When | tuple[float, float] | None = None
    where: Where | str | tuple[str, ...] | None = None
    seed: int = 0
    # Of a call, of a run and of a step:
    latents: Tensor | None = None
    text: Text | None = None
    passed: ReferencePass | None = None
    memory: Memory = field(default_factory=dict)
    weight: Tensor | None = None  # 0-d

    def __post_init__(self):
        if finite("strength", self.strength) < 0:
            raise ValueError(f"{type(self).__name__}'s strength must be at least 0; found {self.strength}.")
        When.of(self.when)

    def layers(self, backbone: nn.Module) -> Where:
        """The layers of the paper."""
        return Where()

    def sized(self, size: tuple[int, int], pipe: Host) -> Self:
        text = None if self.prompt is None else pipe.encode_text([self.prompt])
        return replace(self, latents=encode(self.reference, size, pipe), text=text)

    def prepare(self, run: Run) -> Self:
        where = self.layers(run.backbone) if self.where is None else Where.of(self.where)
        return replace(self, passed=self.make_pass(run, self.reference, self.latents, self.text), where=where)

    def make_pass(self, run: Run, source: Source, latents: Tensor | None, text: Text | None) -> ReferencePass:
        if latents is None or run.cells is not None or run.apart is None:
            raise ValueError(f"{type(self).__name__} acts in a pipeline call of a model with prompts, on whole images.")
        text = None if text is None else text.each(lambda x: match_batch(x, run.batch, "prompt"))
        inversion = source if isinstance(source, Trajectory) else None
        return ReferencePass(run, match_batch(latents, run.batch, "reference"), text, inversion, self.seed)

    def at(self, step: Step) -> Self | None:
        strength = self.strength * When.of(self.when).factor(step)
        if strength <= 0:
            return None
        assert self.passed is not None
        weight = torch.full((), strength, device=self.passed.latents.device)
        return replace(self, memory=self.passed.record(step, Where.of(self.where)), weight=weight)

    def negative(self) -> Self:
        """Both sides of the guidance attend to the reference; in the other one it has that side's words."""
        return replace(self, text=None)

    def describe(self) -> dict:
        when = When.of(self.when)
        return {
            "method": type(self).__name__,
            "strength": self.strength,
            "when": [when.start, when.end],
            "prompt": self.prompt,
            "seed": self.seed,
        }


def encode(source: Source, size: tuple[int, int], pipe: Host) -> Tensor:
    """The clean latents of a reference. Raises ValueError for an inversion of another size."""
    if not isinstance(source, Trajectory):
        return pipe.encode_images(pipe.read_images(cast("ImageSource | Sequence[ImageSource]", source), None, size))
    if source.size != size:
        raise ValueError(
            f"The inversion has {source.size[0]} x {source.size[1]} pixels, this call generates {size[0]} x {size[1]}. "
            "Invert the image at the size of the call."
        )
    return source.trajectory[-1]
