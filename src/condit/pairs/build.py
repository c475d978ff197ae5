"""Rows of pairs: from groups of generated images (DEADiff, arXiv:2403.06951, section 3.3), from canvases with one
subject twice (Subjects200K of OminiControl, arXiv:2411.15098, section 3.3), and from any folder of pictures, with
captions (IP-Adapter, arXiv:2308.06721) and aligned conditions. All read a stream and hold a bounded number of rows."""

from __future__ import annotations

import os
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path

from condit.data.annotators import foreground
from condit.data.files import read_bounded
from condit.data.images import ImageSource, load_image, read_recipe
from condit.data.pairs import CARD, METADATA, PICTURES, Pair, stream
from condit.drawing.references import ANNOTATORS
from condit.pairs.sets import OnError

Row = tuple[str, Pair]  # with its place

CONDITIONS: dict[str, Callable] = {**ANNOTATORS, "mask": foreground}
BLOCK = 1000  # rows of a subject that are paired with each other
RECENT = 16  # images of a style that are remembered, for pairs across subjects
MAX_CAPTION_BYTES = 100_000
SCENES = "|"  # between the two scenes of a canvas


@dataclass(frozen=True)
class Grouping:
    """How groups become pairs. references: of each role, at most. across: a style reference is an image of another
    subject with the same column `style`, so that it does not show the content. caption: the column of the caption;
    None: the text."""

    seed: int = 0
    references: int = 1
    across: bool = False
    caption: str | None = None


def names_of(pair: Pair) -> tuple[str | None, str | None]:
    """The subject and the style group of a row."""
    return pair.groups.get("content"), pair.groups.get("style")


def from_groups(rows: Iterable[Row], how: Grouping) -> Iterator[Row]:
    """References for style and for content for every image, where the set has them.

    Rows of a subject (`content_group`) must follow each other, as `condit data draw` writes them. style: another image
    of the same `style_group`, DEADiff's images of one prompt, or `across` subjects. content: the same subject in
    another style.
    """
    recent: dict[str, deque[tuple[str | None, ImageSource]]] = defaultdict(lambda: deque(maxlen=RECENT))
    for subject, group in groupby(rows, key=lambda row: names_of(row[1])[0]):
        while block := list(islice(group, BLOCK)):
            for place, pair in block:
                style, others = names_of(pair)[1], [other for _, other in block if other is not pair]
                alike = [other.image for other in others if style is not None and names_of(other)[1] == style]
                if how.across:
                    alike = [image for other, image in recent[str(pair.columns.get("style"))] if other != subject]
                content = [other.image for other in others if subject is not None and names_of(other)[1] != style]
                rng, references = random.Random(f"{how.seed} {place}"), dict(pair.references)
                for role, images in (("style", alike), ("content", content)):
                    if images:
                        references[role] = tuple(rng.sample(images, min(how.references, len(images))))
                text = pair.text if how.caption is None else str(pair.columns.get(how.caption, pair.text))
                if references:
                    yield place, replace(pair, text=text, references=references, groups={})
            for _, pair in block:
                recent[str(pair.columns.get("style"))].append((subject, pair.image))


def made(rows: Iterable[Row], make: Callable[[Pair], Sequence[Pair]], on_error: OnError) -> Iterator[Row]:
    """The pairs that are made of each row."""
    for place, pair in rows:
        try:
            pairs = make(pair)
        except (ValueError, OSError) as error:
            on_error(place, str(error))
            continue
        yield from ((f"{place}/{i}" if len(pairs) > 1 else place, pair) for i, pair in enumerate(pairs))


def of_canvas(pair: Pair) -> Sequence[Pair]:
    """Two pairs of a wide image: each half is the target once and the other half its reference "subject".

    Captions: the row's subject with the scene of the half, where its column `style` is "left scene | right scene", as
    with `condit data draw --template "two pictures of the same {subject} side by side: {style}"`; else the row's text.
    """
    image = load_image(pair.image)
    if image.width < 2 * image.height * 0.9:
        raise ValueError(f"expected two pictures side by side; found {image.width} x {image.height} pixels")
    half, height = image.width // 2, image.height
    halves = image.crop((0, 0, half, height)), image.crop((image.width - half, 0, image.width, height))
    subject, scenes = pair.columns.get("subject"), str(pair.columns.get("style", "")).split(SCENES)
    known = len(scenes) == 2 and isinstance(subject, str)
    texts = [f"{subject}, {scene.strip()}" for scene in scenes] if known else [pair.text] * 2
    references = [{"subject": (half,)} for half in reversed(halves)]
    parts = zip(halves, texts, references, strict=True)
    return [replace(pair, image=half, text=text, references=shown, groups={}) for half, text, shown in parts]


def make_rows(kind: str, source: Path, conditions: Sequence[str], how: Grouping, on_error: OnError) -> Iterator[Row]:
    """The rows of a kind of pairs, "groups", "canvas" or "pictures", with aligned conditions as references of these
    roles. ValueError for an unknown condition."""
    unknown = [name for name in conditions if name not in CONDITIONS]
    if unknown:
        raise ValueError(f"no condition {unknown[0]!r}; expected one of {', '.join(CONDITIONS)}.")

    def annotated(pair: Pair) -> Sequence[Pair]:
        image = load_image(pair.image, mode="RGBA")
        maps = {name: (CONDITIONS[name](image),) for name in conditions}
        return [replace(pair, references={**pair.references, **maps})]

    rows = open_rows(source, on_error)
    if kind == "groups":
        rows = from_groups(rows, how)
    elif kind == "canvas":
        rows = made(rows, of_canvas, on_error)
    return made(rows, annotated, on_error) if conditions else rows


def open_rows(source: Path, on_error: OnError) -> Iterator[Row]:
    """The rows of a set, or of any folder of pictures; a picture's caption is the .txt next to it, else the prompt that
    condit stored in it, else empty."""
    if source.is_file() or any((source / name).is_file() for name in (METADATA, CARD)) or any(source.glob("*.tar")):
        for place, pair in stream(source):
            if isinstance(pair, Pair):
                yield place, pair
            else:
                on_error(place, pair)
        return
    for folder, folders, files in os.walk(source):
        folders.sort()
        for path in sorted(Path(folder, name) for name in files if not name.startswith(".")):
            if path.suffix.lower().lstrip(".") in PICTURES:
                try:
                    yield str(path.relative_to(source)), Pair(path, caption_of(path), {})
                except (ValueError, OSError) as error:
                    on_error(str(path.relative_to(source)), str(error))


def caption_of(path: Path) -> str:
    """See `open_rows`. ValueError for a caption that is no text."""
    text = path.with_suffix(".txt")
    if text.is_file():
        return read_bounded(text, MAX_CAPTION_BYTES)[:MAX_CAPTION_BYTES].decode("utf-8").strip()
    try:
        return str(read_recipe(path).get("prompt") or "")
    except (ValueError, OSError):  # no recipe; whether it is an image is checked when it is read
        return ""
