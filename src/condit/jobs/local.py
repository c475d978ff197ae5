"""The local engine: rows are drawn in this process, or in processes that it starts, watches and replaces."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from condit.jobs.plan import Place, Row, RowResult
from condit.jobs.work import Worker, WorkerTask

ATTEMPTS = 2  # a row that ends so many processes is an error
SPAWN = multiprocessing.get_context("spawn")  # a fork would share the state of CUDA and of thread pools


@dataclass(frozen=True)
class Rank:
    """This process among those of SLURM or torchrun; local: its number on the machine."""

    number: int = 0
    world: int = 1
    local: int = 0


def rank_of(environment: Mapping[str, str]) -> Rank:
    """The rank by the variables of torchrun, or of a SLURM step. The script of sbatch is no step: there
    SLURM_NTASKS is set too, but nobody else draws the other shards."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        world = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        names = "SLURM_PROCID", world, "SLURM_LOCALID"
    else:
        return Rank()
    try:
        rank = Rank(*(int(environment.get(name, "0")) for name in names))
    except ValueError:
        rank = Rank(0, 0)
    if not 0 <= rank.number < rank.world:
        values = ", ".join(f"{name}={environment.get(name)}" for name in names)
        raise ValueError(f"{values}: expected a rank below the number of processes. Unset them, or start all of them")
    return rank


def draw(task: WorkerTask, rows: Sequence[Row], workers: int, first_rank: int = 0) -> Generator[RowResult, None, None]:
    """Results in the order in which they are ready. One worker draws in this process. Closing the iterator ends the
    processes; what they were drawing is lost, what they had written is not."""
    if workers == 1:
        worker = Worker(task, Place(first_rank))
        yield from map(worker.draw, rows)
        return
    pool = [Child(task, first_rank + number) for number in range(min(workers, len(rows)))]
    waiting, deaths, busy = deque(rows), dict[str, int](), dict[Connection, Child]()
    try:
        while waiting or busy:
            for child in pool:
                if waiting and child.row is None:
                    child.begin(waiting.popleft())
                    busy[child.pipe] = child
            for pipe in wait(list(busy)):
                child = busy.pop(pipe)  # type: ignore[index]  # connections, as was asked
                row, result = child.finish()
                if result is None:  # the process is gone, and the next one draws its row again
                    deaths[row.name] = deaths.get(row.name, 0) + 1
                    if deaths[row.name] < ATTEMPTS:
                        waiting.appendleft(row)
                        continue
                    result = RowResult(row.name, f"{ATTEMPTS} processes that drew it died, the last {child.end}")
                yield result
    finally:
        for child in pool:
            child.stop()


class Child:
    """A process that draws the rows it is sent, one at a time; started when needed, again after it died."""

    def __init__(self, task: WorkerTask, number: int) -> None:
        self.task, self.number, self.row = task, number, None
        self.process: BaseProcess | None = None
        self.end = ""

    def begin(self, row: Row) -> None:
        """Sends a row."""
        if self.process is None:
            self.pipe, other = SPAWN.Pipe()
            self.process = SPAWN.Process(target=serve, args=(other, self.task, self.number), daemon=True)
            self.process.start()
            other.close()
        self.row: Row | None = row
        with suppress(OSError):  # it died while it was idle: then reading ends too
            self.pipe.send(row)

    def finish(self) -> tuple[Row, RowResult | None]:
        """The row and its result, or None if the process died."""
        row, self.row = self.row, None
        assert row is not None and self.process is not None
        try:
            return row, self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            self.end = f"by signal {-code}" if code < 0 else f"with code {code}"
            self.pipe.close()
            self.process = None
            return row, None

    def stop(self) -> None:
        """Ends the process; temporary files of it are removed by whoever runs the job."""
        if self.process is not None:
            self.pipe.close()
            self.process.kill()
            self.process.join()


def serve(pipe: Connection, task: WorkerTask, number: int) -> None:
    """The child's side. It ends with its parent, also when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=die_with_parent, daemon=True).start()
    worker = Worker(task, Place(number))
    try:
        while True:
            pipe.send(worker.try_draw(pipe.recv()))
    except (EOFError, OSError):
        return


def die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
