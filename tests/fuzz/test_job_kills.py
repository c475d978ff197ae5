"""kill -9 of workers, drivers and nodes at random moments: a job ends with every picture there exactly once.

make kills                                                            # 20 of each, some minutes on idle cores
KILLS=5 python -m pytest -m slow tests/fuzz/test_job_kills.py         # fewer
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from condit.jobs import local
from condit.jobs.run import run
from painter import Painter, contents, foxes, job_of

KILLS = int(os.environ.get("KILLS", "20"))
ROWS, PAUSE = 40, 1.0
DRIVER = "from painter import drive; drive()"
pytestmark = pytest.mark.slow


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """The files of a job that nothing disturbs."""
    run(job_of(tmp_path / "whole", foxes(ROWS)), partial(local.draw, workers=1))
    return contents(tmp_path / "whole")


@pytest.fixture
def log(tmp_path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def complete(folder: Path, whole: dict[str, bytes]) -> None:
    """Every picture is there, once, with the bytes of the undisturbed job, and nothing besides."""
    assert contents(folder) == whole
    names = [json.loads(line)["file_name"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert set(Counter(names).values()) == {1} and len(names) == 2 * ROWS
    assert not list(folder.rglob(".*.tmp"))


def pictures(folder: Path) -> int:
    return len(list(folder.glob("images/*.png")))


def wait_for(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.005)


def wait_for_picture(folder: Path, before: int, driver: subprocess.Popen) -> None:
    wait_for(lambda: pictures(folder) > before or driver.poll() is not None)


def start(folder: Path, log: Path, engine: str, pause: float, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", DRIVER, str(folder), engine, "2", str(ROWS), str(pause), str(log)]
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, **environment}, stderr=subprocess.PIPE)


def workers_of(driver: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended(driver: subprocess.Popen) -> None:
    text = driver.communicate(timeout=600)[1].decode()
    assert driver.returncode == 0, text


def test_local_workers_and_drivers_that_are_killed_lose_nothing(tmp_path, whole, log):
    moments, kills, folders, folder = random.Random(0), Counter[str](), 0, tmp_path / "run-0"
    while sum(kills.values()) < KILLS:
        driver, before = start(folder, log, "local", 0.01), pictures(folder)
        wait_for_picture(folder, before, driver)
        time.sleep(moments.uniform(0, 0.3))
        if driver.poll() is None:
            workers = workers_of(driver)
            if workers and moments.random() < 0.5:
                os.kill(moments.choice(workers), signal.SIGKILL)
                kills["worker"] += 1
            else:
                driver.kill()
                driver.communicate()
                kills["driver"] += 1
                wait_for(lambda workers=workers: not any(map(alive, workers)), 10)  # none goes on without its driver
                continue
        ended(driver)
        complete(folder, whole)
        folders += 1
        folder = tmp_path / f"run-{folders}"
    ended(start(folder, log, "local", 0.01))
    complete(folder, whole)
    drawn = len(list(log.iterdir()))
    print(f"killed: {dict(kills)}; {folders + 1} jobs, {drawn - (folders + 1) * ROWS} rows drawn again")
    assert drawn <= (folders + 1) * ROWS + 2 * sum(kills.values())  # what was written is not drawn again


@pytest.fixture(scope="module")
def cluster():
    """Three nodes on this machine; the first is the head."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 is the default: on a busy machine actors start for minutes
        patch.setenv("RAY_raylet_start_wait_time_s", "300")
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        for _ in range(2):
            cluster.add_node(**NODE)
        yield cluster
        cluster.shutdown()


NODE = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}


def test_nodes_of_ray_that_are_killed_lose_nothing(tmp_path, whole, log, cluster):
    import ray as library

    from condit.jobs import ray

    library.init(address=cluster.address, log_to_driver=False)
    moments, kills, jobs = random.Random(0), 0, 0
    try:
        with ThreadPoolExecutor(1) as driver:  # nodes are started by the main thread, as Ray wants it
            while kills < KILLS:
                folder, before = tmp_path / f"run-{jobs}", 0
                job = job_of(folder, foxes(ROWS), Painter(PAUSE, str(log)))
                running = driver.submit(run, job, partial(ray.draw, workers=3))
                while not running.done() and kills < KILLS:
                    if pictures(folder) <= before:
                        time.sleep(0.02)
                        continue
                    time.sleep(moments.uniform(0, 2))
                    before = pictures(folder)
                    victim = moments.choice([node for node in cluster.list_all_nodes() if not node.head])
                    cluster.remove_node(victim, allow_graceful=False)
                    kills += 1
                    cluster.add_node(wait=False, **NODE)
                assert running.result().errors == {}
                complete(folder, whole)
                jobs += 1
                print(f"{kills} nodes killed, {jobs} jobs complete", flush=True)
        drawn = len(list(log.iterdir()))
        print(f"{kills} nodes killed; {jobs} jobs, {drawn - jobs * ROWS} rows drawn again")
        assert drawn <= jobs * ROWS + 3 * kills
    finally:
        library.shutdown()


def test_drivers_of_ray_that_are_killed_lose_nothing(tmp_path, whole, log, cluster):
    moments, folder = random.Random(0), tmp_path / "run"
    for _ in range(max(1, KILLS // 4)):
        driver, before = start(folder, log, "ray", PAUSE, RAY_ADDRESS=cluster.address), pictures(folder)
        wait_for_picture(folder, before, driver)
        time.sleep(moments.uniform(0, 1))
        driver.kill()
        driver.communicate()
    ended(start(folder, log, "ray", 0.0, RAY_ADDRESS=cluster.address))
    complete(folder, whole)


def test_the_command_makes_the_same_files_by_every_engine(tmp_path, cluster):
    rows = [{"prompt": "a red apple", "seed": seed, "count": 1 + seed % 2} for seed in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "shuffled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": cluster.address}

    def made(name: str, file: str, *words: str, **extra: str) -> dict[str, bytes]:
        command = [sys.executable, "-m", "condit.cli", "generate", "--from", file, "--steps", "1", "-o", name, *words]
        subprocess.run(command, cwd=tmp_path, env={**environment, **extra}, check=True)
        return contents(tmp_path / name)

    one = made("one", "rows.jsonl", OMP_NUM_THREADS="4")
    assert len(one) == 6 + 2
    assert made("two", "rows.jsonl", "--workers", "2") == one
    assert made("ray", "rows.jsonl", "--engine", "ray", "--workers", "2") == one
    other = made("other", "shuffled.jsonl")
    assert sorted(other.pop("metadata.jsonl").splitlines()) == sorted(one.pop("metadata.jsonl").splitlines())
    assert other == one
