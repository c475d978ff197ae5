"""Build the larger icon world: packages to rows, rows to rasters, rasters to one file with captions."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from condit.data.files import hash_fraction
from condit_lab.icons.packages import fetch
from condit_lab.icons.styles import STYLES as EMOJI_STYLES
from condit_lab.icons.world import HELD_OUT_SHARE, HELD_OUT_STYLE
from condit_lab.world import clipart, inflated, store
from condit_lab.world.attribution import attribution
from condit_lab.world.cache import RasterCache
from condit_lab.world.captions import PER_LANGUAGE, Subject, captions
from condit_lab.world.emoji import EMOJI_PACKAGES, EmojiConcept, emoji_drawings, emoji_rows, rasterise
from condit_lab.world.index import (
    WorldDrawing,
    clipart_rows,
    documents,
    emoji_rows_as_drawings,
    families,
    inflated_rows,
    look_table,
    set_rows,
    with_splits,
)
from condit_lab.world.measure import COLOURS, PixelMeasures, descriptor, measure
from condit_lab.world.names import Phrase, phrases
from condit_lab.world.raster import RESVG, Renderer, unpack_renderer
from condit_lab.world.sets import Kind, icon_sets, looks
from condit_lab.world.splits import HELD_OUT_LOOKS, without_near

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # step, done, all

_SHAPE_SET = next(look.icon_set for look in looks() if look.key == inflated.SHAPES)
_EMOJI_KINDS: dict[str, Kind] = {
    "noto": "gradient",
    "noto-v1": "gradient",
    "fluent-emoji": "gradient",
    "fluent-emoji-flat": "color",
    "fluent-emoji-high-contrast": "solid",
    "fluent-emoji-3d": "3d",
    "fxemoji": "color",
    "noto-mono": "line",
    "twemoji": "color",
    "emojione": "color",
    "emojione-monotone": "solid",
    "streamline-emojis": "color",
}


def build(out_dir: str | Path, *, work: str | Path | None = None, progress: Progress = lambda *_: None) -> store.World:
    """Build the world into out_dir and return it opened. work (default: out_dir/work) keeps packages and rasters, so
    that a stopped build goes on and a second one is quick. Files appear whole or not at all."""
    out = Path(out_dir)
    work = Path(work) if work else out / "work"
    files = fetch([*EMOJI_PACKAGES, *RESVG, *(entry.package for entry in icon_sets().values())], work / "packages")
    files[clipart.SOURCE] = clipart.fetch_clipart(work / "packages")
    drawings, emoji, known = rows(files)
    caches = rasters(drawings, files, work, progress)
    drawings = [row for row in drawings if caches[row.style].drawn(row.key)]
    measures, descriptors, digests = measured(drawings, work / "rasters", progress)
    keep = _first_of_each(drawings, measures, digests)
    drawings, measures = [drawings[i] for i in keep], [measures[i] for i in keep]
    progress("near-duplicates", 0, 1)
    apart = [row.style == inflated.STYLE for row in drawings]  # shares silhouettes, by intent
    splits = without_near(with_splits(drawings), [row.fixed for row in drawings], apart, descriptors[keep])
    progress("near-duplicates", 1, 1)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write_tables(part, drawings, measures, splits, emoji, known)
    _write_images(part / store.IMAGES, drawings, caches, progress)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(part.iterdir(), key=lambda file: file.name == store.INDEX):  # last: without it there is no world
        os.replace(file, out / file.name)
    part.rmdir()
    return store.World.open(out)


def rows(files: Mapping[str, Path]) -> tuple[list[WorldDrawing], dict[str, EmojiConcept], dict[str, Phrase]]:
    """(every drawing, emoji concepts by hexcode, phrases): sorted by style and name."""
    icons, emoji = emoji_rows(dict(files))
    known = phrases(emoji)
    groups = {entry.key: entry.group for entry in emoji.values()}
    drawings = emoji_rows_as_drawings(icons, emoji)
    for entry in icon_sets().values():
        drawings += set_rows(entry, files[entry.package.name], known, groups)
    drawings += clipart_rows(files[clipart.SOURCE], known, groups)
    drawings += inflated_rows(drawings)
    order = {key: index for index, key in enumerate([*EMOJI_STYLES, *look_table()])}
    return sorted(drawings, key=lambda row: (order[row.style], row.key)), emoji, known


def rasters(
    drawings: list[WorldDrawing], files: Mapping[str, Path], work: Path, progress: Progress
) -> dict[str, RasterCache]:
    """The raster cache of every style with all its drawings in it."""
    modules = unpack_renderer([files[package.name] for package in RESVG], work / "tools")
    caches = {style: RasterCache(work / "rasters", style) for style in dict.fromkeys(row.style for row in drawings)}
    missing: dict[tuple[str, str], list[str]] = {}
    for row in drawings:
        if row.key not in caches[row.style]:
            missing.setdefault((row.style, row.source), []).append(row.name)
    done, total = 0, sum(map(len, missing.values()))
    shapes = caches.get(inflated.SHAPES)
    with Renderer(modules) as renderer:
        # The borrowed silhouettes come after the style that lends them.
        for (style, source), names in sorted(missing.items(), key=lambda item: item[0][0] == inflated.STYLE):
            if source == inflated.STYLE:
                assert shapes is not None
                jobs = _inflated(shapes, names)
            else:
                jobs = _drawn(renderer, files, source, names)
            for _ in caches[style].add(jobs):
                done += 1
                if done % 50 == 0 or done == total:
                    progress("rasters", done, total)
    return caches


def measured(
    drawings: list[WorldDrawing], folder: Path, progress: Progress
) -> tuple[list[PixelMeasures | None], NDArray[np.float32], list[bytes]]:
    """(measures, descriptors (n, 256), digests of the pixels), computed by all cores."""
    by_style: dict[str, list[str]] = {}
    for row in drawings:
        by_style.setdefault(row.style, []).append(row.key)
    measures: list[PixelMeasures | None] = []
    parts: list[NDArray[np.float32]] = []
    digests: list[bytes] = []
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(_measure_style, [folder] * len(by_style), by_style, by_style.values())
        for some, descriptors, hashes in jobs:
            measures += some
            parts.append(descriptors)
            digests += hashes
            progress("measures", len(measures), len(drawings))
    return measures, np.concatenate(parts), digests


def _measure_style(
    folder: Path, style: str, keys: list[str]
) -> tuple[list[PixelMeasures | None], NDArray[np.float32], list[bytes]]:
    measures, descriptors, digests = [], [], []
    for rgba in RasterCache(folder, style).read(keys):
        measures.append(measure(rgba))
        descriptors.append(descriptor(rgba))
        digests.append(hashlib.sha1(rgba.tobytes()).digest())
    return measures, np.stack(descriptors), digests


def _drawn(
    renderer: Renderer, files: Mapping[str, Path], source: str, names: list[str]
) -> Iterator[tuple[str, NDArray[np.uint8] | None]]:
    pairs: Iterable[tuple[str, str | bytes]]
    if source in EMOJI_STYLES:
        pairs = emoji_drawings(dict(files), source, names)
    elif source == clipart.SOURCE:
        wanted = set(names)
        pairs = (pair for pair in clipart.documents(files[source]) if pair[0] in wanted)
    else:
        pairs = documents(files[icon_sets()[source].package.name], names)
    for name, drawing in pairs:
        if isinstance(drawing, str):
            rgba = next(renderer.draw([(drawing, source == clipart.SOURCE)]))
            # resvg-js gives up on eight drawings of noto that resvg-py draws.
            fixed = rgba is None and source in EMOJI_STYLES
            yield f"{source}/{name}", rasterise(drawing) if fixed else rgba
        else:
            yield f"{source}/{name}", rasterise(drawing)


def _inflated(shapes: RasterCache, names: list[str]) -> Iterator[tuple[str, NDArray[np.uint8] | None]]:
    for name in names:
        key = f"{_SHAPE_SET}/{name}"
        yield (
            f"{inflated.STYLE}/{name}",
            inflated.inflate(next(shapes.read([key])), name) if shapes.drawn(key) else None,
        )


def _first_of_each(
    drawings: list[WorldDrawing], measures: list[PixelMeasures | None], digests: list[bytes]
) -> list[int]:
    """Indices without blank drawings and without a second copy of the same pixels in one style; the first world's rows
    stay, copies or not."""
    seen: set[tuple[str, bytes]] = set()
    keep = []
    for index, (row, some, digest) in enumerate(zip(drawings, measures, digests, strict=True)):
        if some is None or ((row.style, digest) in seen and not row.fixed):
            continue
        seen.add((row.style, digest))
        keep.append(index)
    return keep


def _write_images(
    file: Path, drawings: list[WorldDrawing], caches: Mapping[str, RasterCache], progress: Progress
) -> None:
    by_style: dict[str, list[str]] = {}
    for row in drawings:
        by_style.setdefault(row.style, []).append(row.key)
    done = 0
    with open(file, "wb") as handle:
        for style, keys in by_style.items():
            for rgba in caches[style].read(keys):
                handle.write(rgba.tobytes())
                done += 1
            progress("images", done, len(drawings))


def _write_tables(
    folder: Path,
    drawings: list[WorldDrawing],
    measures: list[PixelMeasures | None],
    splits: list[str],
    emoji: Mapping[str, EmojiConcept],
    known: Mapping[str, Phrase],
) -> None:
    concepts = _concepts(drawings, emoji, known)
    styles = _styles(drawings)
    index, texts = [], []
    for row, some, split in zip(drawings, measures, splits, strict=True):
        assert some is not None  # blank drawings are gone
        colours = ",".join(COLOURS[colour][0] for colour in some.colours)
        index.append(
            store.DrawingRow(
                row.style,
                row.name,
                row.concept,
                row.label_en,
                row.label_zh,
                int(row.detail),
                row.group,
                split,
                row.licence,
                colours,
                int(some.translucent),
                int(some.shaded),
            )
        )
        texts.append(_captions(row, some, concepts[row.concept], styles[row.style]))
    for name, kind, table in (
        (store.INDEX, store.DrawingRow, index),
        (store.CONCEPTS, store.Concept, list(concepts.values())),
        (store.STYLES, store.StyleRow, list(styles.values())),
    ):
        store.write_rows(folder / name, store.field_names(kind), [astuple(entry) for entry in table])
    columns = [f"{language}_{number}" for language in ("en", "zh") for number in range(1, PER_LANGUAGE + 1)]
    store.write_rows(folder / store.CAPTIONS, columns, texts)
    (folder / "ATTRIBUTION.md").write_text(attribution(styles.values()), encoding="utf-8")


def _captions(row: WorldDrawing, some: PixelMeasures, concept: store.Concept, style: store.StyleRow) -> list[str]:
    rng = Random(f"{row.style}/{row.key}")
    described = [(style.description_en, style.description_zh)] if style.description_en else []
    if row.source in EMOJI_STYLES:
        described = list(EMOJI_STYLES[row.source].descriptions)
    kind = _EMOJI_KINDS.get(row.style) or look_table()[row.style].kind
    subject = Subject(
        row.label_en,
        row.label_zh,
        style.name_en,
        style.name_zh,
        described,
        concept.tags_en.split("|") if concept.tags_en else (),
        concept.tags_zh.split("|") if concept.tags_zh else (),
        kind,
        some,
    )
    english, chinese = captions(subject, rng)
    return [*english, *chinese]


def _concepts(
    drawings: list[WorldDrawing], emoji: Mapping[str, EmojiConcept], known: Mapping[str, Phrase]
) -> dict[str, store.Concept]:
    """Concepts that are drawn, sorted by key."""
    own = {entry.key: entry for key, entry in sorted(emoji.items(), key=lambda pair: pair[0] == pair[1].key)}
    images: dict[str, int] = {}
    styles: dict[str, set[str]] = {}
    for row in drawings:
        images[row.concept] = images.get(row.concept, 0) + 1
        styles.setdefault(row.concept, set()).add(row.style)
    out = {}
    for key in sorted(images):
        if key in own:
            entry = own[key]
            texts = (entry.label_en, entry.label_zh or entry.label_en, "|".join(entry.tags_en), "|".join(entry.tags_zh))
            group = entry.group
        else:
            texts, group = (known[key].label_en, known[key].label_zh, "", ""), "things"
        held = hash_fraction(f"concept/{key}") < HELD_OUT_SHARE
        out[key] = store.Concept(key, *texts, group, int(held), images[key], len(styles[key]))
    return out


def _styles(drawings: list[WorldDrawing]) -> dict[str, store.StyleRow]:
    """Styles that are drawn, in the order of the tables."""
    family, table = families(), look_table()
    images: dict[str, int] = {}
    for row in drawings:
        images[row.style] = images.get(row.style, 0) + 1
    licences = {row.style: row.licence for row in drawings}
    out = {}
    for key, count in images.items():
        held = int(key in HELD_OUT_LOOKS or key == HELD_OUT_STYLE)
        if key in EMOJI_STYLES:
            style = EMOJI_STYLES[key]
            words = style.descriptions[0]
            texts = (style.name_en, style.name_zh, words[0], words[1])
            kind: Kind = _EMOJI_KINDS[key]
        else:
            look = table[key]
            texts = (look.name_en, look.name_zh, look.description_en, look.description_zh)
            kind = look.kind
        out[key] = store.StyleRow(key, family[key], kind, licences[key], *texts, held, count)
    return out
