"""Controls made of other controls: a base class that forwards every act, and wrappers for any paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from condit.controls.control import Act, Control, Fill, PromptPair, Run
from condit.diffusion.steps import Step
from condit.nn.attention import Attend, Call, Reduction, Site, reduction
from condit.nn.attention import attend as run_controls
from condit.nn.lora import LowRank, sum_loras
from condit.nn.streams import Stream

if TYPE_CHECKING:
    from condit.controls.host import Host


@dataclass(frozen=True)
class Wrapper(Control):
    """A control made of another one, or of a tuple of them that act as one; the first wraps the attention outermost.

    Every method forwards to the inner controls. A subclass overrides what it changes, and `acts` if it adds an act.
    """

    inner: Control | tuple[Control, ...]

    @property
    def inside(self) -> tuple[Control, ...]:
        """The inner controls."""
        return self.inner if isinstance(self.inner, tuple) else (self.inner,)

    def holding(self, inside: Iterable[Control | None]) -> Self | None:
        """The same wrapper around other inner controls, without those that are None. None if none remain."""
        left = tuple(control for control in inside if control is not None)
        if not left:
            return None
        return replace(self, inner=left if isinstance(self.inner, tuple) else left[0])

    @property
    def acts(self) -> frozenset[Act]:
        return frozenset().union(*(control.acts for control in self.inside))

    def sized(self, size: tuple[int, int], pipe: Host) -> Control:
        return self.holding(control.sized(size, pipe) for control in self.inside) or self

    def prepare(self, run: Run) -> Control:
        return self.holding(control.prepare(run) for control in self.inside) or self

    def at(self, step: Step) -> Control | None:
        return self.holding(control.at(step) for control in self.inside)

    def around(self, call: Call, attend: Attend) -> Tensor:
        return run_controls(call, self.inside, attend)

    def streams(self) -> tuple[Stream, ...]:
        return tuple(stream for control in self.inside for stream in control.streams())

    def fill(self) -> Fill | None:
        fills = [fill for fill in (control.fill() for control in self.inside) if fill is not None]
        if len(fills) > 1:
            raise ValueError(f"{len(fills)} controls fill a part of the image; at most one can.")
        return fills[0] if fills else None

    def lora(self) -> LowRank | None:
        return sum_loras(control.lora() for control in self.inside)

    def text_lora(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {name: update for control in self.inside for name, update in control.text_lora().items()}

    def leak(self) -> LowRank | None:
        return sum_loras(control.leak() for control in self.inside)

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        total = None
        for control in self.inside:
            addition = control.residual(site, query)
            if addition is not None:
                total = addition if total is None else total + addition
        return total

    def merging(self, site: Site, tokens: Tensor, image: slice) -> Reduction | None:
        return reduction(site, tokens, image, self.inside)

    def region(self) -> Tensor | None:
        regions = [region for region in (control.region() for control in self.inside) if region is not None]
        return torch.stack(torch.broadcast_tensors(*regions)).prod(0) if regions else None

    def edit(self, pair: PromptPair, backbone: nn.Module) -> Control:
        return self.holding(control.edit(pair, backbone) for control in self.inside) or self

    def differs(self) -> bool:
        return any(control.differs() for control in self.inside)

    def recording(self) -> Control | None:
        recording = [control.recording() for control in self.inside]
        if not any(recording):
            return None
        return self.holding(other or control for other, control in zip(recording, self.inside, strict=True))

    def records(self) -> dict[str, Tensor]:
        return {name: record for control in self.inside for name, record in control.records().items()}

    def negative(self) -> Control | None:
        return self.holding(control.negative() for control in self.inside)

    def describe(self) -> dict:
        inner = [control.describe() for control in self.inside]
        return {"method": type(self).__name__, "inner": inner if isinstance(self.inner, tuple) else inner[0]}


def unwrapped(control: Control) -> Iterable[Control]:
    """A control and, if it is a wrapper, all controls in it."""
    yield control
    for inner in control.inside if isinstance(control, Wrapper) else ():
        yield from unwrapped(inner)


@dataclass(frozen=True)
class Together(Wrapper):
    """References of one adapter as one control: their additions are summed in order."""

    inner: tuple[Control, ...]

    def around(self, call: Call, attend: Attend) -> Tensor:
        for control in self.inner:
            attend = partial(control.around, attend=attend)
        return attend(call)

    def describe(self) -> dict:
        parts = [control.describe() for control in self.inner]
        return {**parts[0], "together": parts}


# An edit: a batch of source 0, target 0, source 1, ...


@dataclass(frozen=True)
class Targets(Wrapper):
    """The inner control on the odd rows of an edit's batch, its targets; the sources are unchanged.

    Raises ValueError for controls that would also change the sources: conditions in the sequence, style LoRAs.
    """

    inner: Control

    def prepare(self, run: Run) -> Control:
        inner = self.inner.prepare(run)
        name = type(inner).__name__
        if inner.streams():
            raise ValueError(
                f"{name} joins the sequence, so it would act on the source of an edit too. Use an adapter that was "
                "trained independently, or control(..., cached='independent')."
            )
        if "adapt" in inner.acts or inner.fill() is not None:
            raise ValueError(f"{name} changes source and target alike, so it cannot be used in an edit.")
        return replace(self, inner=inner)

    def around(self, call: Call, attend: Attend) -> Tensor:
        plain, first = attend(call), call

        def again(call: Call) -> Tensor:
            return plain if call is first else attend(call)  # a side branch repeats the same call

        return only_targets(plain, self.inner.around(call, again))

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        addition = self.inner.residual(site, query)
        return None if addition is None else only_targets(torch.zeros_like(addition), addition)

    def describe(self) -> dict:
        return self.inner.describe()


def only_targets(plain: Tensor, acted: Tensor) -> Tensor:
    """Even rows of the first, odd rows of the second."""
    return torch.stack([plain[0::2], acted[1::2]], 1).flatten(0, 1)


# The sides of guidance in one batch


@dataclass(frozen=True)
class Sides(Wrapper):
    """A batch of parts of rows, in order: each inner control acts on its own part only. counts: the rows of each part;
    () for equal parts.

    Raises ValueError for acts that cannot differ between rows: a LoRA applies to the whole batch, and merging changes
    its tokens.
    """

    inner: tuple[Control, ...]
    counts: tuple[int, ...] = ()

    def __post_init__(self):
        shared = self.acts & {"join", "omit", "adapt", "merge"}
        if shared:
            raise ValueError(f"Controls that {', '.join(sorted(shared))} need a batch of one side of guidance.")

    def holding(self, inside: Iterable[Control | None]) -> Self:
        return replace(self, inner=tuple(Wrapper(()) if control is None else control for control in inside))

    def around(self, call: Call, attend: Attend) -> Tensor:
        calls = zip(self.inner, self.parts(len(call.q)), strict=True)
        return torch.cat([control.around(rows(call, part), attend) for control, part in calls])

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        queries = zip(self.inner, self.parts(len(query)), strict=True)
        return self.stacked([control.residual(site, query[part]) for control, part in queries], 0.0)

    def region(self) -> Tensor | None:
        return self.stacked([control.region() for control in self.inner], 1.0)

    def parts(self, batch: int) -> list[slice]:
        """The rows of each inner control."""
        counts = self.counts or (batch // len(self.inner),) * len(self.inner)
        ends = list(accumulate(counts))
        return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def stacked(self, parts: Sequence[Tensor | None], neutral: float) -> Tensor | None:
        """The parts of a batch as one; those that are None are filled with `neutral`. None if all are."""
        one = next((part for part in parts if part is not None), None)
        if one is None:
            return None
        counts = self.counts or (len(one),) * len(parts)
        sized = zip(parts, counts, strict=True)
        return torch.cat([one.new_full((n, *one.shape[1:]), neutral) if part is None else part for part, n in sized])


def rows(call: Call, index: slice) -> Call:
    """The call of some rows of the batch."""

    def of(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) == 1 else x[index]

    q, k, v = call.q[index], call.k[index], call.v[index]
    return replace(call, q=q, k=k, v=v, bias=of(call.bias), plain=of(call.plain))


def sides(parts: Sequence[Sequence[Control]], counts: Sequence[int] = ()) -> list[Control]:
    """The controls of a batch of parts, of `counts` rows or equal ones; [] if no part has one. Neighbours without
    controls become one part."""
    if not any(parts):
        return []
    inner: list[Control] = []
    sizes: list[int] = []
    for part, count in zip(parts, counts or [1] * len(parts), strict=True):
        if counts and sizes and not part and not inner[-1].acts:
            sizes[-1] += count
        else:
            inner.append(Wrapper(tuple(part)))
            sizes.append(count)
    return [Sides(tuple(inner), tuple(sizes) if counts else ())]
