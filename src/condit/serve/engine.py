"""The queue and the one thread that generates: requests of one model, size and number of steps share a batch."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from condit.data.images import to_images
from condit.drawing.batch import Draft, walk
from condit.drawing.callbacks import Tick
from condit.drawing.pipeline import Pipeline
from condit.serve.limits import Limits, Refusal
from condit.serve.metrics import Metrics

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """Every request of a batch has been cancelled."""


@dataclass(frozen=True)
class Progress:
    """A step is done. images: the estimates of the result after it, if the request asked for them."""

    step: int
    steps: int
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Done:
    """The images of a request; recipe: of its run; extra: what an edit returns besides."""

    images: list[Image.Image]
    recipe: dict
    extra: dict = field(default_factory=dict)


Event = Progress | Done | Refusal


class Edit(Protocol):
    """A job that runs on its own. tick is called before each prediction, and raises Cancelled."""

    def __call__(self, tick: Tick, /) -> Done: ...


@dataclass(eq=False)
class QueuedJob:
    """A request for `rows` images. key: jobs with the same key may share a batch. begin prepares a draft, or edit does
    all the work. emit receives progress and, at last, the result or the error; it must not block. partials: how many
    estimates of the result to send."""

    pipe: Pipeline
    key: tuple
    rows: int
    emit: Callable[[Event], None]
    begin: Callable[[], Draft] | None = None
    edit: Edit | None = None
    partials: int = 0
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)


def take(waiting: Sequence[QueuedJob], most: int) -> list[QueuedJob]:
    """The next batch: the oldest job, and in order those that fit it, up to `most` images. The oldest always goes
    first, so that no job waits for more batches than there are jobs before it."""
    first, rows, taken = waiting[0], 0, []
    for job in waiting:
        alike = job is first or (job.key == first.key and job.edit is None and first.edit is None)
        if alike and (job is first or rows + job.rows <= most):
            taken.append(job)
            rows += job.rows
    return taken


def partial_steps(steps: int, number: int) -> set[int]:
    """The steps, counted from 0, after which `number` estimates are sent, equally spaced before the last."""
    return {math.ceil((i + 1) * steps / (number + 1)) - 1 for i in range(number)} - {steps - 1}


class Engine:
    """A bounded queue and its thread. It owns the models while it runs."""

    def __init__(self, limits: Limits, metrics: Metrics, *, batching: bool = True) -> None:
        self.limits, self.metrics, self.batching = limits, metrics, batching
        self.waiting: list[QueuedJob] = []
        self.running: list[QueuedJob] = []
        self.stopping = False
        self.changed = threading.Condition()
        self.seconds_a_row = 1.0
        self.thread = threading.Thread(target=self.run, name="condit-engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    @property
    def queued(self) -> int:
        """Images that wait."""
        return sum(job.rows for job in self.waiting)

    @property
    def delay(self) -> int:
        """Seconds until a place is likely to be free."""
        return min(max(1, math.ceil(self.seconds_a_row * self.queued / 2)), 60)

    def check_room(self, rows: int) -> None:
        """Raises Refusal unless so many images may wait: 429 if the queue is full, 503 during a shutdown."""
        if self.stopping:
            raise Refusal(503, "shutting_down", "The server is shutting down.", retry=5)
        if self.queued + rows > self.limits.waiting:
            message = f"{self.queued} images are waiting, the limit is {self.limits.waiting}."
            raise Refusal(429, "queue_full", message, retry=self.delay)

    def put(self, jobs: Sequence[QueuedJob]) -> None:
        """Queues jobs, all or none. Raises Refusal as `check_room` does."""
        with self.changed:
            self.check_room(sum(job.rows for job in jobs))
            self.waiting.extend(jobs)
            self.metrics.queue.set(self.queued)
            self.changed.notify()

    def cancel(self, jobs: Sequence[QueuedJob]) -> None:
        """The jobs leave the queue, or their batch within one step."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
            self.waiting = [job for job in self.waiting if not job.cancelled]
            self.metrics.queue.set(self.queued)

    def stop(self) -> None:
        """What waits gets 503, what runs ends."""
        with self.changed:
            self.stopping = True
            left, self.waiting = self.waiting, []
            self.metrics.queue.set(0)
            self.changed.notify()
        for job in left:
            job.emit(Refusal(503, "shutting_down", "The server is shutting down.", retry=5))

    def join(self, seconds: float | None = None) -> None:
        """Waits for what runs."""
        self.thread.join(seconds)

    def run(self) -> None:
        while True:
            with self.changed:
                while not self.waiting and not self.stopping:
                    self.changed.wait()
                if self.stopping:
                    return
                jobs = take(self.waiting, self.limits.batch if self.batching else 1)
                self.waiting = [job for job in self.waiting if job not in jobs]
                self.running = jobs
                self.metrics.queue.set(self.queued)
            begun = time.monotonic()
            for job in jobs:
                self.metrics.seconds.labels("waiting").observe(begun - job.arrived)
            self.guarded(jobs, self.edit_one if jobs[0].edit else self.generate)
            rows = sum(job.rows for job in jobs)
            self.seconds_a_row = 0.7 * self.seconds_a_row + 0.3 * (time.monotonic() - begun) / rows
            self.running = []

    def guarded(self, jobs: Sequence[QueuedJob], work: Callable[[Sequence[QueuedJob]], None]) -> None:
        """Runs work for jobs; an error goes to all of them and not beyond. ValueError is the request's own fault."""
        try:
            with torch.no_grad():
                work(jobs)
        except Cancelled:
            log.info("cancelled %d requests", len(jobs))
        except ValueError as error:
            for job in jobs:
                job.emit(Refusal(400, "invalid_value", str(error)))
        except torch.OutOfMemoryError:
            for job in jobs:
                job.emit(Refusal(503, "out_of_memory", "Not enough memory. Ask for fewer or smaller images.", retry=5))
        except Exception:
            log.exception("a batch of %d requests failed", len(jobs))
            self.metrics.errors.labels("internal").inc()
            for job in jobs:
                job.emit(Refusal(500, "internal_error", "The server could not generate this. Its log says why."))

    def edit_one(self, jobs: Sequence[QueuedJob]) -> None:
        (job,) = jobs
        count = 0

        def tick() -> None:
            nonlocal count
            if job.cancelled:
                raise Cancelled
            count += 1
            job.emit(Progress(count, 0))

        assert job.edit is not None
        with self.metrics.stage("edit"):
            done = job.edit(tick)
        job.emit(done)

    def generate(self, jobs: Sequence[QueuedJob]) -> None:
        """Prepares each job, then walks groups of drafts that fit each other."""
        ready: list[tuple[QueuedJob, Draft]] = []

        def prepare(jobs: Sequence[QueuedJob]) -> None:
            (job,) = jobs
            assert job.begin is not None
            if not job.cancelled:
                ready.append((job, job.begin()))

        with self.metrics.stage("prepare"):
            for job in jobs:
                self.guarded([job], prepare)
        while ready:
            first = ready[0][1]
            group = [pair for pair in ready if pair[1] is first or pair[1].fits(first)]
            ready = [pair for pair in ready if pair not in group]
            drafts = dict(group)
            self.guarded(list(drafts), lambda jobs, drafts=drafts: self.walk(jobs, [drafts[job] for job in jobs]))

    def walk(self, jobs: Sequence[QueuedJob], drafts: Sequence[Draft]) -> None:
        pipe, counts, steps = jobs[0].pipe, [draft.rows for draft in drafts], len(drafts[0].path)
        self.metrics.batch.observe(sum(counts))
        shown = [partial_steps(steps, job.partials) for job in jobs]
        dropped = {i for i, job in enumerate(jobs) if job.cancelled}
        if len(dropped) == len(jobs):
            raise Cancelled
        size = drafts[0].guided.layout.size

        def on_step(i: int, x: Tensor, x0: Tensor) -> None:
            dropped.update(number for number, job in enumerate(jobs) if job.cancelled)
            if len(dropped) == len(jobs):
                raise Cancelled
            estimates = x0.split(counts)
            for number, (job, draft) in enumerate(zip(jobs, drafts, strict=True)):
                if number in dropped:
                    continue
                images: list[Image.Image] = []
                if i in shown[number] and bool(x0.isfinite().all()):
                    latents = estimates[number]
                    latents = latents if draft.fill is None else draft.fill.complete(latents)
                    images = to_images(pipe.decode(latents, size, "pt"))
                job.emit(Progress(i + 1, steps, tuple(images)))

        with self.metrics.stage("steps"):
            latents = walk(pipe, drafts, on_step, dropped)
        with self.metrics.stage("decode"):
            kept = [i for i in range(len(jobs)) if i not in dropped]
            images = iter(pipe.decode(torch.cat([latents[i] for i in kept]), size, "pil"))
        for i in kept:
            self.metrics.images.inc(counts[i])
            jobs[i].emit(Done([next(images) for _ in range(counts[i])], drafts[i].recipe))
