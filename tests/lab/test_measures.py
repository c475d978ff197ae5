"""Measures on cases that can be worked out by hand."""

import math

import pytest
import torch

from condit.data.line_score import edge_f1
from condit.rulers import distributions, pixels, statistics
from condit_lab.suites import measures


def flat(value, count=1, side=64):
    """Pictures of one colour, (count, 3, side, side)."""
    return torch.tensor(value, dtype=torch.uint8).view(1, 3, 1, 1).repeat(count, 1, side, side)


def square(at, side=20, colour=(0, 0, 0), size=64):
    """A filled square on white, its corner at (at, at)."""
    picture = flat((255, 255, 255), side=size)
    picture[:, :, at : at + side, at : at + side] = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1)
    return picture


def line(column, size=32, rows=slice(None)):
    lines = torch.zeros(1, size, size, dtype=torch.bool)
    lines[:, rows, column] = True
    return lines


def test_bootstrap_of_equal_values_has_no_width():
    actual = statistics.bootstrap(torch.ones(50))
    assert (actual.value, actual.low, actual.high, actual.n) == (1, 1, 1, 50)


def test_bootstrap_interval_has_the_width_of_theory():
    values = torch.arange(400) % 2
    actual = statistics.bootstrap(values)
    half = 1.96 * math.sqrt(0.25 / 400)
    assert actual.value == 0.5
    assert actual.high - 0.5 == pytest.approx(half, rel=0.15)  # 2,000 resamples leave a few percent
    assert 0.5 - actual.low == pytest.approx(half, rel=0.15)


def test_bootstrap_repeats_bit_equal_and_moves_with_its_seed():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert statistics.bootstrap(values) == statistics.bootstrap(values)
    assert statistics.bootstrap(values).low != statistics.bootstrap(values, seed=1).low


def test_images_of_one_concept_count_as_one_draw():
    values = torch.tensor([0.0, 1.0] * 50).repeat_interleave(4)
    alone = statistics.bootstrap(values)
    together = statistics.bootstrap(values, [i // 4 for i in range(len(values))])
    assert together.value == alone.value
    assert together.high - together.low == pytest.approx(2 * (alone.high - alone.low), rel=0.15)  # sqrt(4)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0, 2.0]]])
def test_a_mean_of_nothing_or_of_nan_is_refused(values):
    with pytest.raises(ValueError, match="finite numbers"):
        statistics.bootstrap(values)


def test_clusters_must_be_as_many_as_values():
    with pytest.raises(ValueError, match="2 clusters for 3 values"):
        statistics.bootstrap([1, 2, 3], ["a", "b"])


def test_a_ratio_draws_both_sides_together():
    ceiling = torch.rand(100, generator=torch.Generator().manual_seed(0)) + 0.1
    actual = statistics.ratio(ceiling / 2, ceiling)
    assert actual is not None
    assert (actual.value, actual.low, actual.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_to_a_ceiling_of_zero_is_none():
    assert statistics.ratio([1, 1], [0, 0]) is None


def test_agreement_is_the_judges_first_choice():
    said = torch.tensor([[0.6, 0.4], [0.6, 0.4]])
    assert measures.agreement(said, torch.tensor([0, 1])).tolist() == [True, False]


LABELS = torch.eye(4)


def test_concept_ranks_count_the_labels_that_are_nearer():
    images = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.9, 0.5, 0.1, 0.0], [0.9, 0.5, 0.1, 0.0]])
    assert measures.concept_ranks(images, LABELS, torch.tensor([0, 1, 3])).tolist() == [0, 1, 3]


def test_an_image_that_is_equally_near_to_all_labels_matches_no_label():
    assert measures.concept_ranks(torch.ones(1, 4), LABELS, torch.tensor([2])).tolist() == [3]


def test_any_one_of_the_references_can_leak():
    images = torch.tensor([[0.5, 0.1, 0.9, 0.0]])
    prompted = torch.tensor([0])
    assert measures.leaks(images, LABELS, prompted, torch.tensor([[1, 2]])).tolist() == [True]
    assert measures.leaks(images, LABELS, prompted, torch.tensor([[1, 3]])).tolist() == [False]


def test_the_reference_that_is_the_prompted_concept_is_no_leak():
    assert not measures.leaks(torch.rand(1, 4), LABELS, torch.tensor([1]), torch.tensor([[1]])).any()


def test_edge_similarity_is_one_for_the_same_and_zero_for_a_blank_image():
    assert pixels.edge_similarity(square(20), square(20)).item() == pytest.approx(1, abs=1e-5)
    assert pixels.edge_similarity(flat((255, 255, 255)), square(20)).item() == 0


def test_edge_similarity_falls_with_displacement_and_ignores_the_fill():
    moved = [pixels.edge_similarity(square(20 + d), square(20)).item() for d in (0, 1, 3, 8)]
    assert moved == sorted(moved, reverse=True)
    assert moved[1] > 0.9 > 0.4 > moved[3]
    assert pixels.edge_similarity(square(20, colour=(200, 0, 0)), square(20)).item() > 0.99


def test_edge_f1_forgives_two_pixels_and_not_three():
    assert edge_f1(line(10), line(10)).item() == 1
    assert edge_f1(line(12), line(10)).item() == 1
    assert edge_f1(line(13), line(10)).item() == 0


def test_edge_f1_tolerance_is_a_disk():
    corner = torch.zeros(1, 16, 16, dtype=torch.bool)
    corner[0, 5, 5] = True
    away = torch.zeros(1, 16, 16, dtype=torch.bool)
    away[0, 7, 7] = True  # 2 rows and 2 columns are 2.83 pixels
    assert edge_f1(away, corner).item() == 0


def test_edge_f1_of_half_the_lines_is_two_thirds():
    both = line(5) | line(25)
    assert edge_f1(line(5), both).item() == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert edge_f1(both, line(5)).item() == pytest.approx(2 / 3)  # precision 1/2, recall 1


def test_edge_f1_of_empty_maps():
    empty = torch.zeros(1, 32, 32, dtype=torch.bool)
    assert edge_f1(empty, empty).item() == 1
    assert edge_f1(empty, line(5)).item() == 0
    assert edge_f1(line(5), empty).item() == 0


def test_nearest_finds_the_copy_at_distance_zero():
    bank = torch.rand(9, 3 * 32 * 32, generator=torch.Generator().manual_seed(0))
    distance, actual = measures.nearest(bank[[4, 7]], bank)
    assert actual.tolist() == [4, 7]
    assert distance.tolist() == [0, 0]


def test_nearest_distance_is_in_units_of_a_channel():
    distance, _ = measures.nearest(torch.full((1, 3072), 0.6), torch.full((1, 3072), 0.5))
    assert distance.item() == pytest.approx(0.1, abs=1e-6)


def test_thumbnails_are_mean_colours():
    assert measures.thumbnails(square(0, side=32, size=128)).view(3, 32, 32)[:, :8, :8].eq(0).all()
    assert measures.thumbnails(flat((255, 0, 51), side=128)).view(3, 1024)[:, 0].tolist() == pytest.approx([1, 0, 0.2])


def test_luma_psnr_of_a_known_error():
    gray = flat((100, 100, 100))
    assert measures.luma_psnr(flat((126, 126, 126)), gray).item() == pytest.approx(-20 * math.log10(26 / 255), abs=1e-3)
    assert measures.luma_psnr(gray, gray).item() == pytest.approx(60)


def test_luma_psnr_does_not_see_colour():
    red = flat((255, 0, 0))
    assert measures.luma_psnr(red, flat((76, 76, 76))).item() > 45  # 0.299 * 255 = 76.2


def test_colour_distance_sees_colour_on_ink_alone():
    red, gray = square(20, colour=(220, 30, 30)), square(20, colour=(110, 110, 110))
    assert measures.colour_distance(red, red).item() == 0
    distance = measures.colour_distance(gray, red).item()
    assert distance > 50
    # On a paper of another colour the square is what is compared.
    on_blue = torch.where(red == 255, flat((0, 0, 255)), red)
    on_blue[:, :, 20:40, 20:40] = red[:, :, 20:40, 20:40]
    assert measures.colour_distance(on_blue, red).item() == 0


def test_colour_distance_leaves_lightness_out():
    dark, light = square(20, colour=(60, 60, 60)), square(20, colour=(160, 160, 160))
    assert measures.colour_distance(dark, light).item() < 0.1


def test_the_kernel_distance_is_that_of_its_definition():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 3, generator=g), torch.randn(5, 3, generator=g) + 1

    def k(x, y) -> float:
        return (float(x.double() @ y.double()) / 3 + 1) ** 3

    within_a = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / 30
    within_b = sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / 20
    across = sum(k(x, y) for x in a for y in b) / 30
    assert distributions.kernel_distance(a, b)[0] == pytest.approx(within_a + within_b - 2 * across)


def test_the_kernel_distance_is_about_zero_for_one_distribution_and_larger_for_two():
    g = torch.Generator().manual_seed(0)
    a, b, other = torch.randn(200, 8, generator=g), torch.randn(200, 8, generator=g), torch.randn(200, 8, generator=g)
    same, low, high = distributions.kernel_distance(a, b)
    _, low, high = distributions.kernel_distance(a, b)
    assert low < 0 < high
    assert distributions.kernel_distance(a, other + 0.5)[1] > high
    with pytest.raises(ValueError, match="at least 4"):
        distributions.kernel_distance(a[:3], b)
