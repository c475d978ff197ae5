"""Limits of the command line: outputs are checked first, files of strangers act on nothing, interrupts are named."""

import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from condit.cli import main

ESCAPE = "\x1b]0;title\x07\x9b31m\u202e"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """run("generate", ...) -> exit code and stderr; in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int | str | None, str]:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                main(list(arguments))
        finally:
            signal.signal(signal.SIGTERM, handler)
        return end.value.code, capsys.readouterr().err

    return call


def made(path: Path, **changes: object) -> str:
    """An image with the recipe of a stranger."""
    recipe = {"condit": "0", "index": 0, "request": {"prompt": "a", "model": "tiny", **changes}, "run": {}}
    info = PngImagePlugin.PngInfo()
    info.add_text("condit", json.dumps(recipe))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


def test_a_strangers_recipe_prints_one_line_without_codes_for_the_terminal(run, tmp_path):
    for changes in (
        {"model": ESCAPE},
        {"steps": ESCAPE},
        {"references": [{ESCAPE: ESCAPE}]},
        {"steps": "x", "seed": "y", "count": "z"},
    ):
        code, err = run("replay", made(tmp_path / "a.png", **changes))
        assert code == 1 and err.count("\n") == 1, err
        assert not set(ESCAPE[:1] + "\x07\x9b\u202e") & set(err)
    assert "errors.pydantic.dev" not in err


def test_a_recipe_of_thousands_of_references_is_refused_before_they_are_read(run, tmp_path):
    references = [{"use": "style", "path": "a.png"}] * 4000
    code, err = run("replay", made(tmp_path / "a.png", references=references))
    assert code == 1 and "4000 references; expected at most 64" in err


def test_a_condition_larger_than_any_model_reads_is_refused(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code, err = run("annotate", "a.png", "canny", "--width", "60000")
    assert code == 2 and "at most 4096" in " ".join(err.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a", "-o", "taken/o.png"),
        ("edit", "a.png", "a", "b", "-o", "taken/o.png"),
        ("edit", "a.png", "a", "b", "-o", "o.png", "--page", "taken/o.png"),
        ("replay", "a.png", "-o", "taken/o.png"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_a_model_is_loaded(run, tmp_path, monkeypatch, arguments):
    (tmp_path / "taken").touch()  # a file where a folder would be
    made(tmp_path / "a.png")
    monkeypatch.setattr("condit.load", lambda *_, **__: pytest.fail("the model was loaded"))
    code, err = run(*arguments)
    assert code == 1 and "cannot write" in err and "taken/o.png" in err


def test_an_interrupted_training_names_the_command_that_continues(run, tmp_path, monkeypatch):
    (tmp_path / "my recipe.toml").touch()

    def train(recipe: Path, *, out: Path, resume: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "state.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("condit.training.run.train", train)
    code, err = run("train", "my recipe.toml", "-o", "run")
    assert code == 130
    assert "continue with: condit train 'my recipe.toml' -o run --resume" in err and "interrupted" in err


def test_sigterm_is_an_interrupt(run, tmp_path, monkeypatch):
    monkeypatch.setattr("condit.data.pairs.check", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, err = run("data", "check", ".")
    assert code == 130 and err.strip() == "interrupted"
