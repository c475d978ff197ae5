"""Paired sets from a text-to-image model: subjects x styles -> prompts -> images -> groups (DEADiff, arXiv:2403.06951,
section 3.3: 12,000 subjects, each with about 14 of 700 styles, four images for each prompt).

Images of one prompt share a style; images of one subject under different prompts share a content.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from condit.data.files import atomic_write, check_writable, read_bounded, remove_temporaries
from condit.data.images import save_image
from condit.data.pairs import METADATA

SETTINGS = "settings.json"
TEMPLATE = "{subject}, {style}"
PER_SUBJECT = 14  # styles of each subject in the paper
MAX_WORDS_BYTES = 100_000_000
IMAGES = 4  # images of each prompt in the paper

# (prompt, seed, count) -> images, the first from `seed`, the next from seed + 1, ...
ImageGenerator = Callable[[str, int, int], Sequence[Image.Image]]


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


def prepare_folder(
    folder: str | Path, rows: Sequence[PromptRow], settings: Mapping[str, object], *, images: int, prune: bool = False
) -> None:
    """A folder for `draw_groups` with these settings, of which "seed" is one; they are kept in settings.json. prune:
    deletes images of other tables. ValueError, and nothing is changed, for a folder made with other settings or,
    without prune, with images that the table does not have."""
    root = Path(folder)
    file, there = root / SETTINGS, set(root.glob(f"images/{'[0-9a-f]' * 16}-*.png"))
    made = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    differ = [name for name in settings if made.get(name) != settings[name]] if there else []
    if differ:
        name = differ[0]
        was = f"{name} = {made[name]!r}" if name in made else "settings that it does not record"
        raise ValueError(
            f"{root} holds images made with {was}, not {settings[name]!r}. Use the same, or choose another folder."
        )
    strays = sorted(there - {root / name for row in rows for name in named(row, images, int(str(settings["seed"])))[1]})
    if strays and not prune:
        raise ValueError(
            f"{root} holds {len(strays)} images that the table of prompts does not have (first: {strays[0].name}). "
            "Add --prune to delete them, or choose another folder."
        )
    for stray in [*strays, *root.glob("images/.*.tmp")]:  # a process that was killed leaves temporary files
        stray.unlink()
    text = json.dumps(dict(settings), indent=1) + "\n"
    atomic_write(file, lambda path: path.write_text(text, encoding="utf-8"))


def draw_groups(
    folder: str | Path,
    rows: Sequence[PromptRow],
    generate: ImageGenerator,
    *,
    images: int = IMAGES,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Generate `images` images of every prompt and metadata.jsonl with their style and content groups. Returns its
    path. Prompts whose images exist are skipped, so a stopped run continues.

    ValueError for fewer than two images, an empty table, or a generator that returns another number of images.
    """
    if images < 2:
        raise ValueError(f"images must be at least 2, as a style pair needs two; found {images}.")
    if not rows:
        raise ValueError("The table has no prompt.")
    root, lines = Path(folder), []
    remove_temporaries(root)
    check_writable(root / METADATA)
    for done, row in enumerate(rows):
        first, names = named(row, images, seed)
        if not all((root / name).is_file() for name in names):
            pictures = generate(row.prompt, first, images)
            if len(pictures) != images:
                raise ValueError(f"generate returned {len(pictures)} images for {row.prompt!r}; expected {images}.")
            for name, picture in zip(names, pictures, strict=True):
                save_image(picture, root / name)
        groups = {"style_group": row.prompt, "content_group": row.subject}
        columns = {"text": row.prompt, **groups, **asdict(row)}
        lines += [json.dumps({"file_name": name, **columns, "seed": first + k}) for k, name in enumerate(names)]
        progress(done + 1, len(rows))
    return atomic_write(root / METADATA, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
