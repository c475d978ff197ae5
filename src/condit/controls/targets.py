"""In an edit, a control that acts on the targets and leaves the sources as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condit.controls.control import Control, Run, Step
from condit.nn.attention import Attend, Call, Site


@dataclass(frozen=True)
class Targets(Control):
    """`inner` on the odd rows of a batch source 0, target 0, source 1, ...: a style reference beside an edit, say.

    ValueError for controls that cannot be kept from the sources: conditions that join the sequence, style LoRAs.
    """

    inner: Control

    def prepare(self, run: Run) -> Targets:
        inner = self.inner.prepare(run)
        name = type(inner).__name__
        if inner.streams():
            raise ValueError(
                f"{name} joins the sequence, so it would act on the source of an edit too. Use an adapter that was "
                "trained independently, or control(..., cached='independent')."
            )
        if inner.lora() is not None or inner.fill() is not None:
            raise ValueError(f"{name} changes source and target alike, so it cannot stand beside an edit.")
        return replace(self, inner=inner)

    def at(self, step: Step) -> Targets | None:
        inner = self.inner.at(step)
        return None if inner is None else replace(self, inner=inner)

    def around(self, call: Call, attend: Attend) -> Tensor:
        plain, asked = attend(call), call

        def again(call: Call) -> Tensor:
            return plain if call is asked else attend(call)  # a side branch asks for the same call once more

        return only_targets(plain, self.inner.around(call, again))

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        addition = self.inner.residual(site, query)
        return None if addition is None else only_targets(torch.zeros_like(addition), addition)

    def negative(self) -> Targets | None:
        inner = self.inner.negative()
        return None if inner is None else replace(self, inner=inner)

    def describe(self) -> dict:
        return self.inner.describe()


def only_targets(plain: Tensor, acted: Tensor) -> Tensor:
    """Even rows of the first, odd rows of the second."""
    return torch.stack([plain[0::2], acted[1::2]], 1).flatten(0, 1)
