"""One pass over a stream of pairs: size, duplicates, agreement of text and image, agreement of pairs. What is held in
memory does not grow with the set."""

from __future__ import annotations

import random
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from condit.data.images import ImageSource, load_image, to_tensor
from condit.data.pairs import Pair
from condit.data.sheets import SheetCell, contact_sheet
from condit.encoders.clip import CONCEPT, STYLE
from condit.encoders.image import TinyImage, TinyTextTower
from condit.pairs.build import Row
from condit.pairs.sets import OnError, header, read_bytes
from condit.weights.catalog import MODELS, describe_hash
from condit.weights.clip_towers import load_image_encoder, load_text_tower, weight_file
from condit.weights.tiny import load_clip

Span = tuple[float, float]  # the lowest and the highest cosine that is kept

SHOWN, COLUMNS, CELL = 24, 8, 96  # rejected rows on a sheet
DECODED = 512  # pixels of a side: a batch of large photos must fit into memory
BINS = 200  # of a histogram of cosines, -1 to 1
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
DCT = np.cos(np.pi / 32 * np.arange(8)[:, None] * (np.arange(32) + 0.5))  # the first rows of a cosine transform


@dataclass(frozen=True)
class FilterRules:
    """min_side: in pixels. max_ratio: the longer side by the shorter one. distance: bits of 64 in which two perceptual
    hashes of one image differ at most, 0 to 7; None: no filter. text, agree: spans of cosines, by role for `agree`;
    a figure without a span is measured only."""

    min_side: int = 64
    max_ratio: float = 4.0
    distance: int | None = 3
    text: Span | None = None
    agree: Mapping[str, Span] = field(default_factory=dict)

    def __post_init__(self):
        if self.distance is not None and not 0 <= self.distance <= 7:
            raise ValueError(f"distance must be 0 to 7 bits; found {self.distance}.")


@dataclass(frozen=True)
class PairEncoder:
    """Images and words -> rows (n, E) of one space. parts: the dimensions that compare a role; others compare all."""

    name: str
    images: Callable[[Sequence[Image.Image]], Tensor]
    words: Callable[[Sequence[str]], Tensor]
    parts: Mapping[str, slice] = field(default_factory=dict)

    def agreement(self, a: Tensor, b: Tensor, role: str = "") -> list[float]:
        """Cosines (n,) of rows."""
        part = self.parts.get(role, slice(None))
        return F.cosine_similarity(a[:, part].float(), b[:, part].float()).tolist()


def load_encoder(folder: str | None) -> PairEncoder:
    """A CLIP from its folder; None: the embedded one, which compares style and content in dimensions of their own."""
    if folder is not None:
        tower, text = load_image_encoder(folder), load_text_tower(folder)
        return PairEncoder(f"{folder} {weight_file(folder).name}", lambda x: tower.embeds(tower.pixels(x)), text)
    path = MODELS["tiny"].path
    clip, tokenizer = load_clip(path / "clip")
    image = TinyImage(clip.requires_grad_(False))
    words, width = TinyTextTower(image, tokenizer), TinyImage.embedding

    def images(pictures: Sequence[Image.Image]) -> Tensor:
        return image(torch.stack([to_tensor(picture, image.size, fit="pad") for picture in pictures]))[:, width]

    parts = {"style": STYLE, "content": CONCEPT, "subject": CONCEPT}
    return PairEncoder(f"tiny {describe_hash(path)}", images, lambda phrases: words(phrases)[:, width], parts)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which of the 8 x 8 lowest cosine components of the luma at 32 x 32 px exceed their median (pHash)."""
    luma = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
    low = (DCT @ luma @ DCT.T).round(6).flatten()
    return int("".join("1" if bit else "0" for bit in low > np.median(low[1:])), 2)


class Hashes:
    """The hashes so far, in a temporary file. Hashes that differ in d bits agree in one of d + 1 bands at least."""

    def __init__(self, distance: int):
        self.distance, self.db = distance, sqlite3.connect("", isolation_level=None)  # "": deleted when it is closed
        ends = [64 * i // (distance + 1) for i in range(distance + 2)]
        self.bands = [(a, (1 << (b - a)) - 1) for a, b in zip(ends, ends[1:], strict=False)]
        self.db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN;"
            "CREATE TABLE seen (band INT, value TEXT, hash TEXT, PRIMARY KEY (band, value, hash)) WITHOUT ROWID"
        )

    def add(self, code: int) -> bool:
        """Adds a hash. False, and it is not added, if one like it is there."""
        rows = [(band, f"{code >> shift & mask:x}") for band, (shift, mask) in enumerate(self.bands)]
        for row in rows:
            for (other,) in self.db.execute("SELECT hash FROM seen WHERE band = ? AND value = ?", row):
                if (int(other, 16) ^ code).bit_count() <= self.distance:
                    return False
        self.db.executemany("INSERT INTO seen VALUES (?, ?, ?)", [(*row, f"{code:x}") for row in rows])
        return True


def small(source: ImageSource) -> Image.Image:
    """An image of at most DECODED px."""
    image = load_image(source)
    image.thumbnail((DECODED, DECODED))
    return image


class Tally:
    """What became of the rows that reached a filter: their number, those rejected and a random sample of these, and the
    histogram of the filter's cosine."""

    def __init__(self):
        self.rows = self.rejected = 0
        self.shown: list[tuple[Image.Image, Image.Image | None, str]] = []
        self.histogram, self.rng = np.zeros(BINS, np.int64), random.Random(0)

    def passes(self, ok: bool, image: Callable[[], Image.Image], reference: Image.Image | None, text: str) -> bool:
        self.rows, self.rejected = self.rows + 1, self.rejected + (not ok)
        place = len(self.shown) if len(self.shown) < SHOWN else self.rng.randrange(max(1, self.rejected))
        if not ok and place < SHOWN:
            self.shown[place : place + 1] = [(image(), reference, text)]
        return ok

    def measured(self, figure: float, span: Span | None, image: Image.Image, reference: Image.Image | None) -> bool:
        """Counts a cosine; whether it is in its span."""
        self.histogram[min(BINS - 1, max(0, int((figure + 1) / 2 * BINS)))] += 1
        return self.passes(span is None or span[0] <= figure <= span[1], lambda: image, reference, f"{figure:.2f}")

    def sheet(self, title: str) -> Image.Image:
        """The sample; under each row of images its references, if it has any."""
        rows: list[list[SheetCell | None]] = []
        for start in range(0, len(self.shown), COLUMNS):
            part = self.shown[start : start + COLUMNS]
            rows.append([SheetCell(image, text) for image, _, text in part])
            if any(reference for _, reference, _ in part):
                rows.append([None if r is None else SheetCell(r, is_input=True) for _, r, _ in part])
        return contact_sheet(rows, [""] * len(rows), title=title, cell=CELL, label_width=0)

    def card(self) -> dict[str, object]:
        """Rows, those kept, their share and, of a cosine, quantiles to 0.01."""
        kept, total = self.rows - self.rejected, self.histogram.cumsum()
        places = [int(np.searchsorted(total, share * total[-1])) for share in QUANTILES] if total[-1] else []
        figures = {str(q): round((x + 1) / BINS * 2 - 1, 2) for q, x in zip(QUANTILES, places, strict=False)}
        shares = {"rows": self.rows, "kept": kept, "share": round(kept / max(1, self.rows), 4)}
        return {**shares, "quantiles": figures} if figures else {**shares}


class Filters:
    """`Filters(rules, encoder)(rows, on_error)` yields the rows that are kept, with their figures as columns, and calls
    on_error(place, text) for those that cannot be read. Then `read` is the number of rows, `tallies` say what became of
    them by filter: "size", "duplicate", "text" and the roles."""

    def __init__(self, rules: FilterRules, encoder: PairEncoder, *, batch: int = 32):
        self.rules, self.encoder, self.batch, self.read = rules, encoder, batch, 0
        self.hashes = None if rules.distance is None else Hashes(rules.distance)
        self.tallies: dict[str, Tally] = defaultdict(Tally)

    def __call__(self, rows: Iterable[Row], on_error: OnError) -> Iterator[Row]:
        stream = iter(rows)
        while chunk := list(islice(stream, self.batch)):
            self.read += len(chunk)
            images: dict[int, Image.Image] = {}
            for i, (place, pair) in enumerate(chunk):
                try:
                    image = self.decode(pair)
                except (ValueError, OSError) as error:
                    on_error(place, str(error))
                else:
                    images |= {} if image is None else {i: image}
            yield from self.agree([chunk[i] for i in images], list(images.values()), on_error)

    def decode(self, pair: Pair) -> Image.Image | None:
        """The image of a row that passes the filters before an encoder. What is too small or large is not decoded."""
        data = read_bytes(pair.image)
        (width, height), rules = header(data)[1], self.rules
        large = min(width, height) >= rules.min_side and max(width, height) <= rules.max_ratio * min(width, height)
        if not self.tallies["size"].passes(large, lambda: small(data), None, f"{width} x {height}"):
            return None
        image = small(data)
        if self.hashes is None:
            return image
        new = self.hashes.add(perceptual_hash(image))
        return image if self.tallies["duplicate"].passes(new, lambda: image, None, "") else None

    def agree(self, rows: Sequence[Row], images: Sequence[Image.Image], on_error: OnError) -> Iterator[Row]:
        """The filters by the encoder, for a batch of decoded rows."""
        if not rows:
            return
        looks = self.encoder.images(images)
        texts = self.encoder.agreement(looks, self.encoder.words([pair.text for _, pair in rows]))
        for (place, pair), image, look, figure in zip(rows, images, looks, texts, strict=True):
            columns: dict[str, object] = {}
            if pair.text:
                columns["text_agreement"] = round(figure, 4)
                if not self.tallies["text"].measured(figure, self.rules.text, image, None):
                    continue
            references = dict(pair.references)
            try:
                ok = all(self.compare(role, image, look, references, columns) for role in pair.references)
            except (ValueError, OSError) as error:
                on_error(place, f"a reference: {error}")
                continue
            if ok:
                yield place, replace(pair, references=references, columns={**pair.columns, **columns})

    def compare(self, role: str, image: Image.Image, look: Tensor, references: dict, columns: dict) -> bool:
        """Leaves the references of a role that agree with the target, for a role that is filtered or that the encoder
        compares in dimensions of its own (an edge map does not look like its picture). Whether one is left."""
        if role not in self.rules.agree and role not in self.encoder.parts:
            return True
        images = [small(source) for source in references[role]]
        figures = self.encoder.agreement(look[None].expand(len(images), -1), self.encoder.images(images), role)
        span = self.rules.agree.get(role)
        inside = [i for i, figure in enumerate(figures) if span is None or span[0] <= figure <= span[1]]
        best = inside[0] if inside else int(np.argmax(figures))
        columns[f"{role}_agreement"] = round(figures[best], 4)
        references[role] = tuple(references[role][i] for i in inside)
        return self.tallies[role].measured(figures[best], span, image, images[best])
