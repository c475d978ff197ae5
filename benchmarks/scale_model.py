"""The cost model of docs/scale.md, and a simulation that checks it: drawing a set in shards on machines that fail.

python benchmarks/scale_model.py                       # the tables of the page, with the example assumptions
python benchmarks/scale_model.py --rate 2.5 --gpus 64  # with your own

A shard is drawn by one worker and written whole or not at all, so a failure loses the shard's work so far and the time
until the worker is back. Failures come at a constant rate (an exponential distribution); nothing else is random.
"""

import argparse
import heapq
import math
import random
from dataclasses import dataclass, fields, replace

HOUR = 3600.0


@dataclass(frozen=True)
class Assumptions:
    """Every number is an assumption until you measure it; `docs/scale.md` says where each comes from."""

    pairs: float = 1e6  # rows of the finished set
    kept: float = 0.7  # share of the drawn images that the filters keep
    rate: float = 4.6  # images a second and worker: `condit plan`, or a measured run
    gpus: int = 8  # workers
    shard: int = 1000  # images of a shard
    mtbf_hours: float = 50_000.0  # mean time between the failures of one worker
    restart: float = 300.0  # seconds from a failure to the first image of the worker that replaces it
    image_bytes: float = 60_000.0  # of a stored image
    images_a_row: float = 3.0  # files of a row: the target, a style and a content reference
    filter_rate: float = 200.0  # images a second that one worker decodes, hashes and encodes
    gpu_price: float = 2.0  # an hour of a worker, in your currency
    storage_price: float = 0.02  # a GB and month
    egress_price: float = 0.08  # a GB that leaves the provider


@dataclass(frozen=True)
class Estimate:
    """images: drawn in all. hours: from start to end. lost: the share of the workers' time that failures cost."""

    images: float
    hours: float
    worker_hours: float
    lost: float
    failures: float
    terabytes: float
    price: float


def shard_seconds(a: Assumptions) -> float:
    """Expected seconds of a worker for a shard. With work T, failures at rate 1 / M and restarts of R seconds the
    expected time is (M + R)(exp(T / M) - 1): each try ends well with probability exp(-T / M)."""
    work, mean = a.shard / a.rate, a.mtbf_hours * HOUR
    return (mean + a.restart) * math.expm1(work / mean)


def estimate(a: Assumptions) -> Estimate:
    images = a.pairs / a.kept
    shards = math.ceil(images / a.shard)
    ideal, expected = a.shard / a.rate, shard_seconds(a)
    rounds = (
        shards / a.gpus + (1 - 1 / a.gpus) / 2
    )  # at the end workers wait for the last shard: half of one on average
    drawing = rounds * expected / HOUR
    filtering = images / a.filter_rate / a.gpus / HOUR
    worker_hours = shards * expected / HOUR + filtering * a.gpus
    terabytes = (images + a.pairs * a.images_a_row) * a.image_bytes / 1e12
    return Estimate(
        images=images,
        hours=drawing + filtering,
        worker_hours=worker_hours,
        lost=1 - ideal / expected,
        failures=shards * math.expm1(ideal / a.mtbf_hours / HOUR),  # none while a worker is restarting
        terabytes=terabytes,
        price=worker_hours * a.gpu_price + terabytes * 1000 * (a.storage_price + a.egress_price),
    )


@dataclass(frozen=True)
class Simulated:
    hours: float
    worker_hours: float
    lost: float
    failures: int
    drawn: int  # shards that were finished, each exactly once


def simulate(a: Assumptions, seed: int = 0) -> Simulated:
    """Draws the shards one by one: the worker that is free first takes the next, and a failed shard is taken again."""
    rng, shards, work = random.Random(seed), math.ceil(a.pairs / a.kept / a.shard), a.shard / a.rate
    rate = 1 / (a.mtbf_hours * HOUR)
    free = [(0.0, worker) for worker in range(a.gpus)]
    left, finished, failures, busy, end = shards, 0, 0, 0.0, 0.0
    while left:
        now, worker = heapq.heappop(free)
        fails = rng.expovariate(rate)
        if fails < work:
            failures += 1
            spent = fails + a.restart
        else:
            left, finished, spent = left - 1, finished + 1, work
            end = max(end, now + spent)
        busy += spent
        heapq.heappush(free, (now + spent, worker))
    return Simulated(end / HOUR, busy / HOUR, max(0.0, 1 - finished * work / busy), failures, finished)


def rows(a: Assumptions) -> list[str]:
    """A line of a table: the model beside the simulation. Filtering is left out of both times."""
    e = estimate(a)
    s = simulate(a)
    hours = e.hours - e.images / a.filter_rate / a.gpus / HOUR
    return [
        f"{a.pairs:,.0f}",
        f"{a.gpus:,}",
        f"{a.shard:,}",
        f"{e.images:,.0f}",
        f"{hours:,.1f} / {s.hours:,.1f}",
        f"{e.failures:,.1f} / {s.failures:,}",
        f"{100 * e.lost:.2f} / {100 * s.lost:.2f} %",
        f"{e.terabytes:,.2f}",
        f"{e.worker_hours:,.0f}",
        f"{e.price:,.0f}",
    ]


HEAD = ["pairs", "workers", "shard", "images", "hours", "failures", "time lost", "TB", "worker hours", "price"]


def table(cases: list[Assumptions]) -> list[str]:
    lines = [HEAD, ["---"] * len(HEAD), *(rows(a) for a in cases)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def tables(a: Assumptions | None = None) -> list[str]:
    """The lines of both tables of the page."""
    a = a or Assumptions()
    sizes = [replace(a, pairs=a.pairs * 10**n, gpus=max(1, int(a.gpus * 4**n))) for n in range(-2, 3)]
    spot = [replace(a, mtbf_hours=2.0, shard=shard) for shard in (100, 1000, 10_000)]
    return [*table(sizes), "", *table(spot)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Assumptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    print("\n".join(tables(Assumptions(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
