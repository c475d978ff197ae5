"""Captions of icons in English and Chinese: "red apple, openmoji outline style" and what users type around it."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from condit_lab.icons.styles import style_of

if TYPE_CHECKING:
    from condit_lab.icons.world import Icon

Language = Literal["en", "zh"]

_LEADS_EN = ("a drawing of {}", "an icon of {}", "a picture of {}", "an emoji of {}", "an illustration of {}")
_LEADS_ZH = ("一个{}", "{}的图标", "{}的图画", "一幅{}的画", "{}的插图")
_CLAUSES_EN = ("{}, {} style", "{} in {} style", "{}, in the style of {}")
_CLAUSES_ZH = ("{}，{}风格", "{}，{}的风格", "{}，用{}风格")


def plain_caption(
    icon: Icon, language: Language = "en", concepts: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """The canonical caption "{label}, {style} style". Chinese labels stand in concepts; without them the label stays
    English."""
    style = style_of(icon.style)
    if language == "zh":
        return _CLAUSES_ZH[0].format(label_of(icon, concepts, "zh"), style.name_zh)
    return _CLAUSES_EN[0].format(icon.label, style.name_en)


def caption(
    icon: Icon,
    concepts: Mapping[str, Mapping[str, Any]],
    rng: Random,
    language: Language | None = None,
    *,
    p_empty: float = 0.1,
    p_no_style: float = 0.5,
    p_describe: float = 0.3,
    p_tags: float = 0.3,
    p_lead: float = 0.3,
    p_short: float = 0.2,
    p_chinese: float = 0.3,
) -> str:
    """A caption for training. Empty for guidance with p_empty; else the label, led by an article or "a drawing of" with
    p_lead, the style clause dropped with p_no_style, else told by a description instead of the name with p_describe;
    one or two tags appended with p_tags (never alone: they are loose); "cat face" becomes "cat" with p_short.
    language None draws Chinese with p_chinese."""
    if rng.random() < p_empty:
        return ""
    language = language or ("zh" if rng.random() < p_chinese else "en")
    text = label_of(icon, concepts, language)
    if rng.random() < p_short:
        text = _short(text, icon.group, language)
    if rng.random() < p_lead:
        text = _lead(text, rng, language)
    if rng.random() >= p_no_style:
        text = _style_clause(text, icon.style, rng, language, p_describe)
    if rng.random() < p_tags:
        tags = concepts.get(icon.hex, {}).get(f"tags_{language}") or []
        chosen = rng.sample(list(tags), min(len(tags), rng.choice((1, 2))))
        text = ("，" if language == "zh" else ", ").join([text, *chosen])
    return text


def label_of(icon: Icon, concepts: Mapping[str, Mapping[str, Any]] | None, language: Language) -> str:
    """The concept's name in the language; English where there is no other."""
    return (concepts or {}).get(icon.hex, {}).get(f"label_{language}") or icon.label


def with_article(label: str) -> str:
    """ "apple" -> "an apple". Plurals, clauses ("person: bald") and names ("Tokyo tower") stay bare."""
    first, last = label.split(" ")[0], label.split(" ")[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if plural or ":" in label or not label[0].islower() or first in _BARE_FIRST:
        return label
    # "one", "u-turn", "unicorn" and "ukulele" start with a consonant sound, "hourglass" with a vowel.
    vowel = label[0] in "aeiou" and not label.startswith(("one", "u-", "uni", "uku", "euro"))
    return f"{'an' if vowel or label.startswith('hour') else 'a'} {label}"


_BARE_FIRST = {"a", "an", "the", "no", "two", "three", "hear-no-evil", "men", "women", "people", "cooked", "raising"}


def _lead(text: str, rng: Random, language: Language) -> str:
    if language == "zh":
        return rng.choice(_LEADS_ZH).format(text)
    named = with_article(text)
    return named if rng.random() < 0.5 else rng.choice(_LEADS_EN).format(named)


def _short(text: str, group: str, language: Language) -> str:
    if group != "animals-nature":  # a "grinning face" needs its face
        return text
    return text.removesuffix("脸") or text if language == "zh" else text.removesuffix(" face")


def _style_clause(text: str, key: str, rng: Random, language: Language, p_describe: float) -> str:
    style = style_of(key)
    if style.descriptions and rng.random() < p_describe:
        words = rng.choice(style.descriptions)
        return f"{text}，{words[1]}" if language == "zh" else f"{text}, {words[0]}"
    clauses, name = (_CLAUSES_ZH, style.name_zh) if language == "zh" else (_CLAUSES_EN, style.name_en)
    clause = clauses[0] if rng.random() < 0.7 else rng.choice(clauses[1:])
    return clause.format(text, name)
