"""suites/style_measures.py: measures by hand on made-up features, and the comparison with a curve."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from condit.rulers import statistics
from condit.rulers.statistics import bootstrap, resample
from condit_lab.suites import style_measures as own

N = 60
CLUSTERS = [f"concept {i // 2}" for i in range(N)]


def noise(seed, spread=0.1):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.fixture
def curve():
    """A baseline at four strengths: more style, more of the other measure; the first is no control."""
    base = noise(0)
    styles = [base + s for s in (0.1, 0.3, 0.5, 0.7)]
    values = [noise(1) + v for v in (0.0, 0.1, 0.3, 0.7)]
    return styles, values


def test_rows_are_resampled_together():
    a, b = noise(0), noise(1)
    actual = resample([a, b, a - b], CLUSTERS)
    assert actual.shape == (3, 2000)
    np.testing.assert_allclose(actual[0] - actual[1], actual[2], atol=1e-8)  # a - b was rounded to fp32
    interval = bootstrap(a, CLUSTERS)
    assert np.percentile(actual[0], [2.5, 97.5]) == pytest.approx([interval.low, interval.high])
    with pytest.raises(ValueError, match="must be of the same images"):
        resample([a, b[:3]], None)


@pytest.mark.parametrize("point", range(4))
def test_a_method_that_is_the_baseline_lies_on_its_curve(curve, point):
    gap = statistics.against_curve(curve[0], curve[1], curve[0][point], curve[1][point], CLUSTERS)
    assert gap.side == "on"
    assert gap.difference == pytest.approx(0, abs=1e-9)
    assert gap.low is not None and gap.high is not None
    assert gap.low <= 1e-9 and gap.high >= -1e-9
    assert gap.verdict(True) == gap.verdict(False) == "even"


def test_between_two_strengths_the_curve_is_linear(curve):
    styles, values = curve
    half_style, half_value = (styles[1] + styles[2]) / 2, (values[1] + values[2]) / 2
    gap = statistics.against_curve(curve[0], curve[1], half_style, half_value + 0.2, CLUSTERS)
    # The added 0.2 is the same for every picture, so no resample sees another difference.
    assert (gap.difference, gap.low, gap.high) == pytest.approx((0.2, 0.2, 0.2), abs=1e-6)
    assert gap.verdict(more_is_better=True) == "better"
    assert gap.verdict(more_is_better=False) == "worse"


def test_paired_intervals_are_narrower_than_those_of_each_side(curve):
    styles, values = (([x + 3 * noise(9) for x in group]) for group in curve)
    gap = statistics.against_curve(styles, values, styles[2], values[2] - 0.05 + 0.1 * noise(5), CLUSTERS)
    alone = bootstrap(values[2], CLUSTERS)
    assert gap.low is not None and gap.high is not None
    assert gap.high - gap.low < (alone.high - alone.low) / 2
    assert gap.verdict(more_is_better=False) == "better"


@pytest.mark.parametrize(("shift", "side"), [(2.0, "above"), (-2.0, "below")])
def test_beyond_the_curve_no_difference_is_given(curve, shift, side):
    gap = statistics.against_curve(curve[0], curve[1], curve[0][0] + shift, curve[1][0], CLUSTERS)
    assert (gap.side, gap.difference, gap.low, gap.high, gap.outside) == (side, None, None, None, 1.0)
    assert gap.verdict(True) == "out of range"


def test_resamples_beyond_the_curve_are_counted(curve):
    inside = statistics.against_curve(curve[0], curve[1], (curve[0][1] + curve[0][2]) / 2, curve[1][1], CLUSTERS)
    edge = statistics.against_curve(curve[0], curve[1], curve[0][3] - 0.002 + noise(7), curve[1][3], CLUSTERS)
    assert inside.outside == 0
    assert 0.1 < edge.outside < 0.9


def test_a_curve_of_one_point_is_refused():
    with pytest.raises(ValueError, match="at least two strengths"):
        statistics.against_curve([noise(0)], [noise(1)], noise(0), noise(1))


def test_where_style_falls_again_the_least_strength_counts():
    styles, values = np.array([[0.0, 0.4, 0.8, 0.4]]), np.array([[0.0, 1.0, 2.0, 5.0]])
    assert statistics.crossing(styles, values, np.array([0.6]))[0] == pytest.approx([1.5])
    assert statistics.crossing(styles, values, np.array([0.4]))[0] == pytest.approx([1.0])
    for at, value, side in ((0.9, 2.0, 1), (-0.1, 0.0, -1), (0.8, 2.0, 0), (0.0, 0.0, 0)):
        assert [x.item() for x in statistics.crossing(styles, values, np.array([at]))] == pytest.approx([value, side])
    flat = statistics.crossing(np.array([[0.3, 0.3, 0.5]]), np.array([[1.0, 2.0, 3.0]]), np.array([0.3]))
    assert flat[0] == pytest.approx([1.0])


def test_retrieval_asks_among_references_of_other_styles():
    references = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=-1)
    pictures = F.normalize(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9]]), dim=-1)
    # Picture 0 is nearest to reference 1, which is of its own style; picture 1 to the other style's.
    assert own.retrieved(pictures, references, ["a", "a", "b"]).tolist() == [True, False, True]
    assert own.retrieval_chance(["a", "a", "b"]) == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_leakage_above_others_forgets_what_all_references_share():
    texts = torch.eye(3)
    picture = torch.tensor([[0.8, 0.4, 0.4]]).expand(3, 3)
    length = float(picture[0].norm())
    actual = own.above_others(picture, texts, torch.arange(3))
    assert actual.tolist() == pytest.approx([0.4 / length, -0.2 / length, -0.2 / length])
    # Two references of one label are no foils to each other.
    same = own.above_others(picture, texts[[0, 0, 1]], torch.tensor([0, 0, 1]))
    assert same.tolist() == pytest.approx([0.4 / length, 0.4 / length, -0.4 / length])
    assert own.above_others(picture, texts[[0, 0, 0]], torch.zeros(3)).tolist() == pytest.approx([0.8 / length] * 3)


def test_the_area_under_the_curve_counts_pairs_and_halves_ties():
    assert statistics.auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert statistics.auc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 0
    assert statistics.auc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    positive, negative = noise(0)[:20].round(decimals=1), noise(1).round(decimals=1)
    pairs = positive[:, None] - negative[None]
    assert statistics.auc(positive, negative) == pytest.approx(
        float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())
    )


def test_an_image_is_realistic_within_reach_of_a_real_one():
    bank = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    reaches = own.reach(bank, neighbours=1)
    assert reaches.tolist() == [1, 1, 1, 1, 7]
    pictures = torch.tensor([[-0.9], [-1.1], [3.9], [17.0], [17.1]])
    assert own.realistic(pictures, bank, reaches).tolist() == [True, False, True, True, False]
    with pytest.raises(ValueError, match="more than 3"):
        own.reach(bank[:3])


def test_a_scale_makes_unit_features():
    real = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + 3
    scaled = own.Scale.of(real)(real)
    assert torch.allclose(scaled.norm(dim=1), torch.ones(50))
    assert scaled.isfinite().all()
