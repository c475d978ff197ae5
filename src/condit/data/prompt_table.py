"""Paired sets from a text-to-image model: subjects x styles -> prompts -> images -> groups (DEADiff, arXiv:2403.06951,
section 3.3: 12,000 subjects, each with about 14 of 700 styles, four images for each prompt).

Images of one prompt share a style; images of one subject under different prompts share a content.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from condit.data.files import read_bounded

TEMPLATE = "{subject}, {style}"
PER_SUBJECT = 14  # styles of each subject in the paper
MAX_WORDS_BYTES = 100_000_000
IMAGES = 4  # images of each prompt in the paper


@dataclass(frozen=True)
class PromptRow:
    """A prompt with its subject and style."""

    subject: str
    style: str
    prompt: str


def read_words(file: str | Path) -> list[str]:
    """The phrases of a file, one a line, without empty lines and lines that begin with #. ValueError for an empty file
    or a repeated phrase."""
    try:
        text = read_bounded(file, MAX_WORDS_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}.") from error
    lines = (line.strip() for line in text.splitlines())
    words = [line for line in lines if line and not line.startswith("#")]
    twice = next((word for word, count in Counter(words).items() if count > 1), None)
    if not words or twice is not None:
        problem = "no phrase" if twice is None else f"{twice!r} twice"
        raise ValueError(f"{file} has {problem}; expected one phrase a line.")
    return words


def prompt_table(
    subjects: Sequence[str],
    styles: Sequence[str],
    *,
    per_subject: int = PER_SUBJECT,
    template: str = TEMPLATE,
    seed: int = 0,
) -> list[PromptRow]:
    """Every subject in `per_subject` different random styles. A subject's styles do not depend on the other subjects,
    so a list may grow. ValueError for fewer styles than that, or for another template."""
    if "{subject}" not in template or "{style}" not in template:
        raise ValueError(f"template must contain {{subject}} and {{style}}; found {template!r}.")
    if not 1 <= per_subject <= len(styles):
        raise ValueError(f"per_subject must be 1 to {len(styles)}, the number of styles; found {per_subject}.")
    return [
        PromptRow(subject, style, template.replace("{subject}", subject).replace("{style}", style))
        for subject in subjects
        for style in random.Random(f"{seed} {subject}").sample(list(styles), per_subject)
    ]


def named(row: PromptRow, images: int, seed: int) -> tuple[int, list[str]]:
    """The first seed and the files of a row's images."""
    digest = hashlib.sha256(f"{seed} {row.prompt}".encode()).hexdigest()
    # Each prompt has its own seeds: equal noise gives equal layouts, so pairs would share more than a style.
    return int(digest[:7], 16), [f"images/{digest[:16]}-{k}.png" for k in range(images)]


def strays(folder: str | Path, files: Collection[str], *, prune: bool = False) -> tuple[str, ...]:
    """The images of other tables in the folder of a set, by name. ValueError if there is one, unless `prune`."""
    root = Path(folder)
    found = {path.relative_to(root).as_posix() for path in root.glob(f"images/{'[0-9a-f]' * 16}-*.png")}
    others = tuple(sorted(found - set(files)))
    if others and not prune:
        raise ValueError(
            f"{root} holds {len(others)} images that the table of prompts does not have (first: "
            f"{Path(others[0]).name}). Add --prune to delete them, or choose another folder."
        )
    return others
