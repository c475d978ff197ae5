"""Running a job: lock, plan, engine, and the two tables that a folder keeps, metadata.jsonl and errors.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from condit.data.files import check_writable
from condit.data.locks import OWNER, locked, turn
from condit.data.progress import progress_bar
from condit.jobs import local
from condit.jobs.plan import (
    ERRORS,
    MAX_ERRORS,
    METADATA,
    SETTINGS,
    Job,
    Row,
    RowResult,
    Stopped,
    agree,
    files_in,
    metadata_lines,
    read_lines,
    remove_unfinished,
    shard_of,
    write_lines,
)
from condit.jobs.work import WorkerTask

Engine = Callable[[WorkerTask, Sequence[Row]], Generator[RowResult, None, None]]  # closing it ends the workers
EngineName = Literal["local", "ray"]


@dataclass(frozen=True)
class Outcome:
    """made: files, in the order of the rows; errors: by the names of rows; rows, files: of this process's shard."""

    made: tuple[str, ...]
    errors: dict[str, str]
    rows: int
    files: int


def engine_of(name: EngineName, workers: int | None, rank: local.Rank, *, gpu: bool | None = None) -> Engine:
    """An engine by its name. workers: None is one process, or with Ray all that the cluster has room for; gpu: whether
    a worker of Ray takes a GPU, None if there is one. ModuleNotFoundError, with the extra, where Ray is missing."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}; expected 1 or more")
    if name == "local":
        return partial(local.draw, workers=workers or 1, first_rank=rank.local * (workers or 1))
    if rank.world > 1:
        raise ValueError("one driver starts all workers of Ray; start it once, without torchrun or srun")
    from condit.jobs import ray

    return partial(ray.draw, workers=workers, gpu=gpu)


def run(
    job: Job,
    engine: Engine,
    *,
    rank: local.Rank | None = None,
    max_errors: int = MAX_ERRORS,
    tell: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Draws what is missing of a job, or of the shard of `rank`. tell receives each error.

    Raises Stopped after more than max_errors rows failed, or when no row can succeed (a full disk, a worker without the
    model). The tables are written in any case; a row that failed is tried again by the next run."""
    rank = rank or local.Rank()
    own = [row for row in job.rows if rank.world == 1 or shard_of(row, rank.world) == rank.number]
    errors = dict(job.errors)
    read_lines(job.folder / METADATA, "file_name")  # a table that is not a job's raises before anything is drawn
    part = "" if rank.world == 1 else f"-{rank.number}-of-{rank.world}"
    with locked(job.folder, "generating", part):
        check_writable(job.folder / METADATA)
        there = files_in(job.folder, own)
        fresh = not files_in(job.folder, job.rows) and not (job.folder / METADATA).is_file()
        if fresh and rank.world == 1:
            (job.folder / SETTINGS).unlink(missing_ok=True)
        agree(job.folder, {**job.settings, "threads": job.threads}, fresh=fresh)
        for name in job.remove:
            (job.folder / name).unlink(missing_ok=True)
        owner = OWNER + part, (job.folder / f"{OWNER}{part}").read_text(encoding="utf-8")
        task = WorkerTask(job.folder.resolve(), job.open, job.threads, owner, fresh)
        remove_unfinished(job.folder, {file for row in own for file in row.files})
        todo = [row for row in own if not there.issuperset(row.files)]
        for name, error in errors.items():
            tell(f"{name}: {error}")
        lost = {row.name: len(set(row.files) - there) for row in todo}
        try:
            check_errors(errors, max_errors)
            with progress_bar(sum(lost.values()), "generating", unit="image") as advance:
                for result in results(engine, task, todo):
                    if result.error is not None:
                        errors[result.row] = result.error
                        tell(f"{result.row}: {result.error}")
                        if result.stop:
                            raise Stopped(f"stopped at {result.row}: {result.error}")
                        check_errors(errors, max_errors)
                    advance(lost[result.row])
        except BaseException:
            with suppress(OSError):  # the first error is the one to report, such as that of a full disk
                finish(job, own, errors)
            raise
        finish(job, own, errors)
        made = files_in(job.folder, own) - there
    order = tuple(file for row in own for file in row.files if file in made)
    return Outcome(order, errors, len(own), sum(len(row.files) for row in own))


def results(engine: Engine, task: WorkerTask, rows: Sequence[Row]) -> Iterator[RowResult]:
    """The engine's results; its processes end with them, whatever happens in between. No row starts no engine."""
    if rows:
        with closing(engine(task, rows)) as running:
            yield from running


def check_errors(errors: dict[str, str], most: int) -> None:
    if len(errors) > most:
        raise Stopped(f"stopped: {len(errors)} rows failed, and --max-errors is {most}. {ERRORS} names them")


def finish(job: Job, own: Sequence[Row], errors: dict[str, str]) -> None:
    """Removes what killed workers left, and writes metadata.jsonl and errors.jsonl. Ranks do so in turn, so that the
    last one sees the files of all."""
    remove_unfinished(job.folder, {file for row in own for file in row.files})
    with turn(job.folder):
        write_lines(job.folder / METADATA, list(metadata_lines(job)))
        others = {row.name for row in job.rows} - {row.name for row in own}
        lines = {name: line for name, line in read_lines(job.folder / ERRORS, "row").items() if name in others}
        lines |= {name: json.dumps({"row": name, "error": text}, ensure_ascii=False) for name, text in errors.items()}
        order = {row.name: number for number, row in enumerate(job.rows)}
        write_lines(job.folder / ERRORS, [lines[name] for name in sorted(lines, key=lambda n: (order.get(n, -1), n))])
