"""rulers/features.py, rulers/distributions.py: every ruler against its equation, written out in loops or with scipy."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from condit.rulers import distributions, features, pixels
from condit.rulers.features import COMPARE
from condit.rulers.measure import RULERS


def maps(seed, *sizes):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(2, c, h, w, generator=g) for c, h, w in sizes]


A, B = maps(0, (3, 4, 5), (4, 2, 2)), maps(1, (3, 4, 5), (4, 2, 2))


def test_the_gram_distance_is_that_of_gatys():
    expected = 0.0
    for a, b in zip(A, B, strict=True):
        n, m = a.shape[1], a.shape[2] * a.shape[3]
        for i in range(n):
            for j in range(n):
                g, h = ((x[0, i] * x[0, j]).sum() for x in (a, b))
                expected += float((g - h) ** 2) / (4 * n**2 * m**2)
    actual = features.squared(features.gram(A), features.gram(B))
    assert actual.shape == (2,) and actual[0].item() == pytest.approx(expected, rel=1e-5)


def test_style_statistics_are_the_style_loss_of_adain():
    expected = 0.0
    for a, b in zip(A, B, strict=True):
        for moment in (lambda x: x[1].flatten(1).mean(1), lambda x: x[1].flatten(1).std(1)):
            expected += float((moment(a) - moment(b)).square().sum().sqrt())
    actual = features.norms(features.moments(A), features.moments(B))
    assert actual[1].item() == pytest.approx(expected, rel=1e-5)


def test_cas_forgets_mean_and_deviation_of_each_channel():
    a, b = A[0], B[0]
    assert features.squared(features.aligned(a), features.aligned(3 * a + 1)).max() < 1e-3  # eps beside the variance
    norm = torch.nn.InstanceNorm2d(3)
    expected = (norm(a) - norm(b)).square().mean((1, 2, 3))
    torch.testing.assert_close(features.squared(features.aligned(a), features.aligned(b)), expected)


def test_the_structure_distance_is_the_mean_square_of_cosines():
    a, b = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    own = [F.cosine_similarity(x[:, :, None], x[:, None], dim=-1) for x in (a, b)]
    expected = F.mse_loss(own[0], own[1], reduction="none").mean((1, 2))
    actual = features.squared(features.self_similarity(a), features.self_similarity(b))
    torch.testing.assert_close(actual, expected)
    assert features.squared(features.self_similarity(a), features.self_similarity(2 * a)).max() < 1e-10


def test_lpips_is_the_weighted_difference_of_unit_features():
    weights = [torch.tensor([0.2, 0.0, 0.7]), torch.tensor([0.1, 0.2, 0.3, 0.4])]
    expected = 0.0
    for a, b, w in zip(A, B, weights, strict=True):
        unit = [x[0] / x[0].norm(dim=0, keepdim=True) for x in (a, b)]
        expected += float((w[:, None, None] * (unit[0] - unit[1]) ** 2).sum(0).mean())
    actual = features.squared(features.perceptual(A, weights), features.perceptual(B, weights))
    assert actual[0].item() == pytest.approx(expected, rel=1e-5)


def test_histograms_count_colours_and_intersect():
    red, half = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    half[:2, :, 0] = 255
    a, b = (features.colour_histogram(x)[None] for x in (red, half))
    assert a.sum() == b.sum() == 1 and a[0, 7 * 64] == 1
    assert features.intersection(a, b).item() == pytest.approx(0.5)
    assert features.intersection(a, a).item() == 1


def test_a_palette_is_the_colours_of_a_picture():
    levels = np.array([0, 36, 73, 109, 146, 182, 219, 255], np.uint8)
    picture = np.repeat(np.repeat(levels[None, :, None], 4, 0), 3, 2)
    light = features.palette(picture)[:, 0].sort().values
    from skimage.color import rgb2lab

    np.testing.assert_allclose(light, np.sort(rgb2lab(picture)[0, :, 0]), atol=1e-4)


def test_the_distance_of_palettes_is_the_cheapest_of_all_assignments():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(1, 5, 3, generator=g), torch.rand(1, 5, 3, generator=g)
    cheapest = min(float((a[0] - b[0][list(p)]).norm(dim=-1).mean()) for p in permutations(range(5)))
    assert features.earth_mover(a, b).item() == pytest.approx(cheapest, rel=1e-6)
    assert features.earth_mover(a, a.flip(1)).item() == 0


def test_the_edge_feature_is_the_edge_similarity():
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    a, b = pixels.edge_feature(x[:1]), pixels.edge_feature(x[1:])
    torch.testing.assert_close(features.cosine(a, b), pixels.edge_similarity(x[:1], x[1:]))
    blank = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert features.cosine(pixels.edge_feature(blank), a).item() == 0


def test_fid_is_that_of_the_matrix_root():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 6, generator=g), torch.randn(40, 6, generator=g) * 2 + 1
    c, d = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    root = np.real(np.asarray(scipy.linalg.sqrtm(c @ d)))
    expected = float((a.double().mean(0) - b.double().mean(0)).square().sum()) + np.trace(c + d - 2 * root)
    assert distributions.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert distributions.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # Fewer pictures than dimensions, where the root of a singular matrix is hard.
    assert distributions.frechet_distance(a[:3], a[:3] + 2) == pytest.approx(24)
    with pytest.raises(ValueError, match="two pictures"):
        distributions.frechet_distance(a[:1], b)


def test_art_fid_by_hand():
    assert distributions.art_fid(0.5, 3.0) == 6.0


def test_every_ruler_names_its_paper_its_equation_and_a_function():
    for ruler in RULERS.values():
        assert ruler.title and ruler.paper and ruler.equation and isinstance(ruler.more, bool)
        assert ruler.of in ("style", "content", "likeness", "text", "label", "words", "quality")
        assert not ruler.compare or (ruler.compare in COMPARE and ruler.needs and ruler.feature)
        if ruler.of in ("likeness", "label"):
            assert not ruler.more  # less of the reference's content is better


def test_the_page_names_every_ruler():
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.count(" | ") == 5 and "`" in line}
    for ruler in RULERS.values():
        row = rows[ruler.name]
        assert ruler.title in row and ruler.paper in row and ("more" if ruler.more else "less") in row.split("|")[-2]
