"""Preference studies: blind questions, answers that survive a crash, scores with intervals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from condit.data.images import load_image, save_image
from condit.serve.preferences import CHECK, agreement, as_text, bradley_terry, failed_checks, report, still_needed
from condit.serve.study import Study, make_study
from conftest_serve import picture


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, method in enumerate(("plain", "style", "reference")):
        for item in range(3):
            save_image(load_image(picture(10 * number + item)), tmp_path / method / f"{item}.png")
    methods = {name: tmp_path / name for name in ("plain", "style")}
    make_study(tmp_path / "study", methods, tmp_path / "reference", question="Which?")
    return tmp_path / "study"


def test_questions_are_blind_shuffled_and_balanced(folder):
    study, sides, items, checks = Study(folder), [], [], 0
    for number in range(40):
        question = study.next("Ann")
        assert "plain" not in json.dumps(question) and question["answered"] == number
        hidden = study.asked(str(question["ticket"]))
        if CHECK in (hidden["left"], hidden["right"]):
            checks += 1
        else:
            sides.append(hidden["left"])
            items.append(hidden["item"])
        study.answer(str(question["ticket"]), "left", 1.0)
    assert checks == 4
    assert 8 < sides.count("plain") < 28
    assert max(items.count(i) for i in "012") - min(items.count(i) for i in "012") <= 1


def test_a_ticket_counts_once_and_a_foreign_one_not_at_all(folder):
    study = Study(folder)
    ticket = str(study.next("Ann")["ticket"])
    assert study.answer(ticket, "left", 1.0) == 1 and study.answer(ticket, "right", 1.0) == 1
    assert [answer["choice"] for answer in Study(folder).answers] == ["left"]
    for foreign in (ticket[:-2] + ("00" if ticket[-2:] != "00" else "11"), "zz", "", "00" * 40):
        with pytest.raises(ValueError, match="not one of this study"):
            study.answer(foreign, "left", 1.0)


def test_an_incomplete_last_line_is_cut_and_whole_answers_stay(folder):
    study = Study(folder)
    study.answer(str(study.next("Ann")["ticket"]), "left", 1.0)
    file = folder / "answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"rater": "Bo", "cho')
    assert len(Study(folder).answers) == 1 and file.read_bytes() == whole
    file.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        Study(folder)


def test_no_acknowledged_answer_is_missing_after_kill_9(folder):
    script = textwrap.dedent(f"""
        from pathlib import Path
        from condit.serve.study import Study
        study = Study(Path({str(folder)!r}))
        while True:
            print(study.answer(str(study.next("Ann")["ticket"]), "left", 0.5), flush=True)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        for _ in range(25):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    acknowledged = int(rest[-1]) if rest else 25
    assert len(Study(folder).answers) in (acknowledged, acknowledged + 1)


def test_a_study_needs_two_methods_common_names_and_a_new_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="two methods"):
        make_study(tmp_path / "x", {"a": tmp_path / "plain"})
    save_image(load_image(picture(1)), tmp_path / "other" / "elsewhere.png")
    with pytest.raises(ValueError, match="no picture has the same name"):
        make_study(tmp_path / "x", {"a": tmp_path / "plain", "b": tmp_path / "other"})
    with pytest.raises(FileExistsError):
        make_study(folder, {"a": tmp_path / "plain", "b": tmp_path / "style"})


def test_answers_over_http(run_server, folder):
    with run_server(study=folder) as live:
        assert live.get("/study").status_code == 200
        question = live.get("/v1/study/next", params={"rater": "Ann"}).json()
        assert live.get(f"/v1/study/pictures/{question['left']}").headers["content-type"] == "image/png"
        assert live.get("/v1/study/pictures/..%2fstudy.json").status_code == 404
        answer = {"ticket": question["ticket"], "choice": "right", "seconds": 2.0}
        assert live.post("/v1/study/answers", json=answer).json() == {"answered": 1}
        assert len((folder / "answers.jsonl").read_text().splitlines()) == 1
        assert live.post("/v1/study/answers", json={**answer, "choice": "both"}).status_code == 400
        assert live.get("/v1/study/next", params={"rater": ""}).status_code == 400


# The report


def simulated(scores: dict[str, float], count: int, seed: int = 0, raters: int = 3) -> list[dict]:
    """Answers by the model itself."""
    chance, names = np.random.default_rng(seed), list(scores)
    answers = []
    for number in range(count):
        left, right = chance.choice(names, 2, replace=False)
        wins = chance.random() < 1 / (1 + np.exp(scores[right] - scores[left]))
        answers.append({"item": str(number % 50), "left": left, "right": right, "rater": f"r{number % raters}"})
        answers[-1]["choice"] = "left" if wins else "right"
    return answers


def test_scores_are_those_that_made_the_answers():
    true = {"a": 0.8, "b": 0.0, "c": -0.8}
    found = report(simulated(true, 3000), list(true), samples=100)
    assert list(found.scores) == ["a", "b", "c"]
    for name, (score, low, high) in found.scores.items():
        assert abs(score - true[name]) < 0.15 and low < score < high and high - low < 0.4
    assert set(found.needed.values()) == {0}


def test_two_methods_have_the_score_of_their_share():
    score = bradley_terry(np.array([[0.0, 74.5], [24.5, 0.0]]))  # 75 to 25 with the half win of either
    assert score[0] - score[1] == pytest.approx(np.log(3), abs=1e-6)


def test_intervals_cover_the_truth():
    true, covered = {"a": 0.3, "b": -0.3}, 0
    for seed in range(40):
        _, low, high = report(simulated(true, 120, seed), list(true), samples=200).scores["a"]
        covered += low <= 0.3 <= high
    assert covered >= 34  # 95 % of 40, less what chance takes


def test_answers_still_needed_fall_with_the_square_of_the_difference():
    spread = np.random.default_rng(0).normal(0, 1, 4000)
    few, many = still_needed(2.0, spread, 100), still_needed(0.5, spread, 100)
    assert few == 0 and many is not None and 1300 < many < 1600
    assert still_needed(0.0, spread, 100) is None


def test_agreement_is_one_for_equal_and_chance_for_random_answers():
    question = {"item": "0", "left": "a", "right": "b"}
    equal = [
        {**question, "item": str(i // 2), "rater": f"r{i % 2}", "choice": ("left", "right")[i // 2 % 2]}
        for i in range(40)
    ]
    share, kappa, pairs = agreement(equal)
    assert (share, kappa, pairs) == (1.0, pytest.approx(1.0), 20)
    turned = [
        {**question, "left": "b", "right": "a", "rater": "x", "choice": "right"},
        {**question, "rater": "y", "choice": "left"},
    ]
    assert agreement(turned)[0] == 1.0  # the same method, on the other side
    assert agreement(simulated({"a": 0.0, "b": 0.0}, 3, raters=3))[2] == 0


def test_raters_who_prefer_spoilt_pictures_are_left_out():
    check = {"item": "0", "left": "a", "right": CHECK}
    answers = [{**check, "rater": "blind", "choice": c} for c in ("right", "right", "left")]
    answers += [{**check, "rater": "good", "choice": "left"} for _ in range(3)]
    assert failed_checks(answers) == ["blind"]
    votes = [{"item": "1", "left": "a", "right": "b", "rater": r, "choice": "left"} for r in ("blind", "good")]
    found = report([*answers, *votes], ["a", "b"], samples=50)
    assert found.excluded == ("blind",) and found.raters == {"good": 1}
    assert "failed the checks: blind" in as_text(found)
    with pytest.raises(ValueError, match="no answers yet"):
        report([], ["a", "b"])
