"""The sides of guidance in one batch: each part of the rows has controls of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condit.controls.control import Control
from condit.nn import attention
from condit.nn.attention import Attend, Call


@dataclass(frozen=True)
class Sides(Control):
    """A batch of len(parts) equal parts of rows, in order. The controls of a part see its rows only.

    For controls that wrap attention. They are at their step already (`Control.at`).
    """

    parts: tuple[tuple[Control, ...], ...]

    def around(self, call: Call, attend: Attend) -> Tensor:
        if not any(self.parts):
            return attend(call)
        n = len(call.q) // len(self.parts)
        calls = [rows(call, slice(i * n, (i + 1) * n)) for i in range(len(self.parts))]
        return torch.cat([attention.attend(part, c) for part, c in zip(calls, self.parts, strict=True)])


def rows(call: Call, index: slice) -> Call:
    """The call of some rows of the batch."""

    def of(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) == 1 else x[index]

    q, k, v = call.q[index], call.k[index], call.v[index]
    return replace(call, q=q, k=k, v=v, bias=of(call.bias), plain=of(call.plain))


def sides(parts: Sequence[Sequence[Control]]) -> list[Control]:
    """The controls of a batch of parts, none where no part has one."""
    return [Sides(tuple(tuple(part) for part in parts))] if any(parts) else []
