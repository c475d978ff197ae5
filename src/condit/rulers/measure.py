"""Features of every picture (kept on disk), every ruler's value of them, and how well each ruler tells."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from condit.data.files import temporary_path
from condit.data.images import load_image
from condit.data.progress import progress_bar
from condit.rulers.encoders import FeatureEncoder
from condit.rulers.features import COMPARE
from condit.rulers.folder import Collection, Output, Picture
from condit.rulers.statistics import Interval, auc_interval

CHUNK, POOL, FOILS = 128, 80, 16
Values = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Ruler:
    """A row of rulers.toml, whose head says what the fields are."""

    name: str
    title: str
    of: str
    paper: str
    equation: str
    more: bool
    needs: str = ""
    feature: str = ""
    compare: str = ""


_ROWS = tomllib.loads(Path(__file__).with_name("rulers.toml").read_text(encoding="utf-8"))
RULERS: Mapping[str, Ruler] = {name: Ruler(name, **row) for name, row in _ROWS.items()}
DERIVED = {"own-leaks": ("own-leakage", "own-text"), "clip-leaks": ("clip-leakage", "clip-text")}
RETRIEVAL = "style-retrieval"


class View(NamedTuple):
    """A picture, or a part of it that rulers are tested on."""

    path: Path
    hash: str
    cut: str = ""


CUTS: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "": lambda image: image,
    "left": lambda image: image.crop((0, 0, max(1, image.width // 2), image.height)),
    "right": lambda image: image.crop((image.width // 2, 0, image.width, image.height)),
    # Other colours and tones on the same content: what a ruler of content should not see.
    "recoloured": lambda image: ImageOps.invert(Image.merge("RGB", (c := image.split())[1:] + c[:1])),
}


@dataclass(frozen=True)
class Store:
    """Features on disk by the pictures' and the encoders' hashes, so that a run that was stopped goes on, and memory
    does not grow with the number of pictures."""

    folder: Path
    encoders: Mapping[str, FeatureEncoder]

    def file(self, encoder: FeatureEncoder, view: View) -> Path:
        return self.folder / f"{encoder.name}-{encoder.hash[:60]}" / f"{view.hash}{view.cut}.safetensors"

    @torch.no_grad()
    def fill(self, views: Sequence[View]) -> dict[str, str]:
        """Encodes what is not there. Returns hash -> reason of pictures that cannot be read."""
        broken: dict[str, str] = {}
        unique = {(view.hash, view.cut): view for view in views}.values()
        absent = {view: [e for e in self.encoders.values() if not self.file(e, view).is_file()] for view in unique}
        done = sum(not encoders for encoders in absent.values())
        with progress_bar(len(absent), "measuring", unit="picture", done=done) as advance:
            for view, encoders in absent.items():
                if not encoders or view.hash in broken:
                    continue
                try:
                    image = CUTS[view.cut](load_image(view.path))
                except (ValueError, OSError) as error:
                    broken[view.hash] = str(error)
                    continue
                for encoder in encoders:
                    made = {name: x.contiguous() for name, x in encoder.features(image).items()}
                    target = self.file(encoder, view)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    save_file(made, part := temporary_path(target))  # not synchronised: it can be made again
                    os.replace(part, target)
                advance()
        return broken

    def rows(self, encoder: str, feature: str, views: Sequence[View]) -> Tensor:
        """(n, ...) of a feature. ValueError for a damaged file of the store."""
        rows = []
        for view in views:
            path = self.file(self.encoders[encoder], view)
            try:
                with safe_open(path, framework="pt") as file:
                    rows.append(file.get_tensor(feature).float())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
        return torch.stack(rows)


def view_of(picture: Picture | Output, cut: str = "") -> View:
    return View(picture.path, picture.hash, cut)


@torch.no_grad()
def scores(store: Store, ruler: Ruler, first: Sequence[View], second: Sequence[View | str]) -> NDArray:
    """A ruler's value of every pair of a picture and a picture or text, (n,); a ruler of quality looks at the first."""
    if ruler.of == "quality":
        return store.rows(ruler.needs, ruler.feature, first)[:, 0].double().numpy() if first else np.zeros(0)
    encoder, parts = store.encoders[ruler.needs], []
    texts = sorted({x for x in second if isinstance(x, str)})
    words = encoder.text(ruler.feature, texts) if texts and encoder.text else torch.zeros(0)
    number = {text: i for i, text in enumerate(texts)}
    every = list(zip(first, second, strict=True))
    few = len({x for pair in every for x in pair if isinstance(x, View)}) <= 2 * CHUNK
    place: dict[View, int] = {}
    rows = torch.zeros(0)
    for i in range(0, len(every), CHUNK):
        pairs = every[i : i + CHUNK]
        if not (few and place):  # memory holds the features of few pictures or of one chunk
            place = {}
            for x in (x for pair in (every if few else pairs) for x in pair if isinstance(x, View)):
                place.setdefault(x, len(place))
            rows = store.rows(ruler.needs, ruler.feature, list(place))
        a = rows[[place[x] for x, _ in pairs]]
        b = torch.stack([rows[place[x]] if isinstance(x, View) else words[number[x]] for _, x in pairs])
        parts.append(COMPARE[ruler.compare](a, b).double().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)


def partner(ruler: Ruler, output: Output) -> View | str | None:
    """What a ruler compares an output with; None or "" where there is nothing."""
    style, content = output.style, output.content
    if ruler.of in ("style", "likeness"):
        return style and view_of(style)
    if ruler.of == "content":
        return content and view_of(content)
    words = {"label": style.text, "words": style.style_text} if style else {}
    return {"text": output.prompt, "quality": view_of(output), **words}.get(ruler.of)


def measure(store: Store, outputs: Sequence[Output]) -> tuple[Values, dict[str, int]]:
    """Ruler -> its value of every output, (n,), NaN where it has nothing to compare with; and of how many outputs its
    value is no finite number, which become NaN. Rulers without any value are left out."""
    values: Values = {}
    lost: dict[str, int] = {}
    chosen = [ruler for ruler in RULERS.values() if ruler.needs in store.encoders]
    with progress_bar(len(chosen), "comparing", unit="ruler") as advance:
        for ruler in chosen:
            partners = [partner(ruler, output) for output in outputs]
            known = [i for i, x in enumerate(partners) if x]
            found = scores(store, ruler, [view_of(outputs[i]) for i in known], [x for x in partners if x])
            row = np.full(len(outputs), np.nan)
            row[known] = np.where(np.isfinite(found), found, np.nan)
            if bad := int(np.count_nonzero(~np.isfinite(found))):
                lost[ruler.name] = bad
            if np.isfinite(row).any():
                values[ruler.name] = row
            advance()
    for name, (leakage, text) in DERIVED.items():
        if leakage in values and text in values:
            row = (values[leakage] > values[text]).astype(np.float64)
            values[name] = np.where(np.isfinite(values[leakage] + values[text]), row, np.nan)
    return values, lost


def retrieval(
    store: Store, ruler: Ruler, outputs: Sequence[Output], styles: Sequence[Picture]
) -> tuple[NDArray, float]:
    """Whether each output is nearer to its own reference than to 16 references of other styles, (n,), NaN without any,
    and the share that chance finds."""
    row, chance = np.full(len(outputs), np.nan), []
    sign = 1 if ruler.more else -1
    for i, output in enumerate(outputs):
        own = output.style
        if own is None:
            continue
        others = [s for s in styles if s.hash != own.hash and (s.style is None or s.style != own.style)]
        others.sort(key=lambda s: hashlib.sha256(f"{output.name}/{s.hash}".encode()).digest())
        foils = [own, *others[:FOILS]]
        if len(foils) > 1:
            found = sign * scores(store, ruler, [view_of(output)] * len(foils), [view_of(s) for s in foils])
            row[i] = found[0] > found[1:].max()
            chance.append(1 / len(foils))
    return row, float(np.mean(chance)) if chance else float("nan")


# How well a ruler tells


@dataclass(frozen=True)
class RulerPairs:
    """RulerPairs of pictures, or of a picture and a text, and the groups that they belong to."""

    how: str
    first: list[View]
    second: list[View | str]
    same: NDArray[np.bool_]
    groups: tuple[NDArray, NDArray]


@dataclass(frozen=True)
class Check:
    """Area under the ROC, and a ruler's mean value of pairs that are the same and of others (its chance level)."""

    area: Interval
    how: str
    same: float
    other: float

    @property
    def passes(self) -> bool:
        return self.area.low > 0.5


def _pairs(how: str, rows: Sequence[tuple[View, View | str, str, str]]) -> RulerPairs | None:
    """rows: both sides and their groups."""
    names = {name: i for i, name in enumerate(sorted({g for row in rows for g in row[2:]}))}
    groups = np.array([[names[a], names[b]] for _, _, a, b in rows], dtype=np.int64).reshape(-1, 2).T
    same = groups[0] == groups[1]
    if same.all() or not same.any():
        return None
    return RulerPairs(how, [row[0] for row in rows], [row[1] for row in rows], same, (groups[0], groups[1]))


def test_pairs(collection: Collection) -> dict[str, RulerPairs | None]:
    """RulerPairs of the given pictures for "style", "content", "text" and "words"."""
    contents, styles = (
        sorted(group, key=lambda p: p.hash)[:POOL] for group in (collection.contents, collection.styles)
    )
    everything = list({p.hash: p for p in (*styles, *contents)}.values())

    def grouped(
        how: str, group: Callable[[Picture], str | None], other: Callable[[Picture], str | None]
    ) -> RulerPairs | None:
        known = [(p, g) for p in everything if (g := group(p))]
        rows = [
            (view_of(a), view_of(b), g, h)
            for (a, g), (b, h) in combinations(known, 2)
            if other(a) is None or other(a) != other(b)
        ]
        return _pairs(how, rows)

    def cut(how: str, pool: Sequence[Picture], left: str, right: str) -> RulerPairs | None:
        return _pairs(how, [(view_of(a, left), view_of(b, right), a.hash, b.hash) for a, b in product(pool, pool)])

    def texts(how: str, text: Callable[[Picture], str]) -> RulerPairs | None:
        known = [p for p in everything if text(p)]
        return _pairs(how, [(view_of(a), text(b), text(a), text(b)) for a, b in product(known, known)])

    def content_of(p: Picture) -> str | None:
        return p.content or p.text or None

    return {
        "style": grouped("same style, other content", lambda p: p.style, content_of)
        or cut("halves of one reference", styles, "left", "right"),
        "content": grouped("same content, other style", content_of, lambda p: p.style)
        or cut("a picture and itself in other colours", contents or styles, "", "recoloured"),
        "text": texts("a picture and its own text", lambda p: p.text),
        "words": texts("a picture and its style's words", lambda p: p.style_text),
    }


TESTS = {
    "style": "style",
    "likeness": "content",
    "content": "content",
    "text": "text",
    "label": "text",
    "words": "words",
}


def check(store: Store, ruler: Ruler, pairs: RulerPairs | None) -> Check | None:
    """None where the given pictures cannot say."""
    if pairs is None or not ruler.compare or ruler.of == "quality":
        return None
    found = scores(store, ruler, pairs.first, pairs.second)
    if not np.isfinite(found).all():
        return None
    alike = ruler.compare in ("cosine", "intersection")  # leakage is tested as likeness, whose lack is wanted
    area = auc_interval(found if alike else -found, pairs.same, *pairs.groups)
    return Check(area, pairs.how, float(found[pairs.same].mean()), float(found[~pairs.same].mean()))
