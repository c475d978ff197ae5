"""rulers/statistics.py: what the report adds to intervals, by hand or against scipy."""

import numpy as np
import pytest
import scipy.stats
import torch

from condit.rulers import statistics


def test_the_area_of_pairs_is_that_of_mann_and_whitney_and_its_interval_covers_it():
    g = np.random.default_rng(0)
    scores, same = np.round(g.normal(size=300), 1), g.random(300) < 0.3
    first, second = g.integers(0, 20, 300), g.integers(0, 20, 300)
    actual = statistics.auc_interval(scores, same, first, second)
    expected = statistics.auc(torch.tensor(scores[same]), torch.tensor(scores[~same]))
    assert actual.value == pytest.approx(expected)
    assert actual.low < expected < actual.high and actual.n == 20
    assert statistics.auc_interval(same * 1.0, same, first, second).low == 1
    with pytest.raises(ValueError, match="both kinds"):
        statistics.auc_interval(scores, np.ones(300, bool), first, second)


def test_a_blind_ruler_passes_in_about_one_study_of_forty():
    passed = 0
    for seed in range(60):
        g = np.random.default_rng(seed)
        i, j = np.triu_indices(30, 1)
        group, value = np.arange(30) % 10, g.normal(size=30)
        scores = -np.abs(value[i] - value[j])
        interval = statistics.auc_interval(scores, group[i] == group[j], group[i], group[j], resamples=100)
        passed += interval.low > 0.5
    assert passed <= 7  # 2.5 % are 1.5; groups are few and percentiles a little too narrow


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert statistics.holm([]) == []


def test_the_number_that_tells_a_difference_is_that_of_the_normal_approximation():
    deviation, n = 0.3, 100
    half = 1.959964 * deviation / n**0.5
    expected = ((1.959964 + 0.841621) * deviation / 0.05) ** 2
    assert statistics.needed(n, -half, half) == pytest.approx(expected, abs=1)


def test_p_values_count_resamples_on_the_other_side():
    assert statistics.p_value(np.linspace(-1, 3, 400)) == pytest.approx(2 * 101 / 401)
    assert statistics.p_value(np.ones(99)) == 0.02
    assert statistics.p_value(np.zeros(10)) == 1


def test_rank_correlation_equals_scipys():
    g = np.random.default_rng(0)
    a, b = g.integers(0, 5, 50).astype(float), g.normal(size=50)
    assert statistics.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b)[0])
    assert np.isnan(statistics.spearman(np.ones(5), np.arange(5.0)))
