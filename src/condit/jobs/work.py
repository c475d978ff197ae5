"""What a worker does, in whichever process: it opens the drawer once, then draws row after row."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from condit.jobs.plan import Drawer, Opener, Place, Row, RowResult, agree


@dataclass(frozen=True)
class WorkerTask:
    """What each worker of a job receives. owner: the file of the folder's lock, and its text, by which a worker on
    another machine knows that it sees the same folder; fresh: of `agree`."""

    folder: Path
    open: Opener
    threads: int
    owner: tuple[str, str]
    fresh: bool


class Worker:
    """Draws rows of a task. Loads the model at the first."""

    def __init__(self, task: WorkerTask, place: Place) -> None:
        self.task, self.place = task, place
        self.drawer: Drawer | None = None

    def open(self) -> Drawer:
        """The drawer. Raises ValueError for a folder or a model that is not the job's, and what the opener raises."""
        task = self.task
        file = task.folder / task.owner[0]
        if not file.is_file() or file.read_text(encoding="utf-8") != task.owner[1]:
            raise ValueError(f"{task.folder} is not the job's folder here. Workers need a file system that they share")
        set_threads(task.threads)
        drawer = task.open(self.place)
        agree(task.folder, drawer.facts, fresh=task.fresh)
        return drawer

    def draw(self, row: Row) -> RowResult:
        """Makes the missing files of a row. Whatever the drawer raises is the row's error; a file that cannot be
        written stops the job. What opening the drawer raises is raised."""
        if self.drawer is None:
            self.drawer = self.open()
        folder = self.task.folder
        missing = [number for number, file in enumerate(row.files) if not (folder / file).is_file()]
        try:
            saves = self.drawer.draw(row.work) if missing else ()
            if missing and len(saves) != len(row.files):
                raise ValueError(f"the drawer returned {len(saves)} images; expected {len(row.files)}")
        except Exception as error:  # the row's own; --max-errors ends a job whose rows all fail
            return RowResult(row.name, text_of(error))
        for number in missing:
            try:
                saves[number](folder / row.files[number])
            except OSError as error:
                return RowResult(row.name, text_of(error), stop=True)
            except Exception as error:  # such as a recipe that is too long for a JPEG
                return RowResult(row.name, text_of(error))
        return RowResult(row.name)

    def try_draw(self, row: Row) -> RowResult:
        """As `draw`, for a worker that nobody sees: an error of opening becomes a result that names the worker."""
        try:
            return self.draw(row)
        except Exception as error:
            where = f"the worker {os.getpid()} on {socket.gethostname()} cannot start"
            return RowResult(row.name, f"{where}: {text_of(error)}", stop=True)


def set_threads(threads: int) -> None:
    """Threads of torch in this process, before or after it is imported. Ray sets OMP_NUM_THREADS itself."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)


def text_of(error: Exception) -> str:
    """One line. Errors that are no fault of the input include their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
