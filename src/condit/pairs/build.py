"""Rows of pairs: from groups of generated images (DEADiff, arXiv:2403.06951, section 3.3), from canvases with one
subject twice (Subjects200K of OminiControl, arXiv:2411.15098, section 3.3), and from any folder of pictures, with
captions (IP-Adapter, arXiv:2308.06721) and aligned conditions. All read a stream and hold a bounded number of rows."""

from __future__ import annotations

import os
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from condit.data.annotators import foreground
from condit.data.files import read_bounded
from condit.data.images import ImageSource, load_image, read_recipe
from condit.data.pairs import CARD, METADATA, PICTURES, Pair, stream
from condit.drawing.references import ANNOTATORS

Row = tuple[str, Pair | str]  # its place, and the pair or the text of its problem

CONDITIONS: dict[str, Callable] = {**ANNOTATORS, "mask": foreground}
BLOCK = 1000  # rows of a subject that are paired with each other
RECENT = 16  # images of a style that are remembered, for pairs across subjects
MAX_CAPTION_BYTES = 100_000
SEPARATOR = "|"  # between the two scenes of a canvas


@dataclass(frozen=True)
class Grouping:
    """How groups become pairs. references: of each role, at most. across: a style reference is an image of another
    subject with the same column `style`, so that it does not show the content. caption: the column of the caption;
    None: the text."""

    seed: int = 0
    references: int = 1
    across: bool = False
    caption: str | None = None


def from_groups(rows: Iterable[Row], how: Grouping) -> Iterator[Row]:
    """References for style and for content for every image, where the set has them.

    Rows of a subject (`content_group`) must follow each other, as `condit data draw` writes them. style: another image
    of the same `style_group`, DEADiff's images of one prompt, or `across` subjects. content: the same subject in
    another style.
    """
    recent: dict[object, deque[tuple[object, ImageSource]]] = defaultdict(lambda: deque(maxlen=RECENT))
    for block in blocks(rows):
        pairs = [pair for _, pair in block if isinstance(pair, Pair)]
        for place, pair in block:
            if isinstance(pair, str):
                yield place, pair
                continue
            rng, subject, style = random.Random(f"{how.seed} {place}"), *names_of(pair)
            if how.across:
                alike = [image for other, image in recent[pair.columns.get("style")] if other != subject]
            else:
                alike = [p.image for p in pairs if p is not pair and names_of(p)[1] == style and style is not None]
            other = [p.image for p in pairs if subject is not None and names_of(p)[1] != style]
            chosen = {"style": alike, "content": other}
            references = {role: some(rng, images, how.references) for role, images in chosen.items() if images}
            if references:
                text = pair.text if how.caption is None else str(pair.columns.get(how.caption, pair.text))
                yield place, replace(pair, text=text, references={**pair.references, **references}, groups={})
        for pair in pairs:
            recent[pair.columns.get("style")].append((names_of(pair)[0], pair.image))


def some(rng: random.Random, images: Sequence[ImageSource], count: int) -> tuple[ImageSource, ...]:
    return tuple(rng.sample(images, min(count, len(images))))


def names_of(pair: Pair) -> tuple[str | None, str | None]:
    """The subject and the style group of a row."""
    return pair.groups.get("content"), pair.groups.get("style")


def blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Consecutive rows of one subject, BLOCK at most. Bad rows belong to the block before them."""
    for _, group in groupby(rows, key=lambda row: row[1].groups.get("content") if isinstance(row[1], Pair) else None):
        block: list[Row] = []
        for row in group:
            block.append(row)
            if len(block) == BLOCK:
                yield block
                block = []
        if block:
            yield block


def from_canvases(rows: Iterable[Row]) -> Iterator[Row]:
    """Two pairs of each wide image: each half is the target once and the other half its reference "subject".

    Captions: the row's subject with the scene of the half, where its column `style` is "left scene | right scene", as
    with `condit data draw --template "two pictures of the same {subject} side by side: {style}"`; else the row's text.
    """
    for place, pair in rows:
        if isinstance(pair, str):
            yield place, pair
            continue
        try:
            image = load_image(pair.image)
            if image.width < 2 * image.height * 0.9:
                raise ValueError(f"expected two pictures side by side; found {image.width} x {image.height} pixels")
        except (ValueError, OSError) as error:
            yield place, str(error)
            continue
        half = image.width // 2
        halves = image.crop((0, 0, half, image.height)), image.crop((image.width - half, 0, image.width, image.height))
        subject, scenes = pair.columns.get("subject"), str(pair.columns.get("style", "")).split(SEPARATOR)
        known = len(scenes) == 2 and isinstance(subject, str)
        for side in (0, 1):
            text = f"{subject}, {scenes[side].strip()}" if known else pair.text
            references = {"subject": (halves[1 - side],)}
            yield (
                f"{place}/{['left', 'right'][side]}",
                replace(pair, image=halves[side], text=text, references=references, groups={}),
            )


def with_conditions(rows: Iterable[Row], names: Sequence[str]) -> Iterator[Row]:
    """Every row with the aligned conditions of CONDITIONS that are named, as references of these roles."""
    for place, pair in rows:
        if isinstance(pair, Pair):
            try:
                image = load_image(pair.image, mode="RGBA")
                made = {name: (CONDITIONS[name](image),) for name in names}
            except (ValueError, OSError) as error:
                yield place, str(error)
                continue
            pair = replace(pair, references={**pair.references, **made})
        yield place, pair


def make_rows(kind: str, source: Path, conditions: Sequence[str], how: Grouping) -> Iterator[Row]:
    """The rows of a kind of pairs ("groups", "canvas", "pictures") with conditions. ValueError for an unknown one."""
    rows = open_rows(source)
    if kind == "groups":
        rows = from_groups(rows, how)
    elif kind == "canvas":
        rows = from_canvases(rows)
    unknown = [name for name in conditions if name not in CONDITIONS]
    if unknown:
        raise ValueError(f"no condition {unknown[0]!r}; expected one of {', '.join(CONDITIONS)}.")
    return with_conditions(rows, conditions) if conditions else rows


def open_rows(source: Path) -> Iterator[Row]:
    """The rows of a set, or of any folder of pictures; a picture's caption is the .txt next to it, else the prompt that
    condit stored in it, else empty."""
    if source.is_file() or any((source / name).is_file() for name in (METADATA, CARD)) or any(source.glob("*.tar")):
        yield from stream(source)
        return
    found = False
    for folder, folders, files in os.walk(source):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower().lstrip(".") in PICTURES and not name.startswith("."):
                found = True
                try:
                    yield str(path.relative_to(source)), Pair(path, caption_of(path), {})
                except (ValueError, OSError) as error:
                    yield str(path.relative_to(source)), str(error)
    if not found:
        raise ValueError(f"{source} has no pictures: expected .{', .'.join(PICTURES)}, {METADATA}, or tars.")


def caption_of(path: Path) -> str:
    """See `open_rows`. ValueError for a caption that is no text."""
    text = path.with_suffix(".txt")
    if text.is_file():
        try:
            return read_bounded(text, MAX_CAPTION_BYTES)[:MAX_CAPTION_BYTES].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{text.name} is not text in UTF-8: {error}") from error
    try:
        return str(read_recipe(path).get("prompt") or "")
    except (ValueError, OSError):  # no recipe; whether it is an image is checked when it is read
        return ""
