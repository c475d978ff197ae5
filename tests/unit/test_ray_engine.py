"""jobs/ray.py without a cluster: what Ray is asked for, and what its actors do."""

import pickle
import sys
import tomllib
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from condit.jobs import local, ray
from condit.jobs.local import Rank
from condit.jobs.plan import Stopped
from condit.jobs.run import engine_of, run
from painter import Painter, contents, foxes, job_of


class Cluster:
    """Stands for ray and ray.data: runs the actors in this process, the last block first."""

    def __init__(self, cores: float = 2, gpus: int = 0, *, joined: bool = False) -> None:
        self.resources, self.joined, self.calls = {"CPU": cores, "GPU": gpus}, joined, []
        self.DataContext = SimpleNamespace(get_current=self.context, current=lambda context: nullcontext(context))
        self.asked: dict = {}

    def context(self):
        return SimpleNamespace(copy=SimpleNamespace)

    def is_initialized(self) -> bool:
        return self.joined

    def init(self, **how) -> None:
        self.calls.append("init")

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def cluster_resources(self) -> dict:
        return self.resources

    def ActorPoolStrategy(self, size: int) -> int:
        return size

    def from_items(self, items: list[dict], override_num_blocks: int):
        self.items, self.blocks = items, override_num_blocks
        return self

    def map_batches(self, actor, **asked):
        self.asked = asked
        self.actor = actor(*asked["fn_constructor_args"])
        return self

    def iter_rows(self):
        for item in reversed(self.items):
            for batch in self.actor({"row": [item["row"]]}):
                yield {"result": batch["result"][0]}


@pytest.fixture
def cluster(monkeypatch):
    @contextmanager
    def joined(**how):
        made = Cluster(**how)
        monkeypatch.setattr(ray, "import_ray", lambda: (made, made))
        yield made

    return joined


def test_the_files_are_those_of_the_local_engine(tmp_path, cluster):
    prompts = [*foxes(5), "broken"]
    alone = run(job_of(tmp_path / "local", prompts), partial(local.draw, workers=1))
    with cluster() as made:
        assert run(job_of(tmp_path / "ray", prompts), partial(ray.draw, workers=2)) == alone
        assert made.calls == ["init", "shutdown"]
        assert run(job_of(tmp_path / "ray", foxes(5)), engine_of("ray", 2, Rank())).made == ()
        assert made.calls == ["init", "shutdown"]  # nothing to draw starts no cluster
    files = contents(tmp_path / "ray")
    assert files.pop("errors.jsonl", None) is None and len(files) == 12
    assert {name: data for name, data in contents(tmp_path / "local").items() if name != "errors.jsonl"} == files


@pytest.mark.parametrize(
    ("how", "workers", "size", "cores", "gpus"),
    [
        ({"cores": 2}, None, 2, 0.5, None),
        ({"cores": 2}, 4, 4, 0.25, None),  # actors never take all cores: another stage would wait for ever
        ({"cores": 64}, 3, 3, 0.5, None),
        ({"cores": 16, "gpus": 4}, None, 4, 0.5, 1),
        ({"cores": 16, "gpus": 4}, 2, 2, 0.5, 1),
    ],
)
def test_actors_take_a_share_of_a_core_and_a_gpu_where_there_is_one(tmp_path, cluster, how, workers, size, cores, gpus):
    with cluster(**how) as made:
        run(job_of(tmp_path, foxes(2)), partial(ray.draw, workers=workers))
    assert (made.asked["compute"], made.asked["num_cpus"], made.asked["num_gpus"]) == (size, cores, gpus)
    assert (made.asked["batch_size"], made.blocks) == (1, 2)


def test_a_cluster_that_somebody_joined_is_left_running_and_a_stop_ends_an_own_one(tmp_path, cluster):
    with cluster(joined=True) as made:
        run(job_of(tmp_path / "a", foxes(2)), ray.draw)
        assert made.calls == []
    with cluster() as made, pytest.raises(Stopped, match="max-errors is 0"):
        run(job_of(tmp_path / "b", ["fox", "broken"]), ray.draw, max_errors=0)
    assert made.calls == ["init", "shutdown"] and not list((tmp_path / "b").rglob("fox*"))


def test_a_worker_that_does_not_see_the_folder_or_has_no_model_stops_the_job(tmp_path, cluster):
    with cluster(), pytest.raises(Stopped, match="cannot start: no model at here/there"):
        run(job_of(tmp_path / "a", foxes(2), Painter(absent=True)), ray.draw)

    class Elsewhere(Cluster):
        def map_batches(self, actor, **asked):
            (task,) = asked["fn_constructor_args"]
            (tmp_path / "b" / task.owner[0]).write_text("another process")
            return super().map_batches(actor, **asked)

    elsewhere = Elsewhere(joined=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="a file system that they share"):
        patch.setattr(ray, "import_ray", lambda: (elsewhere, elsewhere))
        run(job_of(tmp_path / "b", foxes(2)), ray.draw)
    assert not list((tmp_path / "b").rglob("*.png"))


def test_a_task_travels_by_pickle(tmp_path):
    job = job_of(tmp_path, foxes(1))
    assert pickle.loads(pickle.dumps((job.rows, job.open))) == (job.rows, job.open)


def test_without_ray_the_error_names_the_extra_which_alone_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"--engine ray needs Ray .*pip install 'condit\[ray\]'"):
        run(job_of(tmp_path, foxes(1)), engine_of("ray", 1, Rank()))
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert not any("ray" in name for name in project["dependencies"])
    assert [extra for extra, names in project["optional-dependencies"].items() if any("ray[" in n for n in names)] == [
        "ray"
    ]
