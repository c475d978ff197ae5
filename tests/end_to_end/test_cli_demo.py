"""`condit demo`: its grid, and that the commands it prints generate the same images."""

import json
import shlex
from dataclasses import replace

import pytest

from condit.cli import demo
from condit.data.images import load_image
from condit.weights import catalog, tiny
from condit_lab.icons.world import IconWorld, sample_path


def check_demo(run) -> None:
    code, out, err = run("demo", "--out", "demo-out", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert load_image(result["grid"]).width > 600
    for part in ("--style", "condit edit"):
        call = [call for call in result["calls"] if part in call["command"]][-1]
        before = load_image(call["path"])
        assert call["command"] in err
        assert run(*shlex.split(call["command"])[1:-1], "again.png", "--force")[0] == 0
        assert load_image("again.png").tobytes() == before.tobytes()


@pytest.fixture
def small_demo(monkeypatch):
    """The demo's rows with one image each, of two steps."""
    monkeypatch.setattr(tiny, "STEPS", 2)
    rows = tuple(replace(row, prompts=row.prompts[:1]) for row in demo.ROWS)
    monkeypatch.setattr(demo, "ROWS", rows)


def test_the_demo_generates_its_grid_and_its_commands_repeat_it(run, random_tiny, small_demo):
    check_demo(run)


def test_the_demo_skips_rows_without_an_adapter_and_names_them(run, random_tiny, small_demo, monkeypatch):
    monkeypatch.setattr(demo, "ROWS", [row for row in demo.ROWS if row.label.startswith(("plain", "gray"))])
    monkeypatch.delitem(catalog.MODELS, "tiny/gray")
    code, _, err = run("demo")
    assert code == 0
    assert "left out: gray -> colour (no tiny/gray)" in err


@pytest.mark.slow
def test_the_shipped_demo_generates_its_grid_and_its_commands_repeat_it(run):
    check_demo(run)


def test_the_references_of_the_demo_are_in_the_sample():
    world = IconWorld.open(sample_path())
    there = {(icon.style, icon.label) for icon in world.icons}
    references = [*(icon for row in demo.ROWS for icon in row.icons), *(change.icon for change in demo.CHANGES)]
    assert {(one.style, one.label) for one in references} <= there
