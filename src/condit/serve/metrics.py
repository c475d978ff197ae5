"""Figures for Prometheus: queue length, batch sizes, seconds of each stage, errors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """One registry for each server, so that tests may have more than one."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.queue = Gauge("condit_queue_images", "Images that wait", registry=registry)
        self.batch = Histogram(
            "condit_batch_images", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.seconds = Histogram(
            "condit_stage_seconds", "Seconds of a stage", ["stage"], buckets=SECONDS, registry=registry
        )
        self.images = Counter("condit_images", "Images generated", registry=registry)
        self.errors = Counter("condit_errors", "Requests with an error", ["code"], registry=registry)
        self.requests = Counter("condit_requests", "Requests", ["status"], registry=registry)

    def refused(self, code: str) -> None:
        self.errors.labels(code).inc()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds.labels(name).observe(time.perf_counter() - begun)

    def text(self) -> bytes:
        return generate_latest(self.registry)
