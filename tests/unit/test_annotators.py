"""Edges follow what the eye sees, with and without alpha; every condition is three equal or three colour channels."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageDraw

from condit.data.annotators import (
    blur,
    canny,
    canny_array,
    edge_map,
    edges,
    edges_array,
    gray,
    line_map,
    lines,
    soft_edges,
)
from condit.drawing.references import read_references


def disc(fill: str, ground: str | tuple = "white", mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (128, 128), ground)
    ImageDraw.Draw(image).ellipse((24, 24, 104, 104), fill=fill)
    return image


def on_circle(lines: np.ndarray) -> float:
    """The share of line pixels within two pixels of the disc's outline."""
    y, x = np.nonzero(lines)
    return float((abs(np.hypot(y - 64, x - 64) - 40) < 2).mean()) if len(y) else 0.0


def test_edges_follow_the_outline_in_thin_white_lines():
    lines = np.asarray(edges(disc("black")))
    assert lines.shape == (128, 128, 3)
    assert set(np.unique(lines)) == {0, 255}
    assert (lines[:, :, 0] == lines[:, :, 1]).all()
    assert on_circle(lines[:, :, 0]) == 1.0
    assert 200 < (lines[:, :, 0] > 0).sum() < 320  # the circle is 251 pixels long: one line, not two


@pytest.mark.parametrize("fill", ["white", "#808080", "black", "red"])
def test_alpha_gives_every_colour_an_outline(fill):
    lines = edges_array(np.asarray(disc(fill, (255, 255, 255, 0), "RGBA")))
    assert on_circle(lines) == 1.0
    assert 200 < (lines > 0).sum() < 340


def test_without_alpha_white_on_white_has_no_edge():
    assert edges_array(np.asarray(disc("white"))).max() == 0


def test_an_opaque_alpha_channel_changes_nothing():
    opaque = disc("red").convert("RGBA")
    assert np.array_equal(np.asarray(edges(opaque)), np.asarray(edges(disc("red"))))


def test_higher_thresholds_give_fewer_lines():
    faint = disc("#e8e8e8")
    assert np.asarray(edges(faint)).max() == 255
    assert np.asarray(edges(faint, low=0.3, high=0.6)).max() == 0


@pytest.mark.parametrize("bad", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((8, 8, 2), np.uint8)])
def test_an_edge_array_of_another_shape_raises_with_the_expected_one(bad):
    with pytest.raises(ValueError, match="expected uint8"):
        edges_array(bad)


def test_soft_edges_are_strongest_on_the_outline_and_see_colour_and_alpha():
    for image in (disc("red", "#00b300"), disc("white", (255, 255, 255, 0), "RGBA")):
        soft = np.asarray(soft_edges(image))[:, :, 0]
        assert soft.max() == 255
        assert on_circle(soft > 128) == 1.0


def test_a_flat_image_has_no_soft_edges():
    assert np.asarray(soft_edges(Image.new("RGB", (16, 16), "red"))).max() == 0


def test_lines_are_the_edges_in_ink_three_pixels_wide():
    light, ink = (np.asarray(draw(disc("black")))[:, :, 0] for draw in (edges, lines))
    assert set(np.unique(ink)) == {0, 255} and (ink == 255).mean() > 0.8
    assert (ink[light > 0] == 0).all()
    where = np.argwhere(light)
    far = np.abs(np.argwhere(ink == 0)[:, None] - where[None]).max(-1).min(1)
    assert far.max() == 1
    # A ready map, either way round, becomes the same drawing.
    for ready in (edges(disc("black")), Image.fromarray(255 - np.asarray(edges(disc("black"))))):
        assert np.array_equal(np.asarray(line_map(ready)), np.asarray(lines(disc("black"))))


def test_gray_has_equal_channels_and_keeps_light_and_dark():
    plane = np.asarray(gray(disc("red")))
    assert (plane[:, :, 0] == plane[:, :, 2]).all()
    assert plane[64, 64, 0] == 76  # 0.299 * 255


def test_blur_spreads_over_the_given_pixels():
    soft = np.asarray(blur(disc("black"), sigma=4))
    assert 100 < soft[64, 24].mean() < 160
    assert soft[0, 0].min() == 255


def test_a_ready_map_is_white_on_black_whichever_way_it_was_drawn():
    lines = edges(disc("black"))
    turned = Image.fromarray(255 - np.asarray(lines))
    assert np.array_equal(np.asarray(edge_map(turned)), np.asarray(edge_map(lines)))
    assert np.array_equal(np.asarray(edge_map(lines)), np.asarray(lines))


# Canny as OminiControl's published adapter knows it


def step(height: int, across: str = "columns") -> np.ndarray:
    """Grey 40 to the left (or above) of the middle of 9 x 9, 40 + height to the right (or below)."""
    plane = np.full((9, 9), 40, np.uint8)
    plane[:, 5:] += height
    return np.repeat((plane if across == "columns" else plane.T)[..., None], 3, 2)


def test_canny_marks_a_step_above_the_upper_threshold_with_one_line():
    """The Sobel sum of a step of h is 4 h: 51 gives 204, 50 gives 200, and a threshold must be exceeded."""
    assert not canny_array(step(50)).any()
    for across in ("columns", "rows"):
        actual = canny_array(step(51, across))
        lines = actual if across == "columns" else actual.T
        assert (lines[:, 4] == 255).all() and lines.sum() == 9 * 255  # of two equal pixels the first


def test_canny_keeps_a_weak_line_only_if_connected_to_a_strong_one():
    weak = step(30)  # 120: between the thresholds
    assert not canny_array(weak).any()
    weak[:3, 5:] = 240
    actual = canny_array(weak)
    assert actual[8, 4] == 255  # six pixels away from the strong part
    alone = canny_array(np.where(np.arange(9)[:, None, None] == 3, 40, weak).astype(np.uint8))
    assert not alone[8].any()


def test_canny_sees_colours_of_one_luma_where_a_grey_image_has_no_edge():
    picture = np.full((9, 9, 3), (200, 0, 0), np.uint8)
    picture[:, 5:] = (0, 102, 0)  # both of luma 60
    assert canny_array(picture)[:, 4].all()
    assert not canny_array(np.asarray(gray(picture))).any()


def test_canny_follows_both_diagonals_in_stairs():
    """Compared along the gradient a stair has two equal pixels a row; compared across it none would be left."""
    rows, columns = np.mgrid[:20, :20]
    for picture in (rows > columns, rows > 19 - columns):
        actual = canny_array(np.repeat(picture[..., None], 3, 2).astype(np.uint8) * 255)
        assert (actual[2:18].sum(1) == 2 * 255).all()


def test_canny_gives_three_equal_channels():
    actual = np.asarray(canny(step(200)))
    assert actual.shape == (9, 9, 3) and (actual[..., 0] == actual[..., 2]).all() and actual.max() == 255


@pytest.mark.parametrize("kind", ["photo", "noise"])
def test_canny_equals_opencv_where_that_is_installed(kind):
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    if kind == "photo":
        pixels = np.asarray(Image.fromarray(pixels[:8, :10]).resize((80, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(canny_array(pixels), cv2.Canny(pixels, 100, 200))


@pytest.mark.parametrize("size", [(150, 201), (64, 65)])
def test_tiles_of_a_large_image_give_the_lines_of_the_whole(size, monkeypatch):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (size[0] // 6 + 1, size[1] // 6 + 1, 4), dtype=np.uint8))
    pixels = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC))
    annotators = (edges_array, lambda p: canny_array(p[:, :, :3]), lambda p: np.asarray(soft_edges(p)))
    whole = [annotate(pixels) for annotate in annotators]
    monkeypatch.setattr("condit.data.annotators.TILE", 32)
    for annotate, expected in zip(annotators, whole, strict=True):
        assert expected.max() == 255
        assert np.array_equal(annotate(pixels), expected)


def test_edges_of_a_photograph_of_twelve_megapixels_need_little_memory():
    """numpy's own arrays, as tracemalloc counts them; 1,300 MB for Canny before it worked in tiles."""
    pixels = np.zeros((3000, 4000, 3), np.uint8)
    pixels[1000:2000, 1000:3000] = 255
    tracemalloc.start()
    try:
        assert canny_array(pixels).max() == 255
        assert tracemalloc.get_traced_memory()[1] < 400e6
    finally:
        tracemalloc.stop()


def test_an_empty_list_of_references_is_refused():
    with pytest.raises(ValueError, match="no reference: an empty list"):
        read_references([], None, (16, 16), 8)
