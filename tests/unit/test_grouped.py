"""Paired sets: who may be whose reference, and that nobody is his own."""

import io
import json
import random
import tarfile

import pytest
from PIL import Image

from condit.data.grouped import PAIR_KINDS, GroupedPairs
from condit.data.images import load_image
from condit.data.pairs import check, open_pairs


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def number(source) -> int:
    return load_image(source).getpixel((0, 0))[0]  # type: ignore[index]


@pytest.fixture
def make_folder(tmp_path):
    def make(*rows: dict) -> GroupedPairs:
        for i in range(8):
            (tmp_path / f"{i}.png").write_bytes(png(i))
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return GroupedPairs(open_pairs(tmp_path))

    return make


def drawn(pairs: GroupedPairs, kind, count: int = 200) -> set[tuple[int, int]]:
    rng = random.Random(0)
    results = [pairs.draw(rng, kind) for _ in range(count)]
    return {(number(target.image), number(reference)) for target, reference in results}


def grid(i: int) -> dict:
    """Six pictures: styles 0, 1, 2 of two subjects; each in a style group and a content group."""
    return {"file_name": f"{i}.png", "text": f"t{i}", "style_group": f"s{i % 3}", "content_group": f"c{i // 3}"}


def test_style_pairs_share_their_style_and_are_two_images(make_folder):
    pairs = make_folder(*(grid(i) for i in range(6)))
    assert drawn(pairs, "style") == {(i, j) for i in range(6) for j in range(6) if i != j and i % 3 == j % 3}


def test_content_pairs_share_their_content_in_different_styles(make_folder):
    twin = {"file_name": "6.png", "style_group": "s0", "content_group": "c0"}  # as row 0 in both
    pairs = make_folder(*(grid(i) for i in range(6)), twin)
    style, content = [0, 1, 2, 0, 1, 2, 0], [0, 0, 0, 1, 1, 1, 0]
    expected = {(i, j) for i in range(7) for j in range(7) if content[i] == content[j] and style[i] != style[j]}
    assert drawn(pairs, "content", 600) == expected


def test_reconstruction_is_the_image_itself(make_folder):
    assert drawn(make_folder(grid(0), grid(1)), "reconstruction") == {(0, 0), (1, 1)}


def test_references_that_a_row_names_are_drawn_and_never_its_own_file(make_folder):
    pairs = make_folder(
        {"file_name": "0.png", "style_file_names": ["1.png", "0.png"], "subject_file_names": ["2.png"]},
        {"file_name": "3.png"},
    )
    assert drawn(pairs, "style") == {(0, 1)}
    assert drawn(pairs, "content") == {(0, 2)}


def test_a_file_named_by_two_rows_is_not_paired_with_itself(make_folder):
    row = {"file_name": "0.png", "style_group": "s"}
    assert drawn(make_folder(row, row, {"file_name": "1.png", "style_group": "s"}), "style") == {(0, 1), (1, 0)}
    with pytest.raises(ValueError, match="the same image twice"):
        make_folder(row, row).draw(random.Random(0), "style")


def test_a_set_without_a_kind_of_pair_raises_with_the_kind(make_folder):
    one_style = [{"file_name": f"{i}.png", "content_group": "c", "style_group": "s"} for i in range(3)]
    with pytest.raises(ValueError, match="no content pair: two rows with the same content_group and different style"):
        make_folder(*one_style).need(PAIR_KINDS)
    make_folder(*(grid(i) for i in range(6))).need(PAIR_KINDS)


def test_a_group_that_is_no_name_is_quoted(make_folder, tmp_path):
    with pytest.raises(
        ValueError, match=r'metadata.jsonl:1: style_group must be a name; found 7. Row: .*"style_group": 7'
    ):
        make_folder({"file_name": "0.png", "style_group": 7})
    assert "style_group must be a name" in check(tmp_path).problems[0]


def test_groups_of_tars_come_from_their_json_and_no_image_is_read_for_them(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            row = {"text": f"t{i}", "style_group": "s", "content_group": f"c{i}"}
            for name, content in ((f"{i}.png", png(i)), (f"{i}.json", json.dumps(row).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    pairs = GroupedPairs(open_pairs(tmp_path / "a.tar"))
    assert drawn(pairs, "style") == {(i, j) for i in range(3) for j in range(3) if i != j}
    assert pairs.draw(random.Random(0), "style")[0].text.startswith("t")
