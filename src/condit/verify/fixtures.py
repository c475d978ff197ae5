"""All fixtures of a backbone against its code, and the report of it: lines for a terminal, a table for a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from condit.data.files import atomic_write
from condit.verify import diffit, dit, vit
from condit.verify.check import Check, Row

CHECKS: dict[str, tuple[Check, ...]] = {"vit": vit.CHECKS, "dit": dit.CHECKS, "diffit": diffit.CHECKS}
TITLES = {"vit": "ViT", "dit": "DiT", "diffit": "DiffiT"}
_MARKS = "<!-- verify -->\n", "<!-- /verify -->\n"
_HEADER = "| model | what | against | cases | asked | found |\n|---|---|---|---|---|---|\n"


def find_golden(given: Path | None = None) -> Path:
    """The folder of the fixtures, one folder a backbone in it: `given`, or tests/parity/golden of the checkout that
    holds this package. FileNotFoundError without it: an installed package carries none."""
    if given is None:
        above = (folder / "tests" / "parity" / "golden" for folder in Path(__file__).resolve().parents)
        found = next((folder for folder in above if folder.is_dir()), None)
        if found is None:
            raise FileNotFoundError(
                "no fixtures: they lie in tests/parity/golden of condit's source, which an installed package does not "
                "carry. Run this in a checkout, or name that folder with --golden."
            )
        return found
    if not given.is_dir():
        raise FileNotFoundError(f"no fixtures: there is no folder {given}. Name tests/parity/golden of a checkout.")
    return given


def verify_fixtures(backbone: str, golden: Path) -> list[Row]:
    """Everything that the fixtures of a backbone record, against ours, in float32 on the CPU.

    A kind of fixture that the folder does not have makes no row; ValueError for one that nothing here compares.
    """
    folder = golden / backbone
    if not folder.is_dir():
        raise FileNotFoundError(f"no fixtures of {backbone!r}: {golden} has no folder {backbone}.")
    present = [check for check in CHECKS[backbone] if check.cases(folder)]
    if not present:
        raise FileNotFoundError(f"no fixtures of {backbone!r}: {folder} holds none of {kinds(backbone)}.")
    if strange := unknown(backbone, folder):
        raise ValueError(f"{folder}: nothing compares {', '.join(strange)}; known are {kinds(backbone)}.")
    return [check.run(folder) for check in present]


def kinds(backbone: str) -> str:
    """The patterns of a backbone's fixtures, for an error's text."""
    return ", ".join(dict.fromkeys(check.files for check in CHECKS[backbone]))


def unknown(backbone: str, folder: Path) -> list[str]:
    """Names of the fixtures in a backbone's folder that no check compares."""
    files = {file.stem for file in folder.iterdir() if file.suffix in (".safetensors", ".npz", ".json")}
    compared = {file.stem for check in CHECKS[backbone] for file in folder.glob(check.files)}
    return sorted(files - compared)


def round_up(value: float) -> str:
    """Two digits, never less than the value: 2.31e-6 -> 2.4e-6."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return _short(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.1e}")


def _asked(tolerance: float) -> str:
    return _short(f"{tolerance:.0e}") if tolerance else "0"


def _short(number: str) -> str:
    """1.0e-05 -> 1.0e-5."""
    return number.replace("e-0", "e-").replace("e+0", "e+")


def lines(rows: Sequence[tuple[str, Row]]) -> list[str]:
    """(model, row) of each check as aligned text; below one that fails, everything that exceeds its tolerance."""
    table = [("model", "what", "against", "measured", "tolerance", "")]
    for model, row in rows:
        state = "ok" if row.ok else "TOO LARGE"
        table.append((model, row.what, row.against, round_up(row.measured), _asked(row.tolerance), state))
    widths = [max(len(cells[column]) for cells in table) for column in range(6)]
    out = []
    for number, cells in enumerate(table):
        out.append("  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip())
        if number and not rows[number - 1][1].ok:
            out += [f"    {text}" for text in rows[number - 1][1].exceeding()]
    return out


def markdown(rows: Mapping[str, Iterable[Row]]) -> str:
    """The table of docs/parity.md, rows of each backbone."""
    return _HEADER + "".join(
        f"| {TITLES[backbone]} | {row.what} | {row.against} | {len(row.cases)} | "
        f"{_asked(row.tolerance) if row.tolerance else 'equal'} | "
        f"{round_up(row.measured) if row.measured or row.tolerance else 'equal'} |\n"
        for backbone, checked in rows.items()
        for row in checked
    )


def write_between_marks(page: Path, table: str) -> Path:
    """Puts the table where `<!-- verify -->` stands; ValueError if the page has no such place."""
    text = page.read_text(encoding="utf-8")
    before, opened, rest = text.partition(_MARKS[0])
    _, closed, after = rest.partition(_MARKS[1])
    if not opened or not closed:
        raise ValueError(f"{page} has no place for the table: lines <!-- verify --> and <!-- /verify --> are expected.")
    text = before + opened + table + closed + after
    return atomic_write(page, lambda target: target.write_text(text, encoding="utf-8"))


def as_json(row: Row) -> dict[str, object]:
    """The row with every difference; what is not finite is told as text, which JSON has no number for."""

    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    return {
        "what": row.what,
        "against": row.against,
        "tolerance": row.tolerance,
        "measured": number(row.measured),
        "worst": row.worst,
        "ok": row.ok,
        "cases": {case: {name: number(x) for name, x in found.items()} for case, found in row.cases.items()},
    }
