"""data/locks.py: one process at a time in a folder; and what a second start of a long job says."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from PIL import Image

from condit.data.locks import LOCK, has_files, locked
from condit.data.prompt_table import prompt_table
from condit.jobs.groups import Generator, groups_job
from condit.jobs.local import draw as draw_locally
from condit.jobs.run import run
from condit.training.run import train

HOLD = """
import sys, time
from pathlib import Path
from condit.data.locks import locked
with locked(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""
RECIPE = """task = "omini"
[train]
steps = 1
batch = 1
[data]
model = "m"
pairs = "p"
conditions = [{ role = "a" }]
"""
TABLE = prompt_table(["a fox", "a rocket"], ["ink", "oil"], per_subject=2)
SETTINGS = {"model": "tiny", "hash": "00", "steps": 4}


def test_a_second_process_is_told_the_owner_and_a_killed_owner_leaves_no_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with (
            pytest.raises(
                ValueError, match=rf"^process {owner.pid} on .*, since 20.* is training in {tmp_path}\. Wait"
            ),
            locked(tmp_path, "training"),
        ):
            pytest.fail("two owners")
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(RECIPE)
        with pytest.raises(ValueError, match="is training in"):
            train(recipe, out=tmp_path)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    with locked(tmp_path, "training"):
        assert (tmp_path / LOCK).exists()
    with locked(tmp_path, "training"):  # it ends with its block
        pass


def test_a_lock_alone_is_no_run(tmp_path):
    with locked(tmp_path / "run", "training"):
        pass
    assert not has_files(tmp_path / "run") and not has_files(tmp_path / "none")
    (tmp_path / "run" / "state.pt").touch()
    assert has_files(tmp_path / "run")


def paint(prompt: str, seed: int, count: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4))] * count


def draw(folder, rows=TABLE, *, prune: bool = False, **changes) -> set[str]:
    job = groups_job(folder, rows, Generator(paint), images=2, settings={**SETTINGS, **changes}, prune=prune)
    run(job, partial(draw_locally, workers=1))
    return {path.name for path in (folder / "images").iterdir()}


def test_a_set_of_another_model_is_not_mixed_with_this_one(tmp_path):
    names = draw(tmp_path)
    with pytest.raises(ValueError, match="holds images made with model = 'tiny', not 'sd15'"):
        draw(tmp_path, model="sd15")
    with pytest.raises(ValueError, match="holds images made with steps = 4, not None"):
        draw(tmp_path, steps=None)
    assert draw(tmp_path) == names
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="made with settings that it does not record"):
        draw(tmp_path)


def test_images_of_prompts_that_are_gone_are_named_and_deleted_on_demand_only(tmp_path):
    names = draw(tmp_path)
    (tmp_path / "images" / "mine.png").touch()
    with pytest.raises(ValueError, match="holds 4 images that the table of prompts does not have .*--prune"):
        draw(tmp_path, TABLE[:2])
    assert draw(tmp_path) == {*names, "mine.png"}
    left = draw(tmp_path, TABLE[:2], prune=True)
    assert len(left) == 5 and left < {*names, "mine.png"}
    assert len(draw(tmp_path)) == 9  # a table may grow
