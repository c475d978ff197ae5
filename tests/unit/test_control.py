"""controls/control.py: when, where, for which row, in which region."""

import inspect

import pytest
import torch

from condit.controls.control import (
    Control,
    Placing,
    Run,
    Step,
    When,
    Where,
    check_arguments,
    check_controls,
    match_batch,
    region_mask,
)
from condit.controls.deadiff import DEADiff
from condit.controls.instantstyle import InstantStyle
from condit.controls.ip_adapter import IPAdapter
from condit.controls.omini import OminiControl
from condit.nn.attention import Call, Site, sdpa


def active(when: When, count: int) -> list[int]:
    return [i for i in range(count) if when.factor(Step(i, count, 1 - i / count))]


@pytest.mark.parametrize(
    ("when", "count", "steps"),
    [
        (When(), 4, [0, 1, 2, 3]),
        (When(0, 0.5), 4, [0, 1]),
        (When(0.5, 1), 4, [2, 3]),
        (When(0, 0.6), 4, [0, 1]),  # a step that ends after `end` is out
        (When(0.3, 1), 10, [3, 4, 5, 6, 7, 8, 9]),  # 3/10 is inside 0.3 in spite of rounding
        (When(0, 0.7), 10, [0, 1, 2, 3, 4, 5, 6]),
        (When(0, 0.1), 4, []),
    ],
)
def test_a_step_acts_if_it_lies_wholly_inside(when, count, steps):
    assert active(when, count) == steps


def test_a_curve_gives_the_factor_at_the_start_of_a_step():
    when = When(curve=lambda progress: 1 - progress)
    assert [when.factor(Step(i, 4, 0.0)) for i in range(4)] == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.8, 0.2), (-0.1, 1), (0, 1.1)])
def test_an_empty_or_outer_part_of_the_schedule_is_refused(start, end):
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        When(start, end)


def test_where_matches_shell_patterns_over_paths():
    site = Site("transformer_blocks.1.attn", "joint", 1)
    assert site in Where() and site in Where.of("transformer_blocks.*") and site in Where.of(("x", "*.1.attn"))
    assert site not in Where.of("single_transformer_blocks.*")
    assert Where.of(None) == Where() and Where.of(Where(("a",))) == Where(("a",))


def test_one_row_serves_all_and_n_rows_serve_copies_in_order():
    x = torch.arange(2)[:, None]
    assert match_batch(x, 2, "x") is x
    assert match_batch(x, 6, "x").flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert match_batch(x[1:], 3, "x").flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize(("rows", "batch"), [(2, 3), (4, 2), (3, 4)])
def test_rows_that_do_not_divide_the_batch_are_refused(rows, batch):
    with pytest.raises(ValueError, match=f"IPAdapter: {rows} references for {batch} images"):
        match_batch(torch.zeros(rows, 1), batch, "IPAdapter")


def test_a_region_is_the_covered_part_of_each_token_row_major():
    mask = torch.zeros(1, 4, 6)
    mask[0, :2, 2:4] = 1  # the second of three tokens in the first row
    mask[0, 2:, 0] = 1  # half of the first token in the second row
    assert region_mask(mask, (2, 3)).shape == (1, 1, 6, 1)
    assert region_mask(mask, (2, 3)).flatten().tolist() == [0, 1, 0, 0.5, 0, 0]


def test_a_control_that_overrides_nothing_changes_nothing():
    control, site = Control(), Site("a", "joint", 0)
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    call = Call(q, k, v, site)
    run = Run(None, 1, (2, 2), torch.zeros(1, 1), None, 4)  # type: ignore[arg-type]
    assert control.prepare(run) is control and control.at(Step(0, 1, 1.0)) is control
    assert torch.equal(control.around(call, sdpa), sdpa(call))
    assert control.streams() == () and control.residual(site, q) is None and control.negative() is None
    assert control.describe() == {"method": "Control"}


def test_controls_must_be_a_list_of_controls():
    one = Control()
    assert check_controls([one]) == (one,) and check_controls(()) == ()
    with pytest.raises(ValueError, match=r"controls=\[...\]; found Control"):
        check_controls(one)  # type: ignore[arg-type]
    for wrong, name in (("tiny/style", "str"), ([one, "swap"], "str"), ([torch.nn.Linear(1, 1)], "Linear")):
        with pytest.raises(ValueError, match=rf"made by adapter.control\(...\); found {name}"):
            check_controls(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("adapter", [OminiControl, IPAdapter, InstantStyle, DEADiff])
def test_every_control_is_made_from_a_reference_and_a_strength(adapter):
    _, reference, strength, *named = inspect.signature(adapter.control).parameters.values()
    assert reference.name in ("reference", "style") and (strength.name, strength.default) == ("strength", 1.0)
    assert {p.kind for p in (reference, strength)} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {p.kind for p in named} == {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize("adapter", [OminiControl, IPAdapter, InstantStyle, DEADiff])
def test_a_misspelt_argument_or_a_second_reference_is_an_error(adapter):
    bare = adapter.__new__(adapter)  # the arguments are checked before anything else
    with pytest.raises(TypeError, match=r"control\(\) has no argument 'wen'.*when"):
        adapter.control(bare, "a.png", wen=(0, 0.5))
    with pytest.raises(ValueError, match=r"second argument of control\(\), is a number; found str"):
        adapter.control(bare, "a.png", "b.png")


def test_known_arguments_and_every_form_of_strength_pass():
    for strength in (1, 0.5, [0.1, 0.2], {"up_blocks.1": 1.0}):
        check_arguments(strength, {"when": (0, 1), "mask": None}, Placing)
