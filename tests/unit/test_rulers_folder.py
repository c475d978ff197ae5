"""rulers/folder.py: names, rows and problems of folders; rulers/compare.py: figures at equal style, people."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from condit.rulers import compare
from condit.rulers.folder import Output, Picture, place_of, read_collection


def save(path, shade, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("a.png", ("out", None, "a")),
        ("m/a.png", ("m", None, "a")),
        ("m/0.5/a.png", ("m", 0.5, "a")),
        ("m/0.5/deep/a.png", ("m", 0.5, "deep/a")),
        ("m/large/a.png", ("m/large", None, "a")),
        ("m/nan/a.png", ("m/nan", None, "a")),
    ],
)
def test_folders_say_the_method_and_its_strength(path, place):
    assert place_of(Path(path), "out") == place


def test_names_say_content_and_style(tmp_path):
    for name, shade in (("content/fox.png", 1), ("content/cat.png", 2), ("style/ink/1.png", 3), ("style/oil/2.png", 4)):
        save(tmp_path / name, shade)
    (tmp_path / "content" / "fox.txt").write_text("a fox\n")
    for name, shade in (("fox__2", 5), ("cat_stylized_1", 6), ("cat", 7), ("fox+9", 8)):
        save(tmp_path / "out" / "m" / f"{name}.png", shade)
    found = read_collection(tmp_path / "out", tmp_path / "content", tmp_path / "style")
    pairs = {o.name: (o.content and o.content.path.stem, o.style and o.style.path.stem) for o in found.outputs}
    assert pairs == {
        "fox__2": ("fox", "2"),
        "cat_stylized_1": ("cat", "1"),
        "cat": ("cat", None),
        "fox+9": ("fox", None),
    }
    assert {o.style.style for o in found.outputs if o.style} == {"ink", "oil"}
    assert {o.prompt for o in found.outputs} == {"a fox", ""}
    assert found.problems["without a style reference"] == ["m/cat.png", "m/fox+9.png"]


def test_rows_win_over_names_and_apply_to_every_method(tmp_path):
    for name, shade in (("content/a.png", 1), ("style/s/b.png", 2), ("style/c.png", 3)):
        save(tmp_path / name, shade)
    for method in ("m/1", "m/2", "n"):
        save(tmp_path / "out" / method / "a.png", 9)
    rows = [
        {"file_name": "a", "text": "a fox", "style_file_name": "s/b.png"},
        {"file_name": "n/a.png", "text": "a cat", "style_file_name": "c.png", "strength": 0.3, "method": "new"},
        {"file_name": "n/gone.png"},
        {"file": 3},
        {"file_name": "m/1/a.png", "strength": "much"},
    ]
    (tmp_path / "out" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nno json\n")
    found = read_collection(tmp_path / "out", tmp_path / "content", tmp_path / "style")
    assert [(o.key, o.prompt, o.style.path.name if o.style else "") for o in found.outputs] == [
        (("m", 1.0), "", ""),
        (("m", 2.0), "a fox", "b.png"),
        (("new", 0.3), "a cat", "c.png"),
    ]
    assert found.problems["missing"] == ["n/gone.png (metadata.jsonl)"]
    assert len(found.problems["broken row"]) == 3


def test_missing_and_duplicate_pictures_and_methods_without_strength_are_named(tmp_path):
    for name, shade in (("m/1/a", 1), ("m/1/b", 1), ("m/2/a", 2), ("n/a", 3), ("n/b", 4)):
        save(tmp_path / f"{name}.png", shade)
    found = read_collection(tmp_path, None, None)
    assert found.problems["missing"] == ["m 2: b"]
    assert found.problems["duplicate"] == ["m 1: a", "m 1: b"]
    assert found.problems["without a strength"] == ["n"]
    with pytest.raises(ValueError, match="there is no folder"):
        read_collection(tmp_path / "absent", None, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        read_collection(tmp_path / "empty", None, None)


N = 40


def outputs(*keys):
    """N pictures of each method and strength."""
    blank = Picture(Path("x"), "x")
    return [
        Output(m, s, f"{i}", Path("x"), f"{m}{s}{i}", f"prompt {i}", None, blank) for m, s in keys for i in range(N)
    ]


def test_a_method_is_compared_at_the_style_of_the_curve():
    keys = ("none", None), ("plain", 0.5), ("plain", 1.0), ("ours", None), ("far", None)
    noise = np.random.default_rng(0).normal(0, 0.01, len(keys) * N)
    style = np.repeat([0.2, 0.4, 0.8, 0.6, 0.9], N) + noise
    text = np.repeat([0.8, 0.6, 0.2, 0.5, 0.1], N) + noise[::-1]
    values = {"own-style": style, "own-text": text}
    found = compare.comparisons(values, outputs(*keys), "own-style", "plain", "none", ["own-text"])
    by_method = {c.method: c for c in found}
    ours = by_method["ours"]
    assert ours.gap.difference == pytest.approx(0.1, abs=0.02) and ours.verdict == "better"
    assert ours.p is not None and ours.p < 0.05 and ours.needed is not None and ours.n == N
    assert by_method["far"].verdict == "out of range" and by_method["far"].p is None
    # An axis on which less is better gives the same comparison.
    down = {"palette": 1 - style, "own-text": text}
    same = {c.method: c for c in compare.comparisons(down, outputs(*keys), "palette", "plain", "none", ["own-text"])}
    assert same["ours"].gap.difference == pytest.approx(ours.gap.difference, abs=1e-9)
    assert compare.comparisons(values, outputs(*keys[3:]), "own-style", "ours", None, ["own-text"]) == []


def test_only_names_that_all_have_are_compared():
    made = outputs(("plain", 0.5), ("plain", 1.0), ("ours", None))
    style = np.repeat([0.2, 0.8, 0.5], N) + np.linspace(0, 0.01, 3 * N)
    style[:5] = np.nan
    (found,) = compare.comparisons(
        {"own-style": style, "own-text": style}, made, "own-style", "plain", None, ["own-text"]
    )
    assert found.n == N - 5


def test_leakage_is_counted_from_the_picture_without_a_reference():
    made = outputs(("none", None), ("ours", None))[: 2 * N - 1]
    values = {"own-leakage": np.arange(2 * N - 1.0), "own-text": np.ones(2 * N - 1)}
    less = compare.less_blank(values, made, "none")
    assert (less["own-leakage"][N:] == N).all() and (less["own-leakage"][:N] == 0).all()
    assert less["own-text"] is values["own-text"]
    assert compare.less_blank(values, made, None) is values


def test_a_ruler_that_answers_as_people_do_agrees_with_them():
    made = outputs(("a", None), ("b", 0.5))
    better = np.random.default_rng(0).random(2 * N)
    said = ["left" if better[i] > better[N + i] else "right" for i in range(N)]
    answers = [{"item": str(i), "left": "a", "right": "b 0.5", "choice": c, "rater": "r"} for i, c in enumerate(said)]
    answers += [{"item": "0", "left": "a", "right": "(check)", "choice": "left", "rater": "r"}]
    found = compare.human({"own-style": better, "palette": better, "own-text": better * 0}, made, answers)
    assert found["own-style"].share.value == 1 and found["own-style"].answers == N
    assert found["own-style"].correlation.value > 0.8
    assert found["palette"].share.value == 0  # a distance: less is better
    assert found["own-text"].share.value == 0.5  # a ruler without differences
