"""Progress of long jobs: a bar in terminals and notebooks, a line now and then where the output is a file."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol

log = logging.getLogger(__name__)
SECONDS = 10.0  # between two lines


class Advance(Protocol):
    """Moves a bar by n units; `note` is shown next to it."""

    def __call__(self, n: int = 1, note: str = "") -> None: ...


def interactive() -> bool:
    """Whether a bar can be drawn: stderr is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def progress_bar(
    total: int, text: str, *, unit: str = "step", images: int | None = None, done: int = 0
) -> Iterator[Advance]:
    """Yields advance(n, note), called after n more of `total` units. Shown are the time left, of a job that makes
    `images` images how many it makes a second, and the last note. done: units of an earlier run."""
    start, images = time.monotonic(), total if unit == "image" else images
    count = done

    def speed() -> str:
        if images is None or not total:
            return ""
        return f"{images * (count - done) / total / max(time.monotonic() - start, 1e-9):.2f} images/s"

    if interactive():
        from tqdm.auto import tqdm

        with tqdm(
            total=total, initial=done, desc=text, unit=unit, unit_scale=unit == "B", leave=False, dynamic_ncols=True
        ) as bar:

            def advance(n: int = 1, note: str = "") -> None:
                nonlocal count
                count += n
                bar.set_postfix_str(", ".join(part for part in (speed(), note) if part), refresh=False)
                bar.update(n)

            yield advance
        return
    last = start

    def line(n: int = 1, note: str = "") -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if now - last >= SECONDS and count < total:
            last = now
            left = (now - start) * (total - count) / max(count - done, 1)
            done_now = f"{count / 1e6:.0f} of {total / 1e6:.0f} MB" if unit == "B" else f"{unit} {count} of {total}"
            parts = f"{text}: {done_now}", f"{left:.0f} s left", speed(), note
            log.info(", ".join(part for part in parts if part))

    yield line
