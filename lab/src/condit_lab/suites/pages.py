"""Pages of the documentation with places that a command fills anew: `<!-- KIND:NAME -->` ... `<!-- /KIND -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from condit.data.files import atomic_write


def fill(page: str, kind: str, text: Callable[[str], str | None]) -> str:
    """The page with every place of a kind filled by text(name), whole lines; None leaves what stands there."""

    def filled(match: re.Match[str]) -> str:
        new = text(match["name"])
        return match[0] if new is None else match["open"] + new + match["close"]

    return _place(kind).sub(filled, page)


def names(page: str, kind: str) -> list[str]:
    """The names of the places of a kind, in order."""
    return [match["name"] for match in _place(kind).finditer(page)]


def fill_file(file: Path, kind: str, texts: Mapping[str, str]) -> Path:
    """Puts `texts` into their places of a file, the others stay; ValueError, and nothing written, if one has none."""
    page = file.read_text(encoding="utf-8")
    if lost := sorted(texts.keys() - set(names(page, kind))):
        raise ValueError(
            f"{file} has no place for {lost[0]!r}: lines <!-- {kind}:{lost[0]} --> and <!-- /{kind} --> are expected."
        )
    text = fill(page, kind, texts.get)
    return atomic_write(file, lambda path: path.write_text(text, encoding="utf-8"))


def _place(kind: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<open><!-- {kind}:(?P<name>\S+) -->\n).*?(?P<close><!-- /{kind} -->)", re.S)
