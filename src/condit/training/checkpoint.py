"""What a stopped run leaves: its state in one file, a log without rows of lost steps, and signals that stop it."""

from __future__ import annotations

import errno
import json
import logging
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from condit.data.files import atomic_write
from condit.weights.files import Json

log = logging.getLogger(__name__)

FIELDS = {"step", "seconds", "parameters", "average", "average_count", "optimizers"}


def write_state(file: Path, state: Json) -> None:
    """Replaces the file atomically. OSError with the reason if the disk is full."""

    def write(path: Path) -> None:
        try:
            with path.open("wb") as opened:
                torch.save(state, opened)
        except RuntimeError as error:  # torch's own, in place of the reason
            reason = error.__context__
            raise reason if isinstance(reason, OSError) else OSError(errno.EIO, str(error)) from error

    atomic_write(file, write)


def read_state(file: Path) -> Json:
    """The state that write_state wrote. ValueError for another or a damaged file."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        missing = FIELDS - state.keys()
        problem = f"it has no {min(missing)!r}" if missing else ""
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, AttributeError, TypeError, pickle.PickleError):
        problem = "it ends early or was changed"
    if problem:
        raise ValueError(
            f"{file} is damaged or no checkpoint of condit: {problem}. Restore it from a backup, or delete it to train "
            "from the start."
        )
    return state


def cut_log(file: Path, step: int, last: int) -> None:
    """Removes rows after `step`, which a resumed run writes again, and a row that was cut off. last: the step at which
    the run ends, where it validates again."""
    kept = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step and not ("validation" in row and row["step"] == last):
            kept.append(line + "\n")
    if file.exists():
        atomic_write(file, lambda path: path.write_text("".join(kept)))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C or SIGTERM sets; the next one acts as it did before."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, frame: object) -> None:
        restore()
        stopping.set()
        log.warning("Stopping at the end of this step with a checkpoint. Interrupt again to stop at once.")

    for number in before:
        signal.signal(number, first)
    try:
        yield stopping
    finally:
        restore()
