"""Vendors' icon names to code points: sets name one concept differently, and splits by name would leak."""

from __future__ import annotations

import json
import re
import tarfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condit_lab.icons.world import base_of, key_of

_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
_NUMBERED = re.compile(r"-[123]$")
_DROPPED_GROUPS = {"component", "flags"}
_SHORTCODES = ("emojibase", "emojibase-legacy", "cldr", "iamcal", "github", "joypixels")


@dataclass(frozen=True)
class Concepts:
    """What emojibase knows: concepts by key (labels, tags, group), and every name a key goes by, best names first."""

    table: dict[str, dict[str, Any]]
    labels: dict[str, str]
    shortcodes: dict[str, str]
    official: dict[str, str]


def slug(text: str) -> str:
    """ "Man’s shoe" -> "mans-shoe", "piñata" -> "pinata"."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’.“”()!]", "", plain)).strip("-")


def squeeze(name: str) -> str:
    """Letters and digits only: fxemoji writes "articulatedlorry"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_concepts(emojibase: Path) -> Concepts:
    """Concepts of the emojibase tarball; letters, components, country flags and skin tones are left out."""
    with tarfile.open(emojibase, "r:gz") as tar:
        read = {
            name: json.load(_open(tar, f"package/{name}.json"))
            for name in ("en/data", "zh/data", "meta/groups", "meta/unicode-names")
        } | {name: json.load(_open(tar, f"package/en/shortcodes/{name}.json")) for name in _SHORTCODES}
    groups = read["meta/groups"]["groups"]
    chinese = {key_of(entry["hexcode"]): entry for entry in read["zh/data"]}
    table, labels, shortcodes, official = {}, {}, {}, {}
    for entry in read["en/data"]:
        key = key_of(entry["hexcode"])
        group = groups.get(str(entry.get("group")))
        if group is None or group in _DROPPED_GROUPS or any(tone in key for tone in _TONES):
            continue
        table[key] = {
            "base": base_of(key),
            "label_en": entry["label"],
            "label_zh": chinese.get(key, {}).get("label", ""),
            "tags_en": entry.get("tags", []),
            "tags_zh": chinese.get(key, {}).get("tags", []),
            "group": group,
        }
        labels.setdefault(slug(entry["label"]), key)
    for source in _SHORTCODES:
        for hexcode, codes in read[source].items():
            for code in [codes] if isinstance(codes, str) else codes:
                # "+1" would become "1" and name noto's digit one "thumbs up".
                if key_of(hexcode) in table and not code.startswith(("+", "-")):
                    shortcodes.setdefault(slug(code), key_of(hexcode))
    for hexcode, name in read["meta/unicode-names"].items():
        if key_of(hexcode) in table:
            official.setdefault(slug(name), key_of(hexcode))
    return Concepts(table, labels, shortcodes, official)


def read_chars(package: Path) -> dict[str, str]:
    """Names to keys as an iconify set gives them in `chars.json`; empty in most sets."""
    with tarfile.open(package, "r:gz") as tar:
        chars = json.load(_open(tar, "package/chars.json"))
    names: dict[str, str] = {}
    for hexcode, name in chars.items():
        names.setdefault(name, key_of(hexcode))
    return names


def read_aliases(concepts: Concepts) -> dict[str, dict[str, str | None]]:
    """The hand-made table: style ("*" = all) -> a vendor's name -> a concept's key, or None where no concept fits."""
    text = Path(__file__).with_name("icon_aliases.json").read_text(encoding="utf-8")
    keys = {entry["label_en"]: key for key, entry in concepts.table.items()}
    return {
        style: {name: keys[label] if label else None for name, label in names.items()}
        for style, names in json.loads(text).items()
    }


def resolve(
    names: Iterable[str],
    concepts: Concepts,
    own: Mapping[str, str],
    others: Mapping[str, str],
    corrections: Mapping[str, str | None],
    aliases: Mapping[str, str | None],
    *,
    numbered: bool = False,
) -> dict[str, str]:
    """Key -> the set's name for it. own = the set's chars.json, others = those of the other sets; corrections are made
    by hand for this set and come first, aliases by hand for all and come last; numbered sets write "bear-1". Two names
    for one key: the better source wins, then the earlier name."""
    known = {name: key for name, key in others.items() if key in concepts.table}
    sources = (dict(own), concepts.labels, known, concepts.shortcodes, concepts.official)
    squeezed = [{squeeze(name): key for name, key in reversed(source.items())} for source in sources[1:]]
    best: dict[str, tuple[int, int, str]] = {}
    for order, name in enumerate(names):
        if "skin-tone" in name:
            continue
        match = _look_up(name, corrections, sources, squeezed, aliases)
        if match is None and numbered and _NUMBERED.search(name):
            match = _look_up(_NUMBERED.sub("", name), corrections, sources, squeezed, aliases)
        if match and match[1] in concepts.table:
            rank, key = match
            best[key] = min(best.get(key, (99, 0, "")), (rank, order, name))
    return {key: name for key, (_, _, name) in best.items()}


def resolve_keys(names: Iterable[str], concepts: Concepts) -> dict[str, str]:
    """The same for sets whose file names are code points."""
    by_key: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (-len(name), name)):  # fully qualified ("26a7-fe0f") first
        if key_of(name) in concepts.table:
            by_key.setdefault(key_of(name), name)
    return by_key


def ui_concepts(names: Iterable[str], variants: Sequence[str]) -> dict[str, dict[str, str]]:
    """Concept -> variant -> name of a UI set: "bell-bold" is the concept "bell" in the variant "bold"; a bare name is
    "regular" where the set has it. Only concepts drawn in every variant; logos are trademarks and left out."""
    by_concept: dict[str, dict[str, str]] = {}
    for name in names:
        suffix = max((v for v in variants if name.endswith(f"-{v}")), key=len, default="")
        concept = name.removesuffix(f"-{suffix}") if suffix else name
        if not concept.endswith("-logo") and concept != "logo":
            by_concept.setdefault(concept, {})[suffix or "regular"] = name
    return {concept: drawings for concept, drawings in sorted(by_concept.items()) if drawings.keys() == set(variants)}


def _look_up(
    name: str,
    corrections: Mapping[str, str | None],
    sources: Sequence[Mapping[str, str]],
    squeezed: Sequence[Mapping[str, str]],
    aliases: Mapping[str, str | None],
) -> tuple[int, str] | None:
    """(rank, key) by the best source that knows the name; None where none does or a table says it fits no concept."""
    blocked = corrections.get(name, "") is None or (name not in corrections and aliases.get(name, "") is None)
    if blocked:
        return None
    tables = (corrections, *sources, *squeezed, aliases)
    for rank, table in enumerate(tables):
        spelled = squeeze(name) if len(sources) < rank <= len(sources) + len(squeezed) else name
        key = table.get(spelled)
        if key is not None:
            return rank, key
    return None


def _open(tar: tarfile.TarFile, name: str):
    try:
        handle = tar.extractfile(name)
    except KeyError:
        handle = None
    if handle is None:
        raise ValueError(f"{tar.name} has no file {name}. Remove it and fetch the pinned version again.")
    return handle
