"""OminiControl (arXiv:2411.15098, 2503.08280) against golden/ominicontrol, tensors written by the official code. What
is compared, and how exactly: lab/src/condit_lab/parity/omini.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from condit.controls.control import Step
from condit.controls.omini import OminiReference
from condit_lab.parity.check import difference
from condit_lab.parity.omini import CHECKS, TOLERANCE, first_step_cache
from condit_lab.parity.omini_golden import Golden, read

FOLDER = Path(__file__).parent / "golden" / "ominicontrol"


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read(FOLDER)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_the_official_tensors_are_reproduced(check):
    assert check.run(FOLDER).exceeding() == []


def test_read_pass_equals_the_full_recomputation(golden):
    later = golden.image(later=True)
    full = golden.predict(golden.condition(sees="self"), golden.condition("b", sees="self"), image=later)
    # The same keys from the same operations; only the batching of the products differs.
    assert difference(golden.predict(image=later, controls=golden.cached()), full) <= 2e-6


def test_a_cache_belongs_to_its_pooled_prompt(golden):
    other = golden.predict(image=golden.image(later=True), controls=golden.cached("pooled_other"))
    assert difference(other, golden.tensors("kv_cache")["out/read_pass"]) > 1


def test_a_control_of_strength_zero_is_left_out_as_the_official_bias_log_zero_means(golden):
    (control,) = golden.cases()["aligned"]
    assert isinstance(control, OminiReference)
    assert replace(control, strength=0.0).at(Step(0, 4, 1.0)) is None
    assert difference(golden.predict(), golden.tensors("gamma")["out/v1_gamma_0.0"]) <= TOLERANCE


def test_our_image_guidance_differs_from_the_officials_where_it_lacks_the_mask(golden):
    """Two cached conditions: there the black ones see text, image and each other, here themselves only."""
    case = "image_guidance_1.5_two_kv"
    steps, _ = golden.generate(case, list(golden.guided()))
    assert difference(steps, golden.trajectory[f"{case}/trajectory"]) > 1e-3


# What the caches of a joint adapter cost: the table of docs/papers/ominicontrol.md


def test_what_a_cache_of_a_joint_adapter_costs(golden):
    """The cache of the first step is nearer than that of the condition alone."""
    first, later = first_step_cache(golden)
    assert difference(first, golden.predict(golden.condition(), golden.condition("b"))) <= TOLERANCE
    recorded = golden.tensors("kv_cache")
    exact, alone = recorded["out/full_recompute_not_independent"], recorded["out/read_pass"]
    assert difference(later, exact) == pytest.approx(0.223, abs=1e-3)
    assert difference(alone, exact) == pytest.approx(0.521, abs=1e-3)
    assert difference(alone, later) == pytest.approx(0.603, abs=1e-3)


def test_caches_of_a_joint_adapter_over_four_steps(golden):
    """The official generate(kv_cache=True) hides text and image from a condition, whatever its adapter was trained for;
    so does cached="independent"."""
    exact, final = golden.trajectory["two/final"], {}
    for how in ("independent", "first_step"):
        joint = [c for c in golden.cases()["two"] if isinstance(c, OminiReference)]
        assert len(joint) == 2 and not any(c.adapter.config.independent for c in joint)
        _, final[how] = golden.generate("two", [replace(c, **{how: True}) for c in joint])
    assert difference(final["independent"], golden.trajectory["two_kv/final"]) <= TOLERANCE
    assert difference(final["first_step"], exact) == pytest.approx(0.095, abs=1e-3)
    assert difference(final["independent"], exact) == pytest.approx(0.238, abs=1e-3)


def test_the_fixture_tells_the_two_orders_of_scale_and_shift_apart(golden):
    f = golden.forward
    assert not torch.equal(f["ids/scale2_then_delta_trainer_order"], f["ids/delta_then_scale2_inference_order"])
    assert difference(f["out/scale2_delta_trainer_order"], f["out/scale2_delta_inference_order"]) > 10 * TOLERANCE
