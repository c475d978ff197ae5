"""SVG output, and the best of several images."""

import io
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from condit.data.icon_sample import sample_icon
from condit.data.images import check_output, read_recipe, save_image
from condit.drawing.candidates import best, scores

needs_svg = pytest.mark.skipif(
    not (find_spec("vtracer") and find_spec("resvg_py")), reason="needs the extra svg and resvg_py"
)


def rendered(svg: str, side: int) -> Image.Image:
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)))).convert("RGBA")


@needs_svg
def test_a_traced_image_renders_as_the_image_with_its_alpha(tmp_path):
    image = Image.new("RGBA", (96, 96), (200, 30, 30, 0))  # a transparent ground of another colour must not show
    image.paste((240, 40, 40, 255), (16, 16, 80, 80))
    image.paste((30, 90, 220, 255), (40, 40, 64, 64))
    path = save_image(image, tmp_path / "a.svg", recipe={"text": "]]> and <b>"})
    assert read_recipe(path) == {"text": "]]> and <b>"}
    drawn, exact = (np.asarray(x, dtype=float) for x in (rendered(path.read_text(), 96), image))
    inside, expected = drawn[..., 3] > 127, exact[..., 3] > 127
    assert (inside & expected).sum() / (inside | expected).sum() > 0.98
    assert np.abs(drawn - exact)[20:76, 20:76].mean() < 3


@needs_svg
@pytest.mark.parametrize("label", ["red apple", "rocket"])
def test_a_traced_icon_is_close_to_the_icon(tmp_path, label):
    icon = sample_icon("twemoji", label)
    drawn = rendered(save_image(icon, tmp_path / "a.svg").read_text(), icon.width).convert("RGB")
    error = np.square(np.asarray(drawn, dtype=float) - np.asarray(icon.convert("RGB"), dtype=float)).mean() / 255**2
    assert -10 * np.log10(error) > 25


@needs_svg
def test_an_image_that_is_all_transparent_is_an_empty_drawing(tmp_path):
    path = save_image(Image.new("RGBA", (16, 16)), tmp_path / "a.svg")
    assert "<path" not in path.read_text()
    with pytest.raises(ValueError, match="no condit recipe"):
        read_recipe(path)


def test_an_svg_without_its_extra_is_refused_before_an_image_is_generated(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vtracer", None)
    with pytest.raises(ModuleNotFoundError, match=r"condit\[svg\]"):
        check_output(tmp_path / "a.svg")


def test_the_best_images_are_those_that_fit_words_and_style():
    icons = [sample_icon("twemoji", "rocket"), sample_icon("twemoji", "red apple"), sample_icon("noto", "red apple")]
    assert set(best(icons, "red apple", 2)) == {1, 2}
    assert best(icons, "red apple", 1, [sample_icon("twemoji", "rocket")]) == [1]
    assert best(icons, "red apple", 1, [sample_icon("noto", "rocket")]) == [2]
    assert scores(icons, "red apple").shape == (3,)
    with pytest.raises(ValueError, match="count is 4; expected 1 to 3"):
        best(icons, "red apple", 4)
