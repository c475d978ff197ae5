"""`condit bench style` on the packed sample: prompts, references, one's own folder, what a run leaves."""

import json
from pathlib import Path

import pytest
from PIL import Image

from condit.data.pairs import METADATA
from condit_lab.icons.world import IconWorld, sample_path
from condit_lab.suites import style_rulers
from condit_lab.suites.bench import OWN, bench_style, held_out_pairs, own_pairs, words_of, write_table
from condit_lab.suites.style import Protocol
from condit_lab.suites.style_methods import BENCH
from condit_lab.suites.style_rulers import LEAKAGE, SCORE, SUBJECT

METHODS = ("styleid", "copy", "real")


@pytest.fixture(scope="module")
def world() -> IconWorld:
    return IconWorld.open(sample_path())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two references of one's own."""
    folder = tmp_path_factory.mktemp("own")
    for name, colour in (("red-heart_1.png", "red"), ("star.webp", "gold")):
        Image.new("RGB", (40, 60), colour).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_each_style_has_one_reference_that_no_training_saw_and_shows_another_concept(world):
    _, cells, spare = held_out_pairs(world, Protocol(count=12), references=4)
    shown = {world.icons[cell.icon].style: cell.unseen for cell in cells}
    assert len(cells) == 12 and len(shown) == 4 and len(spare) > 0
    assert not {c.icon for c in cells} & {c.icon for c in spare}
    for cell in cells:
        wanted, reference = world.icons[cell.icon], world.icons[cell.unseen]
        assert cell.unseen == shown[wanted.style] and reference.style == wanted.style
        assert reference.split != "train" and wanted.split == "combo" and reference.base != wanted.base
    with pytest.raises(ValueError, match="Ask for fewer"):
        held_out_pairs(world, Protocol(count=20), references=50)


def test_own_references_meet_every_prompt(world, folder):
    extended, cells, _ = own_pairs(world, Protocol(count=6), folder=folder)
    shown = [extended.icons[cell.unseen] for cell in cells]
    assert [icon.label for icon in shown] == ["red heart", "star"] * 3 and {icon.style for icon in shown} == {OWN}
    assert len({cell.icon for cell in cells}) == 3
    red = extended.rgba(cells[0].unseen)
    assert red.shape == (128, 128, 4) and tuple(red[0, 0]) == (255, 0, 0, 255)
    assert (extended.rgba(0) == world.rgba(0)).all()
    with pytest.raises(ValueError, match="expected a folder of references"):
        own_pairs(world, Protocol(), folder=folder / "notes.txt")
    assert words_of("red-apple_02") == "red apple"


def test_every_embedded_model_has_both_baselines_without_training():
    for kind in ("aligned", "injected"):
        assert {method.model for method in BENCH if getattr(method.make, "__name__", "") == kind} == {
            "tiny",
            "tiny-unet",
            "tiny-pixart",
        }
    assert all(method.shows == "style" for method in BENCH) and len({m.name for m in BENCH}) == len(BENCH)


@pytest.mark.slow
def test_a_run_leaves_one_table_one_picture_and_folders_that_can_be_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(style_rulers, "BANK", 60)
    protocol = Protocol(count=3, steps=1, methods=METHODS, strengths=("plain=0.5,1", "styleid=1"))
    messages: list[str] = []
    result = bench_style(tmp_path, protocol, references=2, tell=messages.append)
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(result))
    figures = {(r["method"], r["measure"]): r["value"] for r in result["rows"]}
    assert figures["real", SUBJECT] == pytest.approx(1.0) and figures["copy", SCORE] > figures["none", SCORE]
    assert figures["none", LEAKAGE] == 0
    table = (tmp_path / "bench.md").read_text()
    assert table.startswith("`condit bench style --references 2 --count 3") and "| tiny | StyleID |" in table
    with Image.open(tmp_path / "bench.png") as sheet:
        assert sheet.width > 300
    folders = tmp_path / "folders"
    assert {path.name for path in (folders / "tiny").iterdir()} == {
        "none",
        "plain",
        "styleid",
        "copy",
        "real",
        METADATA,
    }
    rows = [json.loads(line) for line in (folders / "tiny" / METADATA).read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert (folders / "tiny/plain/0.5" / row["file_name"]).is_file()
        assert (folders / "style" / row["style_file_name"]).is_file()
        assert (folders / "tiny/none" / row["content_file_name"]).is_file()
    page = tmp_path / "page.md"
    page.write_text("<!-- bench-style -->\n<!-- /bench-style -->\n")
    write_table(result, page)
    assert "| tiny | StyleID |" in page.read_text()
    before = len(messages)
    bench_style(tmp_path, protocol, references=2, report=True, tell=messages.append)
    report = json.loads((tmp_path / "reports/tiny/report.json").read_text())
    assert (tmp_path / "reports/tiny/index.html").is_file() and "plain" in json.dumps(report)
    assert not any("pictures" in message for message in messages[before:])  # nothing is drawn again


@pytest.mark.slow
def test_a_run_with_own_references_measures_likeness_to_each(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(style_rulers, "BANK", 60)
    protocol = Protocol(count=4, steps=1, methods=("aligned", "copy"), strengths=("plain=0.5,1", "aligned=1"))
    result = bench_style(tmp_path, protocol, own=folder, tell=lambda line: None)
    figures = {(r["method"], r["measure"]): r["value"] for r in result["rows"]}
    assert figures["copy", SCORE] == pytest.approx(1.0, abs=1e-4)
    assert ("copy", SUBJECT) not in figures and result["command"].startswith("condit bench style --own DIR")
