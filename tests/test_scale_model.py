"""The cost model of docs/scale.md against its simulation."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "scale_model.py"
PAGE = Path(__file__).parent.parent / "docs" / "scale.md"


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("scale_model", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["scale_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale_model"]


@pytest.mark.parametrize(("hours", "shard"), [(1e12, 1000), (2.0, 100), (2.0, 1000), (2.0, 10_000), (0.2, 1000)])
def test_the_model_has_the_mean_of_the_simulation(model, hours, shard):
    assumptions = replace(model.Assumptions(), pairs=200_000, mtbf_hours=hours, shard=shard, filter_rate=1e12)
    expected, runs = model.estimate(assumptions), [model.simulate(assumptions, seed) for seed in range(20)]
    assert all(run.drawn == -(-assumptions.pairs // assumptions.kept // shard) for run in runs)
    assert mean(run.lost for run in runs) == pytest.approx(expected.lost, abs=0.02)
    assert mean(run.worker_hours for run in runs) == pytest.approx(expected.worker_hours, rel=0.03)
    # The wait for the last shard is an average over many; here there are few shards for each worker.
    assert mean(run.hours for run in runs) == pytest.approx(expected.hours, rel=0.12)
    assert mean(run.failures for run in runs) == pytest.approx(expected.failures, rel=0.15, abs=0.5)


def test_twice_the_rejected_images_is_twice_the_work(model):
    one, half = (model.estimate(replace(model.Assumptions(), kept=kept)) for kept in (0.7, 0.35))
    assert half.worker_hours == pytest.approx(2 * one.worker_hours, rel=1e-3)


def test_the_page_has_the_tables_of_the_command(model):
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for line in model.tables():
        assert not line.startswith("|") or line in lines, f"run python benchmarks/scale_model.py: {line}"
