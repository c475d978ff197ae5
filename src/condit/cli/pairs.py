"""The commands data pair and data filter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from condit.cli.options import with_options
from condit.cli.terminal import Debug, Json, Seed, answer, say

if TYPE_CHECKING:
    from condit.pairs.build import Row
    from condit.pairs.sets import OnError

Source = Annotated[Path, typer.Argument(help="A folder with metadata.jsonl, tars, or a folder of pictures.")]
Kind = Literal["groups", "canvas", "pictures"]


@dataclass(frozen=True)
class SetOptions:
    """Output"""

    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new set.", show_default=False)]
    layout: Annotated[Literal["tar", "folder"], typer.Option(help="WebDataset, or images and metadata.jsonl.")] = "tar"
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a tar.")] = 1000
    licence: Annotated[str | None, typer.Option(help="Licence of rows that state none.")] = None
    as_json: Json = False
    debug: Debug = False


@dataclass(frozen=True)
class GroupOptions:
    """Groups"""

    references: Annotated[int, typer.Option(min=1, help="References of each role, at most.")] = 1
    across: Annotated[bool, typer.Option("--across", help="Style references show another subject.")] = False
    caption: Annotated[str | None, typer.Option(help="Column of the caption [default: the text].")] = None
    seed: Seed = 0


@dataclass(frozen=True)
class FilterOptions:
    """Filters"""

    min_side: Annotated[int, typer.Option(help="Shortest side, in pixels.")] = 64
    max_ratio: Annotated[float, typer.Option(help="Longest side by shortest.")] = 4.0
    distance: Annotated[int, typer.Option(help="Bits in which hashes of duplicates differ, 0 to 7; -1: keep all.")] = 3
    text: Annotated[str | None, typer.Option(metavar="LOW[:HIGH]", help="Kept cosines of image and text.")] = None
    agree: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=LOW[:HIGH]", help="Kept cosines of target and reference.")
    ] = None
    clip: Annotated[str | None, typer.Option(help="Folder of a CLIP that compares [default: the embedded one].")] = None
    batch: Annotated[int, typer.Option(min=1, help="Images that are compared at a time.")] = 32


@with_options
def pair(
    kind: Annotated[Kind, typer.Argument(help="How rows become pairs.", show_default=False)],
    source: Source,
    options: SetOptions,
    groups: GroupOptions,
    conditions: Annotated[str, typer.Option(help="Aligned conditions of each target, such as edges,gray,mask.")] = "",
) -> None:
    """Make pairs of images.

    groups: style and content references for each image of `condit data draw`. canvas: the halves of wide images are
    each other's subject reference. pictures: every picture with its caption (the .txt next to it, or the prompt of its
    recipe).
    """
    checked(source, options.out)
    from condit.pairs.build import Grouping, make_rows

    names, how = tuple(name.strip() for name in conditions.split(",") if name.strip()), Grouping(**asdict(groups))
    settings = {"command": f"data pair {kind}", "conditions": names, **asdict(groups)}
    write(source, options, lambda on_error: make_rows(kind, source, names, how, on_error), settings)


@with_options
def filter_pairs(source: Source, options: SetOptions, filters: FilterOptions) -> None:
    """Filter images or pairs by size, duplicates, and agreement of text and of pairs.

    Writes the rows that pass with their figures, a card with the share that each filter kept, and sheets of rejected
    rows. A figure without a limit is measured and rejects nothing.
    """
    text = None if filters.text is None else span_of(filters.text)
    agree = {role: span_of(span) for role, _, span in (value.partition("=") for value in filters.agree or [])}
    checked(source, options.out)
    from condit.data.files import atomic_write
    from condit.pairs.build import open_rows
    from condit.pairs.filters import FilterRules, Filters, load_encoder

    distance = None if filters.distance < 0 else filters.distance
    rules, encoder = FilterRules(filters.min_side, filters.max_ratio, distance, text, agree), load_encoder(filters.clip)
    used = Filters(rules, encoder, batch=filters.batch)

    def report() -> dict[str, object]:
        for name, tally in used.tallies.items():
            if tally.shown:
                sheet = tally.sheet(f"{name}: {tally.rejected} of {tally.rows} rows rejected")
                atomic_write(options.out / f"rejected-{name}.png", lambda path, sheet=sheet: sheet.save(path, "PNG"))
        return {"read": used.read, "filters": {name: tally.card() for name, tally in used.tallies.items()}}

    settings = {"command": "data filter", **asdict(rules), "batch": filters.batch, "encoder": encoder.name}
    write(source, options, lambda on_error: used(open_rows(source, on_error), on_error), settings, report)


def checked(source: Path, out: Path) -> None:
    """Wrong usage: nothing is there, or the new set would be inside of it."""
    if not source.exists():
        raise typer.BadParameter(f"nothing at {source}")
    if out.resolve().is_relative_to(source.resolve()):
        raise typer.BadParameter(f"-o {out} is inside of {source}, which is read. Choose another folder")


def span_of(text: str) -> tuple[float, float]:
    """ "0.2" -> (0.2, 1.1), "0.2:0.9" -> (0.2, 0.9). A cosine of rounded vectors may be a little above 1."""
    low, _, high = text.partition(":")
    try:
        span = float(low), float(high or 1.1)
    except ValueError:
        span = 1.0, -1.0
    if not -1.1 <= span[0] <= span[1]:
        raise typer.BadParameter(f"{text!r}: expected cosines, LOW or LOW:HIGH, as in 0.3:0.95")
    return span


def write(
    source: Path,
    options: SetOptions,
    make: Callable[[OnError], Iterable[Row]],
    settings: Mapping[str, object],
    report: Callable[[], Mapping[str, object]] = dict,
) -> None:
    """Writes the set; exits with 1 if a row could not be read."""
    from condit.pairs.sets import SetForm, write_set

    form = SetForm(options.layout, options.shard_rows, options.licence)
    card = write_set(source, options.out, make, settings, form, report)
    if options.as_json:
        answer({key: value for key, value in card.items() if key != "shards"})
    else:
        say(f"{card['rows']} rows, {card['errors']} that cannot be read")
        typer.echo(str(options.out))
    if card["errors"]:
        raise typer.Exit(1)
