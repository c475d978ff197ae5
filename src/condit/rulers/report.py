"""`condit evaluate folder`: any method's pictures measured, as a page, JSON and CSV. Nothing is generated."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from condit.data.files import atomic_write
from condit.data.images import load_image, save_image
from condit.data.sheets import SheetCell, contact_sheet
from condit.rulers import compare, distributions
from condit.rulers.encoders import embedded, load_encoder
from condit.rulers.folder import Collection, Output, Picture, label, read_collection
from condit.rulers.measure import (
    RETRIEVAL,
    RULERS,
    TESTS,
    Check,
    RulerPairs,
    Store,
    Values,
    check,
    measure,
    retrieval,
    view_of,
)
from condit.rulers.measure import test_pairs as pairs_of
from condit.rulers.page import slug, write_page
from condit.rulers.plot import Line, Point, curves
from condit.rulers.statistics import Interval
from condit.weights.files import Json

COMPARED = ("content", "likeness", "text", "label")
EXTREME, ACROSS = 6, 3
FIGURE = ("method", "strength", "ruler", "value", "low", "high", "n", "hash")
Checks = dict[str, dict[str, Check | None]]


@dataclass(frozen=True)
class FolderSettings:
    """weights: name of an encoder -> path or hub name. blank: the method that was shown no reference, from which
    leakage is counted. baseline: the method whose curve the others are compared with (default: that of most strengths).
    axis: the ruler of style across (default: the one that tells best). answers: those of a preference study."""

    weights: Mapping[str, str] = field(default_factory=dict)
    blank: str | None = None
    baseline: str | None = None
    axis: str | None = None
    answers: Sequence[Mapping[str, object]] = ()


def evaluate_folder(
    output: Path,
    report: Path,
    content: Path | None = None,
    style: Path | None = None,
    settings: FolderSettings | None = None,
) -> Json:
    """Measures METHOD/STRENGTH/... under `output`, writes index.html, report.json, figures.csv, values.csv and pictures
    into `report`, and returns what report.json holds. ValueError for folders without pictures, unknown names, or
    weights that do not fit; problems of single pictures are in the report."""
    settings = settings or FolderSettings()
    if report.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"the report {report} would lie among the pictures of {output}; choose another folder")
    collection = read_collection(output, content, style)
    methods = sorted({o.method for o in collection.outputs})
    for what, name in (("blank", settings.blank), ("baseline", settings.baseline)):
        if name is not None and name not in methods:
            raise ValueError(f"no method {name!r} for {what}; found {', '.join(methods)}")
    if settings.axis is not None and (settings.axis not in RULERS or RULERS[settings.axis].of != "style"):
        raise ValueError(f"no ruler of style {settings.axis!r}; see docs/evaluate.md")
    encoders = [*embedded(), *(e for name, source in settings.weights.items() for e in load_encoder(name, source))]
    hashes = {e.name: e.hash for e in encoders}
    store = Store(report / ".features", {e.name: e for e in encoders})
    collection, pairs = _encoded(store, collection)
    outputs = collection.outputs
    values, lost = measure(store, outputs)
    collection.problems["not a number"] += [f"{RULERS[n].title}: {count} pictures" for n, count in lost.items()]
    checks: Checks = {n: {t: check(store, RULERS[n], pairs[t]) for t in _tests(n)} for n in values}
    if settings.axis is not None and settings.axis not in values:
        raise ValueError(f"{settings.axis} has no value here; give its weights: {RULERS[settings.axis].needs}=SOURCE")
    axis = settings.axis or best_axis(values, checks)
    chance = math.nan
    if axis is not None:
        row, chance = retrieval(store, RULERS[axis], outputs, collection.styles)
        values |= {RETRIEVAL: row} if np.isfinite(row).any() else {}
    blank = settings.blank or ("none" if "none" in methods else None)
    values = compare.less_blank(values, outputs, blank)
    baseline = settings.baseline or _longest(outputs, blank)
    compared = [n for n in values if RULERS[n].of in COMPARED and RULERS[n].compare and usable(checks, n)]
    against = compare.comparisons(values, outputs, axis, baseline, blank, compared) if axis else []
    figures = compare.figures(values, outputs)
    result: Json = {
        "pictures": len(outputs),
        "contents": len({o.cluster for o in outputs}),
        "methods": {m: [s for name, s in compare.rows_of(outputs) if name == m] for m in methods},
        "axis": axis,
        "baseline": baseline,
        "blank": blank,
        "chance of style retrieval": chance,
        "encoders": [{"name": e.name, "hash": e.hash, "size": e.size, "note": e.note} for e in encoders],
        "rulers": [_ruler_row(n, checks.get(n, {}), hashes) for n in values],
        "figures": [_figure(key, name, x, hashes) for (key, name), x in figures.items()],
        "comparisons": [asdict(c) for c in against],
        "people": {n: asdict(a) for n, a in compare.human(values, outputs, settings.answers).items()},
        "sets": set_figures(store, collection, values),
        "problems": {kind: names for kind, names in sorted(collection.problems.items()) if names},
    }
    result = {name: finite(value) for name, value in result.items()}
    _write_tables(report, result, values, outputs)
    pictures = plots(figures, axis, baseline, blank, compared) | sheets(outputs, values, axis, compared)
    for name, picture in pictures.items():
        save_image(picture, report / "pictures" / f"{slug(name)}.png")
    write_page(report, result, pictures)
    return result


def _tests(name: str) -> list[str]:
    """What a ruler is tested for: what it is for first, then what it should not see."""
    own = TESTS.get(RULERS[name].of)
    return [] if own is None else [own, *({"style": ["content"], "content": ["style"]}.get(own, []))]


def _encoded(store: Store, collection: Collection) -> tuple[Collection, dict[str, RulerPairs | None]]:
    """The collection without what cannot be read, and the pairs that rulers are tested on; all of it encoded."""
    broken = store.fill([view_of(x) for x in (*collection.outputs, *collection.contents, *collection.styles)])
    names = {x.hash: x.path.name for x in (*collection.outputs, *collection.contents, *collection.styles)}
    collection.problems["broken"] += [f"{names[h]}: {reason}" for h, reason in broken.items()]
    outputs = tuple(
        replace(o, content=_kept(o.content, broken), style=_kept(o.style, broken))
        for o in collection.outputs
        if o.hash not in broken
    )
    contents, styles = (tuple(p for p in g if p.hash not in broken) for g in (collection.contents, collection.styles))
    if not outputs:
        raise ValueError("none of the pictures can be read: " + "; ".join(list(broken.values())[:3]))
    sizes = Counter(tuple(int(x) for x in store.rows("pixels", "size", [view_of(o)])[0]) for o in outputs)
    if len(sizes) > 1:
        collection.problems["different sizes"] += [f"{w} x {h}: {n} pictures" for (w, h), n in sorted(sizes.items())]
    collection = Collection(outputs, contents, styles, collection.problems)
    pairs = pairs_of(collection)
    store.fill([v for p in pairs.values() if p for v in (*p.first, *p.second) if not isinstance(v, str)])
    return collection, pairs


def _kept(picture: Picture | None, broken: Mapping[str, str]) -> Picture | None:
    return None if picture is None or picture.hash in broken else picture


def usable(checks: Checks, name: str) -> bool:
    """Whether a ruler tells what it is for, or the given pictures cannot say."""
    tested = checks.get(name, {}).get(TESTS.get(RULERS[name].of, ""))
    return tested is None or tested.passes


def best_axis(values: Values, checks: Checks) -> str | None:
    """The ruler of style that tells best, by the lower end of its interval; None without any that tells."""
    tested = {n: c for n in values if RULERS[n].of == "style" and (c := checks[n]["style"]) and c.passes}
    return max(tested, key=lambda n: tested[n].area.low, default=None)


def _longest(outputs: Sequence[Output], blank: str | None) -> str:
    strengths = defaultdict(set)
    for o in outputs:
        strengths[o.method].add(o.strength)
    strengths.pop(blank, None)
    return min(strengths, key=lambda m: (-len(strengths[m]), m), default=blank or "")


def _ruler_row(name: str, checks: Mapping[str, Check | None], hashes: Mapping[str, str]) -> dict[str, object]:
    ruler, own = RULERS[name], TESTS.get(RULERS[name].of)
    tested = {test: asdict(c) for test, c in checks.items() if c}
    passes = None if own is None or (found := checks.get(own)) is None else found.passes
    return {**asdict(ruler), "hash": hashes.get(ruler.needs, ""), "passes": passes, "tests": tested}


def _figure(key: compare.Key, name: str, x: Interval, hashes: Mapping[str, str]) -> Json:
    values = (*key, name, x.value, x.low, x.high, x.n, hashes.get(RULERS[name].needs, ""))
    return dict(zip(FIGURE, values, strict=True))


def set_figures(store: Store, collection: Collection, values: Values) -> list[dict[str, object]]:
    """FID, KID and, with LPIPS, ArtFID of each method and strength against the style references."""
    if "inception" not in store.encoders or len(collection.styles) < 2:
        return []
    real = store.rows("inception", "pool", [view_of(p) for p in collection.styles])
    found = []
    for key, index in compare.rows_of(collection.outputs).items():
        made = store.rows("inception", "pool", [view_of(collection.outputs[i]) for i in index])
        row: dict[str, object] = {"method": key[0], "strength": key[1], "n": len(made), "references": len(real)}
        if len(made) > 1:
            fid = distributions.frechet_distance(made, real)
            lpips = mean(values["lpips"][index]) if "lpips" in values else math.nan
            row |= {"FID": fid, "ArtFID": distributions.art_fid(lpips, fid)}
        if min(len(made), len(real)) > 3:
            row |= dict(zip(("KID", "KID low", "KID high"), distributions.kernel_distance(made, real), strict=True))
        found.append(row)
    return found


def plots(
    figures: Mapping, axis: str | None, baseline: str, blank: str | None, compared: Sequence[str]
) -> dict[str, Image.Image]:
    """Title -> a picture of curves, for every compared ruler against the axis."""
    found: dict[str, Image.Image] = {}
    if axis is None:
        return found
    across = RULERS[axis].title
    for name in compared:
        lines: dict[str, list[Point]] = defaultdict(list)
        for key, ruler in figures:
            if ruler == name and (key, axis) in figures:
                text = "" if key[1] is None else f"{key[1]:g}"
                lines[key[0]].append(Point(_drawn(figures[key, axis]), _drawn(figures[key, name]), text))
        start = [replace(point, label="") for point in lines.get(blank or "", [])]
        drawn = [
            Line(m, [*(start if m == baseline else []), *points], m == baseline) for m, points in sorted(lines.items())
        ]
        if drawn:
            found[f"{RULERS[name].title} against {across}"] = curves(drawn, across, RULERS[name].title)
    return found


def mean(row: NDArray) -> float:
    """Of the finite values; NaN without any."""
    finite_values = row[np.isfinite(row)]
    return float(finite_values.mean()) if finite_values.size else math.nan


def _drawn(x: Interval) -> Interval:
    return x if math.isfinite(x.low) else Interval(x.value, x.value, x.value, x.n)


def sheets(
    outputs: Sequence[Output], values: Values, axis: str | None, compared: Sequence[str]
) -> dict[str, Image.Image]:
    """Title -> contact sheet of a method's best and worst pictures, at the strength with the most style."""
    used = [n for n in (axis, *compared) if n]
    total = np.zeros(len(outputs))
    for name in used:
        row = values[name] * (1 if RULERS[name].more else -1)
        deviation = row[np.isfinite(row)].std()
        total += np.nan_to_num((row - mean(row)) / deviation) if deviation > 0 else 0
    groups = compare.rows_of(outputs)
    found = {}
    for method in sorted({o.method for o in outputs}):
        keys = [key for key in groups if key[0] == method]
        sign = 1 if axis is None or RULERS[axis].more else -1
        means = {key: sign * mean(values[axis][groups[key]]) if axis else 0.0 for key in keys}
        best = max(keys, key=lambda key, means=means: np.nan_to_num(means[key], nan=-np.inf))
        order = groups[best][np.argsort(-total[groups[best]], kind="stable")]
        count = max(1, min(EXTREME, len(order) // 2))
        rows, labels = [], []
        for title, chosen in (("best", order[:count]), ("worst", order[::-1][:count])):
            for i in range(0, len(chosen), ACROSS):
                rows.append([cell for k in chosen[i : i + ACROSS] for cell in _cells(outputs[k])])
                labels.append(title if i == 0 else "")
        found[f"{label(*best)}: best and worst"] = contact_sheet(rows, labels, cell=96, label_width=60)
    return found


def _cells(output: Output) -> list[SheetCell | None]:
    given = [("style", output.style), ("content", output.content)]
    cells = [SheetCell(load_image(p.path), name, is_input=True) for name, p in given if p]
    return [*cells, SheetCell(load_image(output.path), output.name)]


def finite(value: object) -> object:
    """NaN and infinity as null, which JSON has; tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(x) for key, x in value.items()}
    return [finite(x) for x in value] if isinstance(value, list | tuple) else value


def _write_tables(report: Path, result: Json, values: Values, outputs: Sequence[Output]) -> None:
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(report / "report.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    rows = [
        [
            o.method,
            "" if o.strength is None else o.strength,
            o.name,
            *(("" if np.isnan(v[i]) else v[i]) for v in values.values()),
        ]
        for i, o in enumerate(outputs)
    ]
    _write_csv(report / "values.csv", ["method", "strength", "name", *values], rows)
    figures = [list(row.values()) for row in result["figures"]]
    _write_csv(report / "figures.csv", FIGURE, figures)


def _write_csv(file: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as target:
            csv.writer(target).writerows([head, *rows])

    atomic_write(file, write)
