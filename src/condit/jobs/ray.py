"""The Ray engine: Ray Data streams rows through a pool of actors, each of which holds the model (extra `ray`).

`read -> map_batches(actors) -> results`. Actors write the files themselves, so that no picture travels between nodes:
all nodes see the job's folder. Ray restarts actors of a lost node elsewhere and gives them its rows again; what was
written is not drawn twice.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Generator, Iterator, Sequence
from types import ModuleType

from condit.jobs.plan import Place, Row, RowResult
from condit.jobs.work import Worker, WorkerTask

CPU_SHARE = 0.5  # of a core for each actor: actors of whole cores that wait for another stage hang for ever
BLOCKS = 4096  # at most; Ray gives the rows of a lost block to another actor, which skips those that are there


class Actor:
    """Draws rows, one at a time, because a row must not depend on its neighbours."""

    def __init__(self, task: WorkerTask) -> None:
        self.worker = Worker(task, Place())  # Ray shows an actor its own GPU only

    def __call__(self, batch: dict[str, list[bytes]]) -> Iterator[dict[str, list[bytes]]]:
        for row in batch["row"]:
            yield {"result": [pickle.dumps(self.worker.try_draw(pickle.loads(row)))]}


def draw(
    task: WorkerTask, rows: Sequence[Row], workers: int | None = None, gpu: bool | None = None
) -> Generator[RowResult, None, None]:
    """Results in the order in which they are ready. Joins the cluster of RAY_ADDRESS, else starts one on this machine
    that ends with the iterator. workers: None is one for each GPU, or each core where there is none."""
    ray, data = import_ray()
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's 15, actors hardly start on a busy machine
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        total = ray.cluster_resources()
        cores, gpus = total.get("CPU", 1.0), int(total.get("GPU", 0))
        takes_gpu = gpus > 0 if gpu is None else gpu
        count = workers or max(1, gpus if takes_gpu else int(cores))
        context = data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = 1  # each result is sent when it is there, not with the last of its block
        blocks = min(len(rows), max(4 * count, min(BLOCKS, len(rows) // 16)))
        with data.DataContext.current(context):
            dataset = data.from_items([{"row": pickle.dumps(row)} for row in rows], override_num_blocks=blocks)
            dataset = dataset.map_batches(
                Actor,
                batch_size=1,
                compute=data.ActorPoolStrategy(size=count),
                fn_constructor_args=(task,),
                num_cpus=min(CPU_SHARE, cores / (2 * count)),
                num_gpus=1 if takes_gpu else None,
            )
            for item in dataset.iter_rows():
                yield pickle.loads(item["result"])
    finally:
        if started:
            ray.shutdown()


def import_ray() -> tuple[ModuleType, ModuleType]:
    """ray and ray.data. ModuleNotFoundError names the extra."""
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"--engine ray needs Ray ({error}): pip install 'condit[ray]'", name="ray") from error
    return ray, ray.data
