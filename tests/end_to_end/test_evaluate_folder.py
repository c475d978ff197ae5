"""`condit evaluate folder` on pictures made to order: what is true by construction is in the report."""

import csv
import json
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

import made_pictures as made
from condit.rulers import report
from condit.rulers.report import FolderSettings, evaluate_folder
from condit.rulers.statistics import bootstrap

TASKS = made.tasks(4, 24)


def mixture(parts):
    """Of twelve tasks so many are copies, the others prompt-only."""
    return lambda task: (made.COPY if int(task.name) % 12 < parts else made.BLANK)(task)


METHODS = {
    "copy": made.COPY,
    "none": made.BLANK,
    "perfect": made.PERFECT,
    "mix/0.25": mixture(3),
    "mix/0.5": mixture(6),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    made.write_study(folder, TASKS, METHODS)
    answers = [{"item": t.name, "left": "perfect", "right": "none", "choice": "left", "rater": "r"} for t in TASKS]
    return folder, run(folder, FolderSettings(answers=answers))


def run(folder, settings=None):
    return evaluate_folder(folder / "output", folder / "report", folder / "content", folder / "style", settings)


def figure(result, method, ruler, strength=None):
    (row,) = [f for f in result["figures"] if (f["method"], f["strength"], f["ruler"]) == (method, strength, ruler)]
    return row


def test_a_copier_has_all_the_style_and_leaks_always(study):
    for ruler in ("style-retrieval", "own-leaks", "own-style"):
        row = figure(study[1], "copy", ruler)
        assert row["value"] == pytest.approx(1, abs=1e-6)


def test_a_method_that_reads_the_prompt_alone_has_the_style_of_chance_and_no_leak(study):
    result = study[1]
    assert figure(result, "none", "own-leaks")["value"] == 0 == figure(result, "none", "own-leakage")["value"]
    assert figure(result, "none", "style-retrieval")["value"] <= result["chance of style retrieval"]
    level = next(r for r in result["rulers"] if r["name"] == "own-style")["tests"]["style"]["other"]
    assert figure(result, "none", "own-style")["value"] == pytest.approx(level, abs=0.15)


def test_the_true_icon_has_style_and_content_and_does_not_leak(study):
    result = study[1]
    assert figure(result, "perfect", "edges")["value"] == pytest.approx(1, abs=1e-4)
    leakage = figure(result, "perfect", "own-leakage")
    assert leakage["low"] < 0.02 and leakage["high"] > -0.02
    test = next(r for r in result["rulers"] if r["name"] == "own-style")["tests"]["style"]
    style = figure(result, "perfect", "own-style")
    assert style["value"] > (test["same"] + test["other"]) / 2


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_mixture_has_its_share_of_either(study, share):
    leaks, style = (figure(study[1], "mix", ruler, share) for ruler in ("own-leaks", "own-style"))
    assert leaks["value"] == share and leaks["low"] < share < leaks["high"]
    ends = [figure(study[1], method, "own-style")["value"] for method in ("none", "copy")]
    assert style["low"] <= ends[0] + share * (ends[1] - ends[0]) <= style["high"]


def test_rulers_are_measured_first(study):
    rulers = {r["name"]: r for r in study[1]["rulers"]}
    assert rulers[study[1]["axis"]]["passes"] is True
    assert rulers["own-content"]["tests"]["content"]["area"]["low"] > 0.8
    assert rulers["own-content"]["tests"]["style"]["area"]["value"] < 0.65
    assert rulers["own-style"]["tests"]["style"]["how"] == "same style, other content"


def test_people_and_rulers_agree_where_the_choice_is_plain(study):
    assert study[1]["people"]["own-style"]["share"]["value"] > 0.8


def test_the_report_has_a_page_tables_and_pictures(study):
    folder = study[0] / "report"
    page = (folder / "index.html").read_text()
    assert "At equal style" in page and "perfect: best and worst" in page and "class=blind" in page
    assert json.loads((folder / "report.json").read_text()) == study[1]
    values = (folder / "values.csv").read_text().splitlines()
    assert len(values) == 1 + 5 * len(TASKS) and values[0].startswith("method,strength,name,")
    assert (folder / "figures.csv").read_text().count("\n") == 1 + len(study[1]["figures"])
    assert len(list((folder / "pictures").glob("*.png"))) >= 6


def test_a_second_run_has_the_same_figures_to_the_last_digit_and_encodes_nothing(study, tmp_path, monkeypatch):
    folder, result = study
    few = sorted((folder / "report" / ".features").rglob("*.safetensors"))[::7]
    for file in few:
        file.unlink()  # as a run that was stopped leaves it
    encoded = []
    original = report.Store.fill
    monkeypatch.setattr(report.Store, "fill", lambda s, v: encoded.append(1) or original(s, v))
    again = run(folder)
    assert {**again, "people": {}} == {**result, "people": {}} and encoded
    assert all(file.is_file() for file in few)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    made.write_study(folder, TASKS[:6], {"ours": made.PERFECT, "plain/1": made.BLANK})
    (folder / "output" / "ours" / "000.png").write_bytes(b"no picture")
    (folder / "output" / "ours" / "001.png").unlink()
    (folder / "style" / "002.png").write_bytes(b"")
    shutil.copy(folder / "output" / "ours" / "004.png", folder / "output" / "ours" / "003.png")
    Image.open(folder / "output" / "ours" / "005.png").resize((64, 96)).save(folder / "output" / "ours" / "005.png")
    return run(folder)


def test_what_is_wrong_with_pictures_is_named_and_the_report_still_comes(damaged):
    problems = damaged["problems"]
    assert [p.split(":")[0] for p in problems["broken"]] == ["000.png", "002.png"]
    assert problems["missing"] == ["ours: 001"]
    assert problems["duplicate"] == ["ours: 003", "ours: 004"]
    assert problems["different sizes"] == ["64 x 96: 1 pictures", "128 x 128: 9 pictures"]
    assert problems["without a strength"] == ["ours"]
    assert damaged["pictures"] == 10 and damaged["comparisons"] == []


def test_one_picture_is_enough_for_a_report(tmp_path):
    made.write_study(tmp_path, TASKS[:1], {"ours": made.PERFECT})
    result = run(tmp_path)
    assert result["pictures"] == 1 and result["axis"] is None
    assert figure(result, "ours", "edges")["value"] == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "report" / "index.html").is_file()


def test_values_that_are_no_numbers_are_counted(tmp_path, monkeypatch):
    made.write_study(tmp_path, TASKS[:4], {"ours": made.PERFECT})
    monkeypatch.setitem(report.measure.__globals__["COMPARE"], "norms", lambda a, b: a.sum((1, 2)) * float("nan"))
    result = run(tmp_path)
    assert result["problems"]["not a number"] == ["style statistics, judge: 4 pictures"]
    assert "judge-moments" not in {f["ruler"] for f in result["figures"]}
    assert (tmp_path / "report" / "report.json").is_file()


def test_unknown_names_are_wrong_usage(study):
    folder = study[0]
    for settings, text in (
        (FolderSettings(blank="x"), "no method 'x' for blank; found copy, mix"),
        (FolderSettings(axis="edges"), "no ruler of style 'edges'"),
        (FolderSettings(weights={"x": "y"}), "no ruler reads weights named 'x'"),
    ):
        with pytest.raises(ValueError, match=text):
            run(folder, settings)


def coverage(folder, ruler, share, studies=200, n=60):
    """In how many simulated studies the interval of a mixture holds the true mean. A study draws n tasks, each of
    which is copied with a known probability; the values are those that the ruler has of the real pictures."""
    rows = list(csv.DictReader((folder / "report" / "values.csv").open()))
    copied, blank = (np.array([float(r[ruler]) for r in rows if r["method"] == m]) for m in ("copy", "none"))
    truth, held = share * copied.mean() + (1 - share) * blank.mean(), 0
    for seed in range(studies):
        g = np.random.default_rng([seed, zlib.crc32(f"{ruler}{share}".encode())])
        drawn = g.integers(0, len(copied), n)
        row = np.where(g.random(n) < share, copied[drawn], blank[drawn])
        interval = bootstrap(row, list(range(n)), resamples=400, seed=seed)
        held += interval.low <= truth <= interval.high
    return held / studies


@pytest.mark.parametrize("ruler", ["own-style", "own-leaks", "own-text"])
def test_intervals_hold_the_truth_in_95_percent_of_200_studies(study, ruler):
    assert 0.915 <= coverage(study[0], ruler, 0.5) <= 0.99  # 95 %, and about two standard errors of 200 studies


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_intervals_of_every_ruler_hold_the_truth(study, share):
    rulers = [r["name"] for r in study[1]["rulers"]]
    held = {ruler: coverage(study[0], ruler, share, n=100) for ruler in rulers}
    # Percentiles are a little narrow. A single ruler's 200 studies have a standard error of 1.6 %.
    assert np.mean(list(held.values())) >= 0.93 and min(held.values()) >= 0.9, held
