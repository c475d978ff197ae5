"""One pass over a stream of pairs: size, duplicates, agreement of text and image, agreement of pairs. What is held in
memory does not grow with the set."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
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
from condit.pairs.writers import header, read_bytes
from condit.weights.catalog import MODELS, describe_hash
from condit.weights.clip_towers import load_image_encoder, load_text_tower, weight_file
from condit.weights.tiny import load_clip

Span = tuple[float, float]  # the lowest and the highest figure that is kept

SHOWN, COLUMNS, CELL = 24, 8, 96  # rejected rows on a sheet
DECODED = 512  # pixels of a side
BINS = 200  # of a histogram of cosines, -1 to 1
CACHE_KB = 16_384  # of the data base of hashes


@dataclass(frozen=True)
class Rules:
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
class Encoder:
    """Images and words -> rows (n, E) of one space. parts: the dimensions that compare a role; others compare all."""

    name: str
    images: Callable[[Sequence[Image.Image]], Tensor]
    words: Callable[[Sequence[str]], Tensor]
    parts: Mapping[str, slice] = field(default_factory=dict)

    def agreement(self, a: Tensor, b: Tensor, role: str = "") -> Tensor:
        """Cosines (n,) of rows."""
        part = self.parts.get(role, slice(None))
        return F.cosine_similarity(a[:, part].float(), b[:, part].float())


def load_encoder(folder: str | None) -> Encoder:
    """A CLIP from its folder; None: the embedded one, which compares style and content in dimensions of their own."""
    if folder is not None:
        tower, text = load_image_encoder(folder), load_text_tower(folder)
        return Encoder(f"{folder} {weight_file(folder).name}", lambda x: tower.embeds(tower.pixels(x)), text)
    path = MODELS["tiny"].path
    clip, tokenizer = load_clip(path / "clip")
    image = TinyImage(clip.requires_grad_(False))
    words, width = TinyTextTower(image, tokenizer), TinyImage.embedding

    def images(pictures: Sequence[Image.Image]) -> Tensor:
        return image(torch.stack([to_tensor(picture, image.size, fit="pad") for picture in pictures]))[:, width]

    parts = {"style": STYLE, "content": CONCEPT, "subject": CONCEPT}
    return Encoder(f"tiny {describe_hash(path)}", images, lambda phrases: words(phrases)[:, width], parts)


@lru_cache(maxsize=1)
def cosines(size: int = 32, count: int = 8) -> np.ndarray:
    """The first rows (count, size) of the discrete cosine transform."""
    return np.cos(np.pi / size * np.arange(count)[:, None] * (np.arange(size) + 0.5))


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which of the 8 x 8 lowest cosine components of the luma at 32 x 32 px exceed their median (pHash)."""
    luma = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
    low = (cosines() @ luma @ cosines().T).round(6).flatten()
    return int("".join("1" if bit else "0" for bit in low > np.median(low[1:])), 2)


class Hashes:
    """The hashes so far, in a temporary file. Hashes that differ in d bits agree in one of d + 1 bands at least."""

    def __init__(self, distance: int):
        self.distance, self.db = distance, sqlite3.connect("", isolation_level=None)  # "": deleted when it is closed
        ends = [64 * i // (distance + 1) for i in range(distance + 2)]
        self.bands = [(a, (1 << (b - a)) - 1) for a, b in zip(ends, ends[1:], strict=False)]
        self.db.executescript(
            f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-{CACHE_KB}; BEGIN;"
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


@dataclass
class Candidate:
    """A row; its image is decoded where it is needed."""

    place: str
    pair: Pair
    data: bytes

    @cached_property
    def image(self) -> Image.Image:
        return small(self.data)

    @property
    def code(self) -> int:
        return perceptual_hash(self.image)


def small(source: ImageSource) -> Image.Image:
    """An image of at most DECODED px, so that a batch of large photos fits into memory."""
    image = load_image(source)
    image.thumbnail((DECODED, DECODED))
    return image


class Rejected:
    """The number of rows that a filter rejected, and a random sample of them."""

    def __init__(self, name: str):
        self.count, self.rng = 0, random.Random(name)
        self.shown: list[tuple[Image.Image, Image.Image | None, str]] = []

    def add(self, candidate: Candidate, reference: Image.Image | None, text: str) -> None:
        self.count += 1
        place = len(self.shown) if len(self.shown) < SHOWN else self.rng.randrange(self.count)
        if place < SHOWN:
            self.shown[place : place + 1] = [(candidate.image, reference, text)]

    def sheet(self, title: str) -> Image.Image:
        """The sample; under each row of images its references, if it has any."""
        rows: list[list[SheetCell | None]] = []
        for start in range(0, len(self.shown), COLUMNS):
            part = self.shown[start : start + COLUMNS]
            rows.append([SheetCell(image, text) for image, _, text in part])
            if any(reference for _, reference, _ in part):
                rows.append([None if r is None else SheetCell(r, is_input=True) for _, r, _ in part])
        return contact_sheet(rows, [""] * len(rows), title=title, cell=CELL, label_width=0)


class Filters:
    """`Filters(rules, encoder)(rows, on_error)` yields the rows that are kept, with their figures as columns;
    on_error(place, text) is called for rows that cannot be read. Afterwards: `read` rows, and by filter `seen`,
    `rejected` and `histograms` of the figures."""

    def __init__(self, rules: Rules, encoder: Encoder | None, *, batch: int = 32):
        if encoder is None and (rules.text or rules.agree):
            raise ValueError("Agreement needs an encoder.")
        self.rules, self.encoder, self.batch = rules, encoder, batch
        self.hashes = None if rules.distance is None else Hashes(rules.distance)
        self.read = 0
        self.rejected: dict[str, Rejected] = {}
        self.histograms: dict[str, np.ndarray] = {}
        self.seen = Counter[str]()  # rows that reached a filter

    def __call__(self, rows: Iterable[Row], on_error: Callable[[str, str], None]) -> Iterator[Pair]:
        stream = iter(rows)
        while chunk := list(islice(stream, self.batch)):
            self.read += len(chunk)
            candidates = []
            for place, pair in chunk:
                try:
                    if isinstance(pair, str):
                        raise ValueError(pair)
                    candidate = self.decode(place, pair)
                except (ValueError, OSError) as error:
                    on_error(place, str(error))
                    continue
                candidates += [candidate] if candidate else []
            yield from self.agree(candidates, on_error)

    def passes(
        self, name: str, ok: bool, candidate: Candidate, reference: Image.Image | None = None, text: str = ""
    ) -> bool:
        """Counts a row that reached a filter; keeps it for the sheet unless it is ok."""
        self.seen[name] += 1
        rejected = self.rejected.setdefault(name, Rejected(name))
        if not ok:
            rejected.add(candidate, reference, text)
        return ok

    def decode(self, place: str, pair: Pair) -> Candidate | None:
        """The filters before an encoder. Nothing above the limits is decoded."""
        data = read_bytes(pair.image)
        (width, height), rules = header(data)[1], self.rules
        large = min(width, height) >= rules.min_side and max(width, height) <= rules.max_ratio * min(width, height)
        candidate = Candidate(place, pair, data)
        if not self.passes("size", large, candidate, None, f"{width} x {height}"):
            return None
        candidate.data, _ = b"", candidate.image
        if self.hashes is None or self.passes("duplicate", self.hashes.add(candidate.code), candidate):
            return candidate
        return None

    def agree(self, candidates: Sequence[Candidate], on_error: Callable[[str, str], None]) -> Iterator[Pair]:
        """The filters by an encoder, for a batch."""
        if self.encoder is None or not candidates:
            yield from (candidate.pair for candidate in candidates)
            return
        looks = self.encoder.images([candidate.image for candidate in candidates])
        words = self.encoder.words([candidate.pair.text for candidate in candidates])
        texts = self.encoder.agreement(looks, words).tolist()
        for candidate, look, figure in zip(candidates, looks, texts, strict=True):
            if candidate.pair.text and not self.measured("text", figure, self.rules.text, candidate, None):
                continue
            columns, references = dict(candidate.pair.columns), dict(candidate.pair.references)
            columns |= {"text_agreement": round(figure, 4)} if candidate.pair.text else {}
            try:
                ok = all(self.compare(role, candidate, look, columns, references) for role in tuple(references))
            except (ValueError, OSError) as error:
                on_error(candidate.place, str(error))
                continue
            if ok:
                yield replace(candidate.pair, columns=columns, references=references)

    def compare(self, role: str, candidate: Candidate, look: Tensor, columns: dict, references: dict) -> bool:
        """Leaves the references of a role that agree with the target, for a role that is filtered or that the encoder
        compares in dimensions of its own (an edge map does not look like its picture). Whether one is left."""
        assert self.encoder is not None
        if role not in self.rules.agree and role not in self.encoder.parts:
            return True
        images = [small(source) for source in references[role]]
        target = look[None].expand(len(images), -1)
        figures = self.encoder.agreement(target, self.encoder.images(images), role).tolist()
        low, high = self.rules.agree.get(role, (-1.1, 1.1))
        inside = [i for i, figure in enumerate(figures) if low <= figure <= high]
        best = inside[0] if inside else int(np.argmax(figures))
        columns[f"{role}_agreement"] = round(figures[best], 4)
        references[role] = tuple(references[role][i] for i in inside)
        return self.measured(role, figures[best], self.rules.agree.get(role), candidate, images[best])

    def measured(
        self, name: str, figure: float, span: Span | None, candidate: Candidate, reference: Image.Image | None
    ) -> bool:
        """Counts a cosine; whether it is in its span."""
        bin_ = min(BINS - 1, max(0, int((figure + 1) / 2 * BINS)))
        self.histograms.setdefault(name, np.zeros(BINS, np.int64))[bin_] += 1
        if span is None:
            return True
        return self.passes(name, span[0] <= figure <= span[1], candidate, reference, f"{figure:.2f}")

    def shares(self) -> dict[str, dict[str, object]]:
        """Filter -> rows that reached it, rows that it kept and their share, and quantiles of its figure."""
        shares: dict[str, dict[str, object]] = {}
        for name in {**self.rejected, **self.histograms}:
            figures = {"quantiles": self.quantiles(name)} if name in self.histograms else {}
            rows = self.seen[name] or int(self.histograms[name].sum())
            kept = rows - (self.rejected[name].count if name in self.rejected else 0)
            shares[name] = {"rows": rows, "kept": kept, "share": round(kept / rows, 4), **figures}
        return shares

    def quantiles(self, name: str, shares: Sequence[float] = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)) -> dict:
        """Quantiles of a figure over all rows that reached its filter, to 0.01."""
        total = self.histograms[name].cumsum()
        places = [int(np.searchsorted(total, share * total[-1])) for share in shares]
        return {str(share): round((place + 1) / BINS * 2 - 1, 2) for share, place in zip(shares, places, strict=True)}
