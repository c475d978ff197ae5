"""`condit data pair` and `condit data filter`, and their sets as `datasets` reads them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from condit.cli import main
from condit.data.icon_sample import sample_icon
from condit.data.images import load_image, save_image

LABELS, STYLES = ("banana", "cactus"), ("noto", "twemoji", "noto-mono")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture(scope="module")
def icons(tmp_path_factory) -> Path:
    """Real icons in groups; one has a wrong caption, one is there twice, one row names no file."""
    folder, lines = tmp_path_factory.mktemp("icons"), []
    for label in LABELS:
        for style in STYLES:
            name = f"{label}-{style}.png"
            save_image(load_image(sample_icon(style, label)), folder / name)
            row = {"file_name": name, "text": f"{label}, {style} style", "style": style, "seed": len(lines)}
            lines.append({**row, "content_group": label, "style_group": style})
    lines.append(lines[0])
    lines[2] = {**lines[2], "text": "a steam locomotive"}
    lines.append({"file_name": "none.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def sets(icons, tmp_path_factory) -> Path:
    """The icons filtered, and pairs of them in both layouts."""
    out = tmp_path_factory.mktemp("sets")
    for arguments in (
        ("filter", icons, "-o", out / "kept", "--text", "0.3", "--licence", "Apache-2.0"),
        ("pair", "groups", out / "kept", "-o", out / "folder", "--layout", "folder", "--conditions", "edges"),
        ("pair", "groups", out / "kept", "-o", out / "tars", "--shard-rows", "2"),
    ):
        with pytest.raises(SystemExit):
            main(["data", *map(str, arguments)])
    return out


def test_filter_keeps_good_rows_and_says_what_became_of_the_others(icons, sets, capsys):
    card = json.loads((sets / "kept" / "card.json").read_text())
    shares = {name: (row["rows"], row["kept"]) for name, row in card["filters"].items()}
    assert shares == {"size": (7, 7), "duplicate": (7, 6), "text": (6, 5)}
    assert (
        card["licences"] == {"Apache-2.0": 5} and card["errors"] == 1 and card["settings"]["command"] == "data filter"
    )
    assert json.loads((sets / "kept" / "errors.jsonl").read_text())["row"] == "metadata.jsonl:8"
    assert Image.open(sets / "kept" / "rejected-text.png").width > 0
    assert "| text |" in (sets / "kept" / "README.md").read_text()
    # A second run has nothing to do, and its exit code still says that a row was bad.
    code, out, err = run(
        capsys, "data", "filter", icons, "-o", sets / "kept", "--text", "0.3", "--licence", "Apache-2.0"
    )
    assert (code, out) == (1, f"{sets / 'kept'}\n") and "5 rows, 1 that cannot be read" in err
    code, _, err = run(capsys, "data", "filter", icons, "-o", sets / "kept", "--text", "0.2")
    assert code == 1 and "holds other files" in err


def test_pairs_are_checked_and_filtered_by_role(sets, capsys):
    assert run(capsys, "data", "check", sets / "tars")[:2] == (0, "5 pairs; with references: content 5\n")
    assert run(capsys, "data", "check", sets / "folder")[1].endswith("references: content 5, edges 5\n")
    code, out, _ = run(
        capsys, "data", "filter", sets / "tars", "-o", sets / "agree", "--agree", "content=0.5", "--json"
    )
    filters = json.loads(out)["filters"]
    assert code == 0 and filters["content"]["rows"] == 5 and filters["content"]["quantiles"]["0.5"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("filter", "none", "-o", "x"), "nothing at none"),
        (("pair", "pictures", ".", "-o", "./inside"), "is inside of ., which is read"),
        (("filter", ".", "-o", "../x", "--agree", "style=high"), "'high': expected cosines, LOW or LOW:HIGH"),
        (("filter", ".", "-o", "../x", "--text", "0.9:0.1"), "'0.9:0.1': expected cosines"),
    ],
)
def test_wrong_usage_is_named(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "data", *arguments)
    assert code == 2 and message in err and not list(tmp_path.iterdir())


@pytest.mark.slow  # importing datasets takes seconds
def test_datasets_reads_both_layouts(sets, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = datasets.load_dataset("imagefolder", data_dir=str(sets / "folder"), split="train", cache_dir=str(tmp_path))
    tars = datasets.load_dataset(
        "webdataset", data_files=str(sets / "tars" / "*.tar"), split="train", cache_dir=str(tmp_path)
    )
    assert len(folder) == len(tars) == 5
    one, other = folder[0], tars[0]
    assert one["text"] == other["txt"]
    assert one["image"].convert("RGB").tobytes() == other["png"].convert("RGB").tobytes()
    assert one["content"][0].size == other["content_0.png"].size == (128, 128)
    assert other["json"]["seed"] == one["seed"]
