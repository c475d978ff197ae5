"""Procedural styles: the same style on every icon, the same pixels for the same seed."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from condit_lab.icons.procedural import Grade, Procedural
from condit_lab.icons.procedural_recipes import RECIPES
from condit_lab.icons.world import IconWorld, sample_path


@pytest.fixture(scope="module")
def icons() -> list[np.ndarray]:
    world = IconWorld.open(sample_path(), styles=["noto", "fluent-emoji-flat", "noto-mono"])
    return [world.rgba(index) for index in (3, 120, 250)]


def disc() -> np.ndarray:
    """A red disc with a blue right half."""
    row, column = np.mgrid[:128, :128] - 63.5
    rgba = np.zeros((128, 128, 4), np.uint8)
    rgba[np.hypot(row, column) < 40] = (220, 30, 30, 255)
    rgba[(np.hypot(row, column) < 40) & (column > 0)] = (30, 30, 220, 255)
    return rgba


def test_a_seed_gives_one_style_and_one_style_gives_one_image(icons) -> None:
    for seed in range(20):
        style, again = Procedural.sample(Random(seed)), Procedural.sample(Random(seed))
        assert style == again
        assert np.array_equal(style.apply(icons[0]), again.apply(icons[0]))
    assert len({Procedural.sample(Random(seed)) for seed in range(50)}) > 45


@pytest.mark.parametrize("recipe", [recipe for recipe, _ in RECIPES], ids=lambda recipe: recipe.__name__)
def test_every_recipe_draws_and_describes(recipe, icons) -> None:
    for seed in range(6):
        style = recipe(Random(seed))
        assert style.words_en.isascii() and len(style.words_en) > 4
        assert style.words_zh and not style.words_zh.isascii()
        for icon in icons:
            before = icon.copy()
            drawn = style.apply(icon)
            assert drawn.shape == (128, 128, 3) and drawn.dtype == np.uint8
            assert drawn.std() > 3, f"{style.words_en} draws nothing"
            assert np.array_equal(icon, before), "the icon was changed"


def test_one_style_gives_different_icons_one_background(icons) -> None:
    for seed in range(20):
        style = Procedural.sample(Random(seed))
        corners = np.stack([style.apply(icon)[[0, 0, -1, -1], [0, -1, 0, -1]] for icon in icons]).astype(int)
        assert np.ptp(corners, axis=0).max() <= 2, style.words_en


def test_an_outline_runs_around_the_shape_and_between_its_colours() -> None:
    plain = Procedural("", "", "keep", scale=1.0)
    lined = Procedural("", "", "keep", line=(0, 255, 0), width=3.0, scale=1.0)
    green = (lined.apply(disc())[..., 1] > 150) & (plain.apply(disc())[..., 1] < 150)
    assert green[64, 62:66].any(), "no line where red meets blue"
    outside = lined.apply(disc())[64, 63 + 41 : 63 + 44]
    assert (outside[:, 1] > outside[:, 0]).any(), "no line around the shape"
    assert not green[64, 40:55].any(), "a line inside one colour"


def test_lines_only_leave_the_inside_to_the_background() -> None:
    drawn = Procedural("", "", "none", line=(0, 0, 0), background=((200, 220, 240),), scale=1.0).apply(disc())
    assert drawn[64, 45].tolist() == [200, 220, 240]


def test_a_palette_uses_its_colours_alone() -> None:
    palette = ((20, 20, 20), (240, 60, 60), (250, 240, 220))
    drawn = Procedural("", "", "palette", palette, background=(palette[2],), scale=1.0).apply(disc())
    assert tuple(drawn[64, 45]) == palette[1] and tuple(drawn[64, 82]) == palette[0]


def test_grades_change_kept_colours_as_named() -> None:
    def inside(grade: Grade) -> np.ndarray:
        return Procedural("", "", "keep", grade=grade, scale=1.0).apply(disc())[64, 45].astype(int)

    assert np.ptp(inside(Grade(saturation=0.0))) <= 1
    assert inside(Grade(negative=True)).tolist() == pytest.approx([35, 225, 225], abs=1)
    assert inside(Grade(pastel=0.5)).tolist() == pytest.approx([237, 142, 142], abs=1)
    turned = inside(Grade(hue=2 * np.pi / 3))
    assert turned.argmax() != 0 and sorted(turned) == pytest.approx([30, 30, 220], abs=1)


def test_a_sticker_has_a_white_border() -> None:
    drawn = Procedural("", "", "keep", background=((60, 60, 200),), effect="sticker", scale=1.0).apply(disc())
    border = drawn[64, 22]  # the disc ends at column 24
    assert border.min() > 240 and drawn[64, 2].tolist() == [60, 60, 200]


def test_an_image_without_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(S, S, 4\) uint8 with alpha; found \(128, 128, 3\)"):
        Procedural.sample(Random(0)).apply(np.zeros((128, 128, 3), np.uint8))
