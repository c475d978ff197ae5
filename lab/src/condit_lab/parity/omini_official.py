"""Image guidance of OminiControl as the official code computes it, to reproduce its images; not the default.

In its pass without the condition no mask separates branches: black conditions attend to text, image and one another.
Its cache keeps their keys and values of step 0, which depend on noise. By default condit masks both passes alike
(Pipeline, `image_guidance_scale`); with one joint condition both are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from condit.controls.control import Control, Run, Step, When, match_batch
from condit.controls.host import Host
from condit.controls.omini import OminiControl, OminiReference, condition_stream
from condit.controls.wrap import Wrapper
from condit.nn.attention import Attend, Call
from condit.nn.streams import Stream


def official_guidance(controls: Sequence[OminiReference]) -> list[Control]:
    """The same conditions, of which the first brings the official unconditional pass of all of them.

    They must be all conditions of the call, as keys of other joint controls cannot be distinguished from theirs.
    """
    for control in controls:
        if control.when != When() or control.strength != 1 or control.mask is not None:
            raise ValueError(
                "The official image guidance supports neither strength, schedule nor mask. Leave them out."
            )
    if len({control.alone and control.cached for control in controls}) != 1:
        raise ValueError("The official code caches all conditions of a call, or none. Use one kind.")
    black = tuple(control.negative() for control in controls)
    return [WithBlack(control, black if i == 0 else ()) for i, control in enumerate(controls)]


@dataclass(frozen=True)
class WithBlack(Wrapper):
    """A condition whose unconditional side is `black`, seen without a mask."""

    inner: Control
    black: tuple[OminiReference, ...]

    def sized(self, size: tuple[int, int], pipe: Host) -> Control:
        return replace(self, inner=self.inner.sized(size, pipe), black=tuple(b.sized(size, pipe) for b in self.black))

    def negative(self) -> Control | None:
        black = tuple(Black(b.adapter, b.tokens, b.ids) for b in self.black)
        return Unmasked(black, self.black[0].alone and self.black[0].cached) if black else None

    def describe(self) -> dict:
        return {**self.inner.describe(), "image_guidance": "official"}


class Black(NamedTuple):
    """A condition of the unconditional side."""

    adapter: OminiControl
    tokens: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Unmasked(Control):
    """Conditions that see every stream. `memory` is filled in step 0 and read in the others, if they are cached."""

    conditions: tuple[Black, ...]
    cached: bool
    joined: tuple[Stream, ...] = ()
    memory: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    first: bool = False

    def prepare(self, run: Run) -> Unmasked:
        joined = tuple(
            condition_stream(c.adapter, match_batch(c.tokens, run.batch, "OminiControl"), c.ids, run, sees="all")
            for c in self.conditions
        )
        return replace(self, joined=joined, memory={})

    def at(self, step: Step) -> Unmasked:
        return replace(self, first=step.index == 0)

    def streams(self) -> tuple[Stream, ...]:
        return self.joined if self.first or not self.cached else ()

    def around(self, call: Call, attend: Attend) -> Tensor:
        if not self.cached or call.image is None:
            return attend(call)
        if not self.first:
            return attend(call.append_kv(*self.memory[call.site.path]))
        # The keys of text and image, then of the conditions.
        begin, count = call.q.shape[2], sum(s.tokens.shape[1] for s in self.joined)
        part = slice(begin, begin + count)
        self.memory[call.site.path] = call.k[:, :, part], call.v[:, :, part]
        return attend(call)
