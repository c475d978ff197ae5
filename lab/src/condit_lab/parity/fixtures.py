"""Comparisons of a system with all its fixtures, and their report: lines for a terminal, a table for a page."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from condit.data.files import atomic_write
from condit_lab.parity.check import Check, CheckResult


@dataclass(frozen=True)
class System:
    """A paper's comparisons. module: the file of this package that holds them, imported when it is needed."""

    title: str
    module: str
    folder: str

    @cached_property
    def checks(self) -> tuple[Check, ...]:
        return importlib.import_module(f"condit_lab.parity.{self.module}").CHECKS

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Patterns of files that comparisons read and that record no result: weights, settings."""
        return importlib.import_module(f"condit_lab.parity.{self.module}").INPUTS


SYSTEMS = {
    "vit": System("ViT", "vit", "vit"),
    "dit": System("DiT", "dit", "dit"),
    "diffit": System("DiffiT", "diffit", "diffit"),
    "omini": System("OminiControl", "omini", "ominicontrol"),
    "ip-adapter": System("IP-Adapter", "ip_adapter", "ip_adapter"),
    "instantstyle": System("InstantStyle", "instantstyle", "instantstyle"),
    "deadiff": System("DEADiff", "deadiff", "deadiff"),
    "dit4edit": System("DiT4Edit", "dit4edit", "dit4edit"),
}
_MARKS = "<!-- verify -->\n", "<!-- /verify -->\n"
_HEADER = "| system | what | against | fixtures | values | tolerance | measured |\n|---|---|---|---|---|---|---|\n"


def find_golden(folder: Path | None = None) -> Path:
    """The folder of the fixtures, with one folder for each system: `folder`, or tests/parity/golden of the checkout
    that contains this package. Raises FileNotFoundError without it: an installed package has no fixtures."""
    if folder is None:
        above = (parent / "tests" / "parity" / "golden" for parent in Path(__file__).resolve().parents)
        golden = next((candidate for candidate in above if candidate.is_dir()), None)
        if golden is None:
            raise FileNotFoundError(
                "There are no fixtures: they are in tests/parity/golden of condit's source, which an installed package "
                "does not contain. Run this in a checkout, or pass that folder with --golden."
            )
        return golden
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder} with fixtures. Pass tests/parity/golden of a checkout with --golden."
        )
    return folder


def verify_fixtures(system: str, golden: Path) -> list[CheckResult]:
    """Compares a system with everything that its fixtures record, in float32 on the CPU.

    Kinds of fixtures that the folder lacks have no row. Raises ValueError for files that no check compares.
    """
    folder, checks = golden / SYSTEMS[system].folder, SYSTEMS[system].checks
    if not folder.is_dir():
        raise FileNotFoundError(f"There are no fixtures of {system!r}: {golden} has no folder {folder.name}.")
    present = [check for check in checks if check.cases(folder)]
    if not present:
        raise FileNotFoundError(f"There are no fixtures of {system!r}: {folder} has none of {kinds(system)}.")
    if names := unknown(system, folder):
        raise ValueError(f"{folder}: no check compares {', '.join(names)}; expected {kinds(system)}.")
    return [check.run(folder) for check in present]


def kinds(system: str) -> str:
    """The patterns of a system's fixtures, for error messages."""
    return ", ".join(dict.fromkeys(pattern for check in SYSTEMS[system].checks for pattern in check.files.split()))


def unknown(system: str, folder: Path) -> list[str]:
    """Names of the fixtures in a system's folder that no check compares or reads."""
    files = {file.stem for file in folder.iterdir() if file.suffix in (".safetensors", ".npz", ".json")}
    patterns = [pattern for check in SYSTEMS[system].checks for pattern in check.files.split()]
    compared = {file.stem for pattern in patterns for file in folder.glob(pattern)}
    read = {name for name in files if any(fnmatch(name, pattern) for pattern in SYSTEMS[system].inputs)}
    return sorted(files - compared - read)


def round_up(value: float) -> str:
    """Two digits, never less than the value: 2.31e-6 -> 2.4e-6."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return _short(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.1e}")


def _tolerance(tolerance: float) -> str:
    return _short(f"{tolerance:.0e}") if tolerance else "0"


def _short(number: str) -> str:
    """1.0e-05 -> 1.0e-5."""
    return number.replace("e-0", "e-").replace("e+0", "e+")


def lines(rows: Sequence[tuple[str, CheckResult]]) -> list[str]:
    """(system, row) of each check as aligned text; a failed check lists everything that exceeds its tolerance."""
    table = [("system", "what", "against", "measured", "tolerance", "")]
    for system, row in rows:
        state = "ok" if row.ok else "TOO LARGE"
        table.append((system, row.what, row.against, round_up(row.measured), _tolerance(row.tolerance), state))
    widths = [max(len(cells[column]) for cells in table) for column in range(6)]
    out = []
    for number, cells in enumerate(table):
        out.append("  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip())
        if number and not rows[number - 1][1].ok:
            out += [f"    {text}" for text in rows[number - 1][1].exceeding()]
    return out


def markdown(rows: Mapping[str, Iterable[CheckResult]]) -> str:
    """The table of docs/parity.md, rows of each system."""
    return _HEADER + "".join(
        f"| {SYSTEMS[system].title} | {row.what} | {row.against} | {len(row.cases)} | {row.values} | "
        f"{_tolerance(row.tolerance) if row.tolerance else 'equal'} | "
        f"{round_up(row.measured) if row.measured or row.tolerance else 'equal'} |\n"
        for system, checked in rows.items()
        for row in checked
    )


def write_between_marks(page: Path, table: str) -> Path:
    """Writes the table between the marks `<!-- verify -->`. Raises ValueError if the page has none."""
    text = page.read_text(encoding="utf-8")
    before, opened, rest = text.partition(_MARKS[0])
    _, closed, after = rest.partition(_MARKS[1])
    if not opened or not closed:
        raise ValueError(f"{page} has no place for the table: expected lines <!-- verify --> and <!-- /verify -->.")
    text = before + opened + table + closed + after
    return atomic_write(page, lambda target: target.write_text(text, encoding="utf-8"))


def as_json(row: CheckResult) -> dict[str, object]:
    """The row with every difference. Infinity and NaN are strings, as JSON has no numbers for them."""

    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    return {
        "what": row.what,
        "against": row.against,
        "tolerance": row.tolerance,
        "measured": number(row.measured),
        "worst": row.worst,
        "ok": row.ok,
        "cases": {
            case: {name: number(x) for name, x in differences.items()} for case, differences in row.cases.items()
        },
    }
