"""`condit data draw`, `condit data check` and `condit annotate`."""

import json

import pytest
from PIL import Image

from condit.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_data_check_counts_pairs_and_quotes_what_is_wrong(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "x", "style_file_name": "a.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert run(capsys, "data", "check", str(tmp_path)) == (0, "1 pairs; with references: style 1\n", "")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row | {"file_name": "b.png"}) + "\n")
    code, out, err = run(capsys, "data", "check", str(tmp_path))
    assert code == 1 and "metadata.jsonl:1: file_name: no file 'b.png'" in err and '"text": "x"' in err
    code, out, _ = run(capsys, "data", "check", str(tmp_path), "--json")
    assert code == 1 and json.loads(out)["problems"]
    code, _, err = run(capsys, "data", "check", str(tmp_path / "none"))
    assert code == 1 and "metadata.jsonl" in err


def test_annotate_writes_the_condition_next_to_the_image(tmp_path, capsys):
    picture = Image.new("RGB", (16, 12), "white")
    picture.paste((255, 0, 0), (4, 4, 12, 12))
    picture.save(tmp_path / "a.png")
    code, out, _ = run(capsys, "annotate", str(tmp_path / "a.png"), "canny")
    assert code == 0 and out == f"{tmp_path / 'a-canny.png'}\n"
    assert Image.open(tmp_path / "a-canny.png").convert("L").getextrema() == (0, 255)
    given = (
        "annotate",
        str(tmp_path / "a.png"),
        "gray",
        "--height",
        "24",
        "--width",
        "32",
        "-o",
        str(tmp_path / "g.png"),
    )
    assert run(capsys, *given)[0] == 0 and Image.open(tmp_path / "g.png").size == (32, 24)
    code, _, err = run(capsys, "annotate", str(tmp_path / "a.png"), "nothing")
    assert code == 2 and "soft_edges" in err
    assert run(capsys, "annotate", str(tmp_path / "b.png"), "gray")[0] == 1


def test_annotate_of_a_missing_image_makes_no_folder(tmp_path, capsys):
    code, _, err = run(capsys, "annotate", str(tmp_path / "nowhere" / "a.png"), "canny")
    assert code == 1 and "no image at" in err
    assert not (tmp_path / "nowhere").exists()


def test_annotate_depth_without_weights_names_the_download(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("condit.data.depth.MODEL", "nobody/nothing")
    Image.new("RGB", (16, 12)).save(tmp_path / "a.png")
    code, _, err = run(capsys, "annotate", str(tmp_path / "a.png"), "depth")
    assert code == 1 and "no depth network" in err and "nobody/nothing" in err


def test_data_draw_makes_a_set_that_data_check_counts(tmp_path, capsys):
    (tmp_path / "subjects.txt").write_text("a fox\na rocket\n")
    (tmp_path / "styles.txt").write_text("flat\noutline\n")
    lists = ("--subjects", str(tmp_path / "subjects.txt"), "--styles", str(tmp_path / "styles.txt"))
    small = ("--per-subject", "2", "-n", "2", "--steps", "1", "--width", "128", "-o", str(tmp_path / "set"))
    assert run(capsys, "data", "draw", *lists, *small)[:2] == (0, f"{tmp_path / 'set'}\n")
    counts = "8 pairs; with references: none; groups: style 4, content 2\n"
    assert run(capsys, "data", "check", str(tmp_path / "set"))[:2] == (0, counts)
    code, _, err = run(capsys, "data", "draw", *lists, *small[:-1], str(tmp_path / "wide"), "--width", "256")
    assert code == 1 and "tiny generates 128 x 128; found 128 x 256" in err
    code, _, err = run(capsys, "data", "draw", *lists, "-o", str(tmp_path / "other"))
    assert code == 1 and "per_subject must be 1 to 2, the number of styles; found 14" in err
    code, _, err = run(capsys, "data", "draw", "--subjects", "none.txt", *lists[2:], *small)
    assert code == 2 and "no file none.txt" in err
