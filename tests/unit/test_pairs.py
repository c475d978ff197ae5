"""Pairs from folders and tars, and the rows that are refused."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from condit.data.images import load_image
from condit.data.pairs import check, open_pairs
from condit.data.subjects200k import CENTRED, LEFT, RIGHT, open_subjects200k, subjects200k

COLOURS = {"t": (255, 0, 0), "a": (0, 255, 0), "b": (0, 0, 255), "e": (9, 9, 9)}


def png(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), COLOURS[name]).save(buffer, "PNG")
    return buffer.getvalue()


def colour(source) -> tuple:
    return load_image(source).getpixel((0, 0))  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path):
    for name in COLOURS:
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / f"{name}.png").write_bytes(png(name))
    return tmp_path


def write(folder, *rows) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join([*lines, ""]))


GOOD = {
    "file_name": "p/t.png",
    "text": "a fox",
    "style_file_names": ["p/a.png", "p/b.png"],
    "edges_file_name": "p/e.png",
    "mask_file_name": None,
    "licence": "kept out",
}


def test_a_row_of_a_folder_gives_target_caption_and_references_by_role(folder):
    write(folder, GOOD, "", {"file_name": "p/a.png"})
    pairs = open_pairs(folder)
    assert len(pairs) == 2
    pair = pairs[0]
    assert colour(pair.image) == COLOURS["t"] and pair.text == "a fox"
    assert {role: [colour(x) for x in xs] for role, xs in pair.references.items()} == {
        "style": [COLOURS["a"], COLOURS["b"]],
        "edges": [COLOURS["e"]],
    }
    assert pairs[1].text == "" and not pairs[1].references
    assert check(folder).problems == () and check(folder).roles == {"style": 1, "edges": 1}
    with pytest.raises(KeyError, match="no reference 'subject'.*style, edges"):
        pair.one("subject")


BAD = {
    "no JSON": ("{file_name: 1}", "not a JSON object"),
    "no target": ({"text": "x"}, "file_name must name the target; found None"),
    "text": ({"file_name": "p/t.png", "text": 3}, "text must be a string; found 3"),
    "missing": ({"file_name": "p/no.png"}, "no file 'p/no.png'"),
    "missing reference": (GOOD | {"style_file_names": ["p/a.png", "p/no.png"]}, "style_file_names: no file 'p/no.png'"),
    "outside": ({"file_name": "../secret.png"}, "is outside the folder"),
    "list": (GOOD | {"edges_file_name": ["p/e.png"]}, "edges_file_name must be one name"),
    "no list": (GOOD | {"style_file_names": "p/a.png"}, "style_file_names must be a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_quoted_with_its_line(folder, name):
    row, message = BAD[name]
    (folder.parent / "secret.png").write_bytes(png("t"))
    write(folder, GOOD, row)
    quoted = row if isinstance(row, str) else json.dumps(row)[:100]
    with pytest.raises(ValueError) as error:
        open_pairs(folder)
    assert "metadata.jsonl:2: " in str(error.value) and message in str(error.value) and quoted in str(error.value)
    report = check(folder)
    assert report.pairs == 2 and len(report.problems) == 1 and message in report.problems[0]


def test_the_check_detects_a_broken_image_unless_images_are_skipped(folder):
    (folder / "p" / "b.png").write_bytes(png("b")[:40])
    write(folder, GOOD)
    assert "metadata.jsonl:1: style: " in check(folder).problems[0]
    assert check(folder, decode=False).problems == ()


def tar(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_tars_give_the_same_pairs_as_folders(tmp_path):
    references = {f"d/one.style_{i}.png": png("b" if i == 10 else "a") for i in (0, 2, 10)}
    tar(tmp_path / "0.tar", {"d/one.png": png("t"), "d/one.txt": b"a fox", **references})
    tar(tmp_path / "1.tar", {"two.png": png("e"), "two.json": b'{"text": "snow"}', "two.edges.png": png("a")})
    pairs = open_pairs(tmp_path)
    assert len(pairs) == 2 and [pairs[i].text for i in (0, 1)] == ["a fox", "snow"]
    assert [colour(x) for x in pairs[0].references["style"]] == [COLOURS["a"], COLOURS["a"], COLOURS["b"]]
    assert colour(pairs[1].image) == COLOURS["e"] and colour(pairs[1].one("edges")) == COLOURS["a"]
    assert check(tmp_path).roles == {"style": 1, "edges": 1} and len(open_pairs(tmp_path / "0.tar")) == 1


def test_bad_samples_of_a_tar_raise_with_their_names(tmp_path):
    tar(tmp_path / "0.tar", {"a.png": png("t"), "b.txt": b"x", "c.png": png("t"), "c.json": b'{"words": 1}'})
    problems = check(tmp_path).problems
    assert "0.tar:a: no caption" in problems[0] and "0.tar:b: no target" in problems[1]
    assert "0.tar:c: the caption cannot be read" in problems[2]
    with pytest.raises(ValueError, match="0.tar:a: no caption"):
        open_pairs(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match="not a plain tar"):
        open_pairs(tmp_path)


def test_a_folder_without_pairs_raises_with_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="expected a folder with metadata.jsonl"):
        open_pairs(tmp_path)


# Subjects200K.


def subject_row(quality: dict | None) -> dict:
    pixels = np.zeros((528, 1056, 3), np.uint8)
    pixels[..., 0] = np.arange(1056)[None, :] % 256  # a pixel's column can be told from its colours
    pixels[..., 1] = np.arange(1056)[None, :] // 256
    pixels[..., 2] = np.arange(528)[:, None] % 256
    words = {"description_0": "this item on a table", "description_1": "it in a park"}
    return {"image": Image.fromarray(pixels), "description": words, "quality_assessment": quality}


FIVE = {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5}


def test_the_crops_of_subjects200k_are_the_official_ones():
    assert (LEFT, RIGHT, CENTRED) == ((8, 8, 520, 520), (528, 8, 1040, 520), (536, 8, 1048, 520))
    pairs = subjects200k([subject_row(FIVE)])
    assert len(pairs) == 2
    even, odd = pairs[0], pairs[1]
    assert load_image(even.image).size == (512, 512)
    assert colour(even.image) == colour(odd.one("subject")) == (8, 0, 8)
    assert colour(odd.image) == colour(even.one("subject")) == (528 % 256, 2, 8)
    assert even.text == "this item on a table" and odd.text == "it in a park"
    assert colour(subjects200k([subject_row(FIVE)], centred=True)[1].image) == (536 % 256, 2, 8)
    with pytest.raises(IndexError):
        pairs[2]


def test_the_filter_of_subjects200k_wants_three_marks_of_at_least_five():
    rows = [subject_row(mark) for mark in (None, {}, FIVE, FIVE | {"imageQuality": 4}, {"imageQuality": 5}, FIVE)]
    assert subjects200k(rows).kept == (2, 5)


def test_an_image_of_another_size_and_a_missing_reader_raise(monkeypatch):
    row = subject_row(FIVE) | {"image": Image.new("RGB", (1024, 512))}
    with pytest.raises(ValueError, match="1056, 528.*1024, 512"):
        subjects200k([row])[0]
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"condit\[pairs\]"):
        open_subjects200k()
