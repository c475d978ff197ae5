"""DiT4Edit's pieces against tensors of the code they come from (golden/dit4edit/README.md). What is compared, and how
exactly: lab/src/condit_lab/parity/dit4edit.py.
"""

from pathlib import Path

import pytest

from condit.controls.edit_maps import blend_mask
from condit_lab.parity.dit4edit import CHECKS, Toy, facts, read, states

FOLDER = Path(__file__).parent / "golden" / "dit4edit"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_the_recorded_tensors_are_reproduced(check):
    assert check.run(FOLDER).exceeding() == []


def test_every_solver_is_compared_both_ways_at_every_step():
    tensors = read(FOLDER, "inversion")
    for solver in ("dpmpp2m", "dpmpp2m_sigma_min", "ddim"):
        for steps in (4, 10):
            names = states(FOLDER, tensors, solver, steps).keys()
            assert {f"{way} {i}" for way in ("invert", "sample") for i in range(steps + 1)} <= names


def test_the_blend_of_the_fixture_changes_a_part():
    toy = Toy(FOLDER, "p2p")
    maps, threshold = toy.tensors["blend.word_maps"][None], facts(FOLDER, "p2p")["blend_threshold"]
    assert 0 < blend_mask(maps, (16, 16), threshold=threshold, size=(32, 32)).mean() < 1
