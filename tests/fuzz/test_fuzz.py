"""A few hundred tries of the fuzzer, the same at every run; `make fuzz` tries for as long as it is given."""

import pytest
from hypothesis import Phase

from condit.training import labelled
from condit.weights import catalog
from run import tries
from targets import TARGETS
from world import world

# Tries that take about half a second.
COUNTS = {
    "command line": 20,
    "models": 4,
    "recipes of training": 10,
    "adapters": 10,
    "recipes of images": 15,
    "rows of requests": 8,
}
COUNTS |= {"Python calls": 10, "Python edits": 10}


@pytest.fixture(scope="module", autouse=True)
def own_catalog():
    """The fuzzer replaces the embedded model by a random one, and has a small machine."""
    before, memory = dict(catalog.MODELS), labelled.machine_memory
    world()
    yield
    labelled.machine_memory = memory
    catalog.MODELS.clear()
    catalog.MODELS.update(before)


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_of_a_target_breaks_a_rule(name):
    count, broken = tries(name, 0, count=COUNTS.get(name, 40), phases=(Phase.generate,))
    assert not broken, broken
    assert count >= 4
