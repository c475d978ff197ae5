"""The job of a prompt table (data/prompt_table.py): images in groups of one style and of one content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from condit.data.images import save_image
from condit.data.prompt_table import IMAGES, PromptRow, named, strays
from condit.jobs.plan import Drawer, Job, Opener, Place, Row, Save

# (prompt, seed, count) -> images, the first from `seed`, the next from seed + 1, ...
ImageGenerator = Callable[[str, int, int], Sequence[Image.Image]]


def groups_job(
    folder: str | Path,
    table: Sequence[PromptRow],
    open: Opener,
    *,
    images: int = IMAGES,
    seed: int = 0,
    settings: Mapping[str, object] | None = None,
    threads: int = 1,
    prune: bool = False,
) -> Job:
    """A job that makes `images` images of every prompt, and metadata.jsonl with their style and content groups. The
    work of a row is its prompt, its first seed and its count. prune: deletes images of other tables. ValueError for
    fewer than two images, no prompt, or such images without prune."""
    if images < 2:
        raise ValueError(f"images must be at least 2, as a style pair needs two; found {images}.")
    if not table:
        raise ValueError("The table has no prompt.")
    rows = []
    for row in table:
        first, files = named(row, images, seed)
        columns = {"text": row.prompt, "style_group": row.prompt, "content_group": row.subject, **asdict(row)}
        lines = tuple({**columns, "seed": first + number} for number in range(images))
        work = {"prompt": row.prompt, "seed": first, "count": images}
        rows.append(Row(row.prompt, tuple(files), work, lines))
    remove = strays(folder, {file for row in rows for file in row.files}, prune=prune)
    how = {**(settings or {}), "seed": seed}
    return Job(Path(folder), tuple(rows), open, settings=how, threads=threads, remove=remove)


@dataclass(frozen=True)
class Generator:
    """Opens a function as the drawer of a job: for another generator, such as a service. With several workers it must
    be a function of a module."""

    generate: ImageGenerator

    def __call__(self, place: Place) -> Drawer:
        return Drawer(self.draw)

    def draw(self, work: Mapping[str, object]) -> list[Save]:
        """The images of a row of `groups_job`."""
        prompt, seed, count = str(work["prompt"]), int(str(work["seed"])), int(str(work["count"]))
        return [partial(save_image, image) for image in self.generate(prompt, seed, count)]
