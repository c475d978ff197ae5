"""`condit data pair` and `condit data filter`: a stream of rows into a set with its card, whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from condit import __version__
from condit.data.files import atomic_write, hash_file, remove_temporaries
from condit.data.locks import has_files, locked
from condit.data.pairs import CARD, Pair, fingerprint
from condit.data.progress import progress_bar
from condit.pairs.writers import SHARD_ROWS, WRITERS, Layout

ERRORS, PAGE, SETTINGS = "errors.jsonl", "README.md", "settings.json"
LICENCES = 1000  # different ones that a card counts

OnError = Callable[[str, str], None]


class Census:
    """What a card counts."""

    def __init__(self):
        self.rows, self.roles, self.licences = 0, Counter[str](), Counter[str]()
        self.seeds: tuple[int, int] | None = None

    def add(self, pair: Pair) -> None:
        self.rows += 1
        self.roles.update(pair.references.keys())
        licence = licence_of(pair) or "not stated"
        self.licences[licence if len(self.licences) < LICENCES else "others"] += 1
        seed = pair.columns.get("seed")
        if isinstance(seed, int):
            low, high = self.seeds or (seed, seed)
            self.seeds = min(low, seed), max(high, seed)


@dataclass(frozen=True)
class SetForm:
    """How a set is written. licence: of rows that state none."""

    layout: Layout = "tar"
    shard_rows: int = SHARD_ROWS
    licence: str | None = None


def write_set(
    source: Path,
    out: Path,
    make: Callable[[OnError], Iterable[Pair]],
    settings: Mapping[str, object],
    form: SetForm,
    report: Callable[[], Mapping[str, object]] = dict,
) -> dict[str, object]:
    """Writes the rows of make(on_error) and their card, which comes last: a folder with a card is whole. Bad rows are
    named in errors.jsonl. An interrupted run starts again and gives the same files.

    settings: what determines the rows of the source; report: more fields of the card, asked for at the end. ValueError
    for a folder that holds anything else. Returns the card.
    """
    settings = {**settings, **asdict(form), "source": str(source), "source_hash": source_hash(source)}
    with locked(out, "writing a set"):
        made = out / SETTINGS
        same = made.is_file() and made.read_text(encoding="utf-8") == as_text(settings)
        if not same and has_files(out):
            raise ValueError(f"{out} holds other files. Choose another folder with -o, or empty it.")
        if same and (out / CARD).is_file():
            return json.loads((out / CARD).read_text(encoding="utf-8"))
        remove_temporaries(out)
        atomic_write(made, lambda path: path.write_text(as_text(settings), encoding="utf-8"))
        census, writer, problems = Census(), WRITERS[form.layout](out, form.shard_rows), 0
        with open(out / ERRORS, "w", encoding="utf-8") as errors, progress_bar(0, "writing", unit="row") as advance:

            def on_error(place: str, text: str) -> None:
                nonlocal problems
                problems += 1
                errors.write(json.dumps({"row": place, "error": text}, ensure_ascii=False) + "\n")

            try:
                for pair in make(on_error):
                    if form.licence and not licence_of(pair):
                        pair = replace(pair, columns={**pair.columns, "licence": form.licence})
                    writer.write(pair)
                    census.add(pair)
                    advance()
                shards = writer.finish()
            finally:
                writer.close()
        card: dict[str, object] = {
            "rows": census.rows,
            "roles": dict(census.roles),
            "licences": dict(census.licences),
            "seeds": census.seeds,
            "errors": problems,
            **report(),
            "settings": settings,
            "condit": __version__,
            "shards" if form.layout == "tar" else "metadata": shards,
        }
        atomic_write(out / PAGE, lambda path: path.write_text(page(card), encoding="utf-8"))
        atomic_write(out / CARD, lambda path: path.write_text(as_text(card), encoding="utf-8"))
        return card


def licence_of(pair: Pair) -> str:
    return str(pair.columns.get("licence") or pair.columns.get("license") or "")


def source_hash(source: Path) -> str | None:
    """Of the card, metadata.jsonl or tars of a set; None for a folder of pictures, whose files are not read twice."""
    if (source / CARD).is_file():
        return hash_file(source / CARD)
    try:
        return fingerprint(source)
    except ValueError:
        return None


def as_text(value: Mapping[str, object]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"


def page(card: Mapping[str, object]) -> str:
    """The card as the README.md of a data set, without its shards."""
    told = {key: value for key, value in card.items() if key not in ("shards", "metadata", "filters")}
    lines = ["# Data card", "", "| field | value |", "|---|---|"]
    lines += [f"| {key} | {json.dumps(value, ensure_ascii=False, default=str)} |" for key, value in told.items()]
    filters = card.get("filters")
    if isinstance(filters, dict):
        lines += ["", "| filter | rows | kept | share kept | figures (quantiles) |", "|---|---|---|---|---|"]
        lines += [
            f"| {name} | {row['rows']} | {row['kept']} | {row['share']} | {json.dumps(row.get('quantiles'))} |"
            for name, row in filters.items()
        ]
    return "\n".join(lines) + "\n"
