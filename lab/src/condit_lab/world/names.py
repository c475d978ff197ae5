"""Icon names to concepts: "shopping-cart-plus-02" is a shopping cart with a plus sign.

`tables/names.tsv` lists the noun phrases that are concepts: `name, zh, concept`; concept is empty where the phrase is
the concept's own name, else another phrase or the label of an emoji. A name that leads to no phrase is left out."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from condit_lab.world.emoji import EmojiConcept, slug
from condit_lab.world.sets import read_table

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNTER = re.compile(r"\d+|v\d|[a-f]")
_NEUTRAL = {
    *("alt", "simple", "variant", "o", "outline", "filled", "fill", "solid", "default", "new", "classic"),
    *("minimalistic", "rounded", "duotone", "stroke", "sharp", "straight", "broad", "tilt", "tilted", "fine"),
    *("jp", "in", "thick", "thin", "bold", "light", "regular", "big", "large", "small", "md", "lg", "sm", "long"),
}
_MAX_DETAILS = 2
# Sets that start a name with the chapter it is in ("health-dentistry-tooth").
_CHAPTERED = {"streamline-pixel"}
_COUNTED_IN_WORDS = {"icon-park", "icon-park-outline", "icon-park-solid", "icon-park-twotone"}
# Trademarks under a plain word, by whole name: the set's "apple" is a logo while its "apple-01" may be the fruit.
_LOGOS = {
    "apple": {
        *("ant-design", "basil", "bi", "duo-icons", "flowbite", "fontisto", "grommet-icons", "hugeicons", "ic"),
        *("icon-park", "icon-park-outline", "icon-park-solid", "icon-park-twotone", "jam", "la", "mage", "mdi"),
        *("mingcute", "picon", "pixel", "pixelarticons", "proicons", "ri", "si", "streamline-flex"),
        *("streamline-flex-color", "teenyicons", "uil"),
    },
    "drive": {"mingcute", "ri"},
}
_LOGO_ANYWHERE = {"windows", "vine", "fedora", "opera"}
# Names that mean something else in one set; "" = nothing that is known.
_HERE = {
    ("mouse", "game-icons"): "mouse animal",
    ("seal", "ph"): "",
    ("seal", "mingcute"): "",
    ("fork", "tdesign"): "",
    ("fork", "carbon"): "",
    ("fork", "ant-design"): "",
}


@dataclass(frozen=True)
class Phrase:
    """A noun phrase in both languages and the concept it names."""

    label_en: str
    label_zh: str
    concept: str


@dataclass(frozen=True)
class Reading:
    """What an icon's name says: a phrase and up to two details, which are patterns such as "{} with a plus sign"."""

    phrase: Phrase
    details: tuple[tuple[str, str], ...] = ()

    @property
    def label_en(self) -> str:
        text = self.phrase.label_en
        for english, _ in self.details:
            text = english.format(text)
        return text

    @property
    def label_zh(self) -> str:
        text = self.phrase.label_zh
        for _, chinese in self.details:
            text = chinese.format(text)
        return text


@functools.cache
def details() -> dict[str, tuple[str, str]]:
    """Last words of a name that add something to the drawing of the thing itself."""
    return {row["word"]: (row["en"], row["zh"]) for row in read_table("details.tsv")}


def phrases(emoji: Mapping[str, EmojiConcept]) -> dict[str, Phrase]:
    """Every phrase by its slug: emoji labels first, then the tables. Raises where a table names no concept."""
    known = {slug(entry.label_en): Phrase(entry.label_en, entry.label_zh, entry.key) for entry in emoji.values()}
    own = {slug(row["name"]): row for row in read_table("names.tsv")}
    out = dict(known)
    for key, row in own.items():
        target = slug(row["concept"] or row["name"])
        if target in known:
            concept = known[target].concept
        elif target in own and not own[target]["concept"]:
            concept = target
        else:
            raise ValueError(f"The names table maps {row['name']!r} to {row['concept']!r}, which is not a concept.")
        out[key] = Phrase(row["name"], row["zh"], concept)
    return out


def read_name(stem: str, icon_set: str, known: Mapping[str, Phrase]) -> Reading | None:
    """The reading of a name without its variant ("bell", not "bell-bold"); None where it names nothing known."""
    if stem in _LOGO_ANYWHERE or icon_set in _LOGOS.get(stem, ()):
        return None
    words = stem.split("-")
    starts = range(len(words)) if icon_set in _CHAPTERED else (0,)
    for start in starts:
        reading = _read(words[start:], icon_set, known)
        if reading is not None:
            return reading
    return None


def _read(words: list[str], icon_set: str, known: Mapping[str, Phrase]) -> Reading | None:
    parts_of_name: list[tuple[str, str]] = []
    while words:
        key = "-".join(words)
        key = _HERE.get((key, icon_set), key).replace(" ", "-")
        phrase = (known.get(key) or known.get(singular(key))) if key else None
        if phrase is not None:
            return Reading(phrase, tuple(reversed(parts_of_name)))
        last = words[-1]
        if _COUNTER.fullmatch(last) or last in _NEUTRAL or (icon_set in _COUNTED_IN_WORDS and last in _NUMBERS):
            words = words[:-1]
        elif last in details() and len(parts_of_name) < _MAX_DETAILS and len(words) > 1:
            parts_of_name.append(details()[last])
            words = words[:-1]
        else:
            return None
    return None


def singular(key: str) -> str:
    """ "cherries" -> "cherry", "cups" -> "cup"; empty where the slug is no plural."""
    if key.endswith("ies"):
        return f"{key[:-3]}y"
    return key[:-1] if key.endswith("s") and not key.endswith("ss") else ""
