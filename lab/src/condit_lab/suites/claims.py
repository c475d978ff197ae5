"""docs/claims.md: for each claim of a paper what it says, what was measured here, n, interval and command.

A page has places `<!-- claims:NAME -->` ... `<!-- /claims -->`; `--claims PAGE` of `condit evaluate classes` and of
`condit evaluate style` fills those that a run has measured. A place that no run has filled says "not run yet".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from condit.rulers.statistics import Interval
from condit_lab.suites.pages import fill_file

KIND = "claims"
_COLUMNS = "| what | value | 95 % interval | n |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Claim:
    """paper: what it says, and where. command: what measures it here."""

    paper: str
    command: str


@dataclass(frozen=True)
class Measured:
    """One figure; without an interval (low None) it is a count."""

    what: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    digits: int = 3

    @classmethod
    def of(cls, what: str, interval: Interval | Mapping, digits: int = 3) -> Measured:
        fields = interval if isinstance(interval, Mapping) else vars(interval)
        return cls(what, fields["value"], fields["low"], fields["high"], fields["n"], digits)

    def line(self) -> str:
        def number(x: float) -> str:
            return f"{x:,.{self.digits}f}"

        interval = "" if self.low is None or self.high is None else f"{number(self.low)} to {number(self.high)}"
        return f"| {self.what} | {number(self.value)} | {interval} | {'' if self.n is None else f'{self.n:,}'} |"


def block(claim: Claim, measured: Sequence[Measured] = (), *, note: str = "", command: str = "") -> str:
    """The text of one place. note: a sentence on how it was measured; command: the one that was run."""
    head = f"**The paper.** {claim.paper}\n\n"
    if not measured:
        return f"{head}**Measured.** Not run yet. `{claim.command}` would fill this.\n"
    rows = "\n".join(figure.line() for figure in measured)
    return f"{head}**Measured** by `{command or claim.command}`. {note}".rstrip() + f"\n\n{_COLUMNS}{rows}\n"


def write(page: Path, texts: Mapping[str, str]) -> Path:
    """Puts the claims that were measured into their places; ValueError if the page has none for one of them."""
    return fill_file(page, KIND, texts)
