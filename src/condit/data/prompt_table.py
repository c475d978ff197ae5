"""Paired sets made by a text-to-image model: subjects x styles -> prompts -> pictures -> groups (DEADiff,
arXiv:2403.06951, section 3.3: 12,000 subjects, each with about 14 of 700 styles, four pictures a prompt).

Pictures of one prompt share a style; pictures of one subject under different prompts share a content.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from condit.data.files import atomic_write
from condit.data.images import save_image
from condit.data.pairs import METADATA

TEMPLATE = "{subject}, {style}"
PER_SUBJECT = 14  # styles of a subject in the paper
IMAGES = 4  # pictures of a prompt in the paper

# (prompt, seed, count) -> pictures, the first from `seed`, the next from seed + 1, ...
Generator = Callable[[str, int, int], Sequence[Image.Image]]


@dataclass(frozen=True)
class Row:
    """A prompt and the words that it is made of."""

    subject: str
    style: str
    prompt: str


def read_words(file: str | Path) -> list[str]:
    """One phrase a line; empty lines and lines that begin with # are left out. ValueError for none, or one twice."""
    lines = (line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines())
    words = [line for line in lines if line and not line.startswith("#")]
    twice = next((word for word, count in Counter(words).items() if count > 1), None)
    if not words or twice is not None:
        found = "no phrase" if twice is None else f"{twice!r} twice"
        raise ValueError(f"{file} holds {found}; one phrase a line is expected.")
    return words


def prompt_table(
    subjects: Sequence[str],
    styles: Sequence[str],
    *,
    per_subject: int = PER_SUBJECT,
    template: str = TEMPLATE,
    seed: int = 0,
) -> list[Row]:
    """Every subject in `per_subject` styles drawn at random, none twice. A subject's styles do not depend on the other
    subjects, so a list may grow. ValueError where there are fewer styles."""
    if "{subject}" not in template or "{style}" not in template:
        raise ValueError(f"template must hold {{subject}} and {{style}}; found {template!r}.")
    if not 1 <= per_subject <= len(styles):
        raise ValueError(
            f"{per_subject} styles a subject, of {len(styles)}. Give more styles, or take fewer a subject."
        )
    return [
        Row(subject, style, template.replace("{subject}", subject).replace("{style}", style))
        for subject in subjects
        for style in random.Random(f"{seed} {subject}").sample(list(styles), per_subject)
    ]


def draw_groups(
    folder: str | Path,
    rows: Sequence[Row],
    generate: Generator,
    *,
    images: int = IMAGES,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """`images` pictures of every prompt, and metadata.jsonl with their style and content groups, which it returns.

    A prompt whose pictures are there already is not drawn again: a run that was stopped goes on.
    """
    if images < 2:
        raise ValueError(f"{images} pictures a prompt: a style pair takes two.")
    if not rows:
        raise ValueError("The table has no prompt.")
    root, lines = Path(folder), []
    for done, row in enumerate(rows):
        digest = hashlib.sha256(f"{seed} {row.prompt}".encode()).hexdigest()
        # Seeds of its own: equal noise gives prompts equal layouts, and pairs would share more than is told.
        first = int(digest[:7], 16)
        names = [f"images/{digest[:16]}-{k}.png" for k in range(images)]
        if not all((root / name).is_file() for name in names):
            pictures = generate(row.prompt, first, images)
            if len(pictures) != images:
                raise ValueError(f"{images} pictures were asked for, {len(pictures)} came for {row.prompt!r}.")
            for name, picture in zip(names, pictures, strict=True):
                save_image(picture, root / name)
        groups = {"style_group": row.prompt, "content_group": row.subject}
        told = {"text": row.prompt, **groups, **asdict(row)}
        lines += [json.dumps({"file_name": name, **told, "seed": first + k}) for k, name in enumerate(names)]
        progress(done + 1, len(rows))
    return atomic_write(root / METADATA, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
