"""benchmarks/: the clock, and that every form of a network computes the same."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The two scripts as modules; they import each other by plain name, as scripts do."""
    sys.path.insert(0, str(FOLDER))
    try:
        found = {}
        for name in ("timing", "backbones"):
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            assert spec is not None and spec.loader is not None
            found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
        yield found
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("timing", "backbones"):
            sys.modules.pop(name, None)


def test_a_longer_call_is_measured_as_longer_and_the_table_has_its_ratio(scripts, tmp_path):
    timing = scripts["timing"]
    calls = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}
    found = timing.measure(calls, turns=3, warm=0)
    assert found["long"].seconds > 3 * found["short"].seconds
    assert all(t.low <= t.seconds <= t.high for t in found.values())
    page = timing.table("sleep", found, "long")
    assert page.count("\n| ") == 3 and "| 1.00 |" in page  # a head and two rows
    timing.save(tmp_path / "found.json", {"sleep": found})
    assert json.loads((tmp_path / "found.json").read_text())["figures"]["sleep"]["long"]["seconds"] >= 0.02


@pytest.mark.parametrize("kind", ["dit", "vit"])
def test_every_form_of_a_network_computes_the_same(scripts, kind, monkeypatch):
    """Small presets, and compilation left out: what is timed is one function."""
    module = scripts["backbones"]
    monkeypatch.setattr(module.torch, "compile", lambda network: network)
    name = {"dit": "DiT-S/8", "vit": "ViT-Ti/16"}[kind]
    with torch.inference_mode():
        calls = getattr(module, kind)(name, 1, "cpu")
        theirs, expected = next(iter(calls)), calls["plain, float32"]()
        for form, call in calls.items():
            if form == theirs:
                assert "float32" in form and call() is not None  # random weights of its own
                continue
            atol = 0.05 if "bfloat16" in form else 1e-4
            torch.testing.assert_close(call().float(), expected, rtol=0.05, atol=atol * float(expected.abs().max()))
