"""The commands of the server: `condit serve` and `condit study`."""

import json

import pytest

from condit.cli import main
from condit.data.images import load_image, save_image
from condit.serve.study import Study
from conftest_serve import picture


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "give --token"),
        (["--host", "0.0.0.0", "--token", "short"], "16 characters"),
        (["--port", "99999"], "65535"),
    ],
)
def test_an_open_address_without_a_token_is_a_wrong_usage(capsys, arguments, says):
    assert run("serve", *arguments) == 2
    assert says in capsys.readouterr().err


def test_a_study_is_made_answered_and_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, method in enumerate(("a", "b")):
        for item in range(2):
            save_image(load_image(picture(10 * number + item)), tmp_path / method / f"{item}.png")
    assert run("study", "make", "out", "first=a", "second=b", "--references", "a") == 0
    assert run("study", "make", "out", "first=a", "second=b") == 1
    assert run("study", "make", "other", "first", "second=b") == 2
    assert run("study", "make", "other", "first=tiny/style", "second=b") == 2  # no references to generate from
    assert run("study", "report", "out") == 1
    study = Study(tmp_path / "out")
    for _ in range(6):
        ticket = str(study.next("Ann")["ticket"])
        asked = study.asked(ticket)
        study.answer(ticket, "left" if asked["left"] == "first" else "right", 1.0)
    capsys.readouterr()
    assert run("study", "report", "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == 5 and next(iter(found["scores"])) == "first"
    assert run("study", "report", "out") == 0
    assert "5 answers by 1 raters: Ann (5)" in capsys.readouterr().out
