"""nn/streams.py: who attends to whom, with which weight, and where tokens stand."""

import pytest
import torch

from condit.nn.streams import Group, Sees, Stream, grid_ids, groups, row_weights

TEXT, IMAGE, A, B = range(4)
HALF, DOUBLE = torch.tensor(0.5).log(), torch.tensor(2.0).log()


def stream(sees: Sees = "main", weight: torch.Tensor | None = None, weight_text: bool = True) -> Stream:
    empty = torch.zeros(1, 0)
    return Stream(empty, empty, empty, empty, sees=sees, log_weight=weight, weight_text=weight_text)


def visible(grouped: list[Group]) -> dict[int, set[int]]:
    """Row -> the streams that it sees."""
    return {row: set(group.cols) for group in grouped for row in group.rows}


EVERY = {TEXT, IMAGE, A, B}


@pytest.mark.parametrize(
    ("sees", "of_a", "of_b"),
    [("main", {TEXT, IMAGE, A}, {TEXT, IMAGE, B}), ("self", {A}, {B}), ("all", EVERY, EVERY)],
)
def test_visibility_is_the_table_of_the_official_code(sees, of_a, of_b):
    actual = visible(groups(TEXT, IMAGE, [None, None, stream(sees), stream(sees)]))
    assert actual == {TEXT: EVERY, IMAGE: EVERY, A: of_a, B: of_b}


def test_conditions_of_different_kinds_are_joined_in_one_sequence():
    actual = visible(groups(TEXT, IMAGE, [None, None, stream("self"), stream("main")]))
    assert actual == {TEXT: EVERY, IMAGE: EVERY, A: {A}, B: {TEXT, IMAGE, B}}


def test_without_conditions_all_rows_share_one_call_without_weights():
    assert groups(TEXT, IMAGE, [None, None]) == [Group((0, 1), (0, 1), (None, None))]


def test_one_joint_condition_shares_the_call_of_the_main_rows_unless_kept_apart():
    given = [None, None, stream()]
    assert [g.rows for g in groups(TEXT, IMAGE, given)] == [(0, 1, 2)]
    assert [g.rows for g in groups(TEXT, IMAGE, given, apart=True)] == [(0, 1), (2,)]


def test_main_rows_are_one_stream_in_the_single_blocks():
    actual = groups(None, 0, [None, stream("self", HALF)])
    assert actual == [Group((0,), (0, 1), (None, HALF)), Group((1,), (1,), (None,))]


def test_a_strength_weighs_the_condition_for_the_main_rows_and_the_main_rows_for_the_condition():
    main, own = groups(TEXT, IMAGE, [None, None, stream(weight=HALF)])
    assert main == Group((TEXT, IMAGE), (TEXT, IMAGE, A), (None, None, HALF))
    assert own == Group((A,), (TEXT, IMAGE, A), (HALF, HALF, None))


def test_each_condition_has_its_own_strength():
    main, a, b = groups(TEXT, IMAGE, [None, None, stream(weight=HALF), stream(weight=DOUBLE)])
    assert main.weights == (None, None, HALF, DOUBLE)
    assert a.weights == (HALF, HALF, None) and b.weights == (DOUBLE, DOUBLE, None)


def test_the_strength_between_conditions_that_see_each_other_is_one():
    actual = groups(TEXT, IMAGE, [None, None, stream("all", HALF), stream("all", DOUBLE)])
    assert actual[1] == Group((A,), (TEXT, IMAGE, A, B), (HALF, HALF, None, None))


def test_the_papers_strength_leaves_text_out():
    text, image, own = groups(TEXT, IMAGE, [None, None, stream(weight=HALF, weight_text=False)])
    assert text == Group((TEXT,), (TEXT, IMAGE, A), (None, None, None))
    assert image == Group((IMAGE,), (TEXT, IMAGE, A), (None, None, HALF))
    assert own == Group((A,), (TEXT, IMAGE, A), (None, HALF, None))


def test_grid_ids_are_row_major_with_a_zero_axis_in_front():
    assert grid_ids(2, 3).tolist() == [[0, r, c] for r in range(2) for c in range(3)]


def test_compact_ids_are_centres_of_their_cells_and_delta_counts_in_image_tokens():
    assert grid_ids(1, 3, scale=2).tolist() == [[0, 0.5, 0.5], [0, 0.5, 2.5], [0, 0.5, 4.5]]
    assert grid_ids(1, 2, scale=2, delta=(1, -4)).tolist() == [[0, 1.5, -3.5], [0, 1.5, -1.5]]


def test_the_official_inference_counts_delta_in_tokens_of_the_condition():
    actual = grid_ids(1, 2, scale=2, delta=(1, -4), order="official-inference")
    assert actual.tolist() == [[0, 2.5, -7.5], [0, 2.5, -5.5]]
    with pytest.raises(ValueError, match="'scale-first' or 'official-inference'; found 'mine'"):
        grid_ids(1, 2, order="mine")  # type: ignore[arg-type]


def test_text_takes_the_mean_weight_of_the_image_or_none():
    weight = torch.tensor([[1.0, 0.5, 0.0]]).log()
    assert row_weights(weight, 5, slice(2, 5)).exp()[0].tolist() == pytest.approx([0.5, 0.5, 1, 0.5, 0])
    assert row_weights(weight, 5, slice(2, 5), weight_text=False).exp().tolist()[0][:2] == [1, 1]
    assert row_weights(weight, 2, slice(0, 0)).exp()[0].tolist() == pytest.approx([0.5, 0.5])
    assert row_weights(HALF, 3, slice(1, 3)).exp()[0].tolist() == [0.5] * 3
    assert row_weights(HALF, 3, slice(1, 3), weight_text=False).exp()[0].tolist() == [1, 0.5, 0.5]


def test_ids_are_float32_because_bfloat16_would_round_far_columns():
    ids = grid_ids(1, 300)
    assert ids.dtype == torch.float32
    assert not torch.equal(ids.bfloat16().float(), ids)
