"""The command line as its users meet it: help, exit codes, clear errors, and pictures that can be drawn again."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import condit
from condit.cli.uses import USES

VERBS = ("demo", "generate", "edit", "replay", "train", "evaluate", "verify", "models", "doctor", "data")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_verb_and_goes_to_stdout(run, option):
    code, out, err = run(option)
    assert (code, err) == (0, "")
    assert all(f"  {verb} " in out for verb in VERBS)
    assert "..." not in out.partition("Commands:")[2]  # no summary is cut off


@pytest.mark.parametrize("verb", [*VERBS, "data icons"])
def test_every_verb_has_help(run, verb):
    code, out, _ = run(*verb.split(), "-h")
    assert code == 0
    assert out.startswith(f"Usage: condit {verb}")


def test_version(run):
    assert run("--version") == (0, f"condit {condit.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["generate"], "give one prompt or more, or --from"),
        (["generate", "a", "--nonsense"], "No such option"),
        (["generate", "a", "--seed", "x"], "Invalid value for '--seed'"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "  \n "], "the prompt is empty"),
        (["generate", "x" * 10_000], "the prompt has 10000 characters; at most 2000"),
        (["generate", "a", "--negative", "x" * 2001], "the negative prompt has 2001"),
        (["generate", "a", "-n", "0"], "count is 0; expected 1 to 64"),
        (["generate", "a", "--steps", "0"], "steps is 0; expected 1 to 1000"),
        (["generate", "a", "--control", "ref.png"], "ADAPTER=REF"),
        (["generate", "a", "-o", "out.txt"], "expected a name that ends in .png"),
        (["train", "absent.toml"], "no recipe at absent.toml"),
        (["evaluate", "flux"], "No such command 'flux'"),
        (["evaluate", "classes", "runs/x"], "Missing option '--data'"),
        (["evaluate", "style", "--sets", "none"], "No such option: --sets"),
        (["evaluate", "style", "--split", "train"], "--split must be combo or style; found 'train'"),
        (["evaluate", "tiny", "--methods", "plain"], "No such option: --methods"),
        (["verify", "flux"], "deadiff, dit4edit or all; found 'flux'"),
        (["verify", "all", "x.pt"], "FILE is supported for vit, dit, diffit only; found all"),
        (["verify", "vit", "x.npz", "--golden", "."], "--golden and --into apply to the recorded tensors"),
        (["verify", "vit", "--heads", "4"], "--heads applies to a FILE"),
        (["verify", "vit", "--into", "x.md"], "the table of all systems"),
        (["data", "icons"], "Missing option"),
    ],
)
def test_wrong_usage_exits_2_and_says_why(run, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert "Traceback" not in err


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize("option", ["--style", "--subject", "--edges", "--edges-map", "--gray", "--control=tiny/style"])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.png", None, "no image at absent.png"),
        ("text.png", b"hello", "text.png is not an image of the supported formats: PNG"),
        ("bomb.png", huge_png(), "bomb.png has too many pixels"),
        ("cut.png", b"\x89PNG\r\n\x1a\n", "cut.png is"),
    ],
    ids=["missing", "text", "bomb", "cut off"],
)
def test_a_wrong_reference_exits_1_and_says_why(run, option, name, content, said):
    if content is not None:
        Path(name).write_bytes(content)
    arguments = [f"{option}={name}"]
    code, out, err = run("generate", "a red apple", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(condit.__file__).parent.parent)}
    arguments = [sys.executable, "-m", "condit.cli", "generate", "a", "--style", "absent.png"]
    for extra, shown in (([], False), (["--debug"], True)):
        done = subprocess.run(
            [*arguments, *extra], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
        )
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) is shown


def test_an_interrupt_exits_130(run, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("condit.cli.diagnosis.check", interrupted)
    assert run("doctor")[0] == 130


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("clear text"), "error: clear text\n"),
        (KeyError("no 'x' here"), "error: no 'x' here\n"),
        (TypeError("odd"), "error: TypeError: odd (run again with --debug to see where)\n"),
        (OSError(28, "no space left while writing a.png"), "error: no space left while writing a.png\n"),
        (ModuleNotFoundError("No module named 'ray'"), "error: No module named 'ray'. Is an extra missing?"),
    ],
)
def test_every_error_is_one_line(run, monkeypatch, error, line):
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("condit.cli.diagnosis.check", fails)
    code, out, err = run("doctor")
    assert (code, out) == (1, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_doctor_answers_in_text_and_json_and_leaves_nothing_behind(run, tmp_path):
    code, out, _ = run("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(out)}
    assert {"condit", "python", "torch", "device", "threads", "output", "hub", "extra pairs"} <= set(findings)
    assert "for --engine ray" in findings["extra ray"]["text"] and "for serve" in findings["extra serve"]["text"]
    assert code == int(any(finding["state"] == "bad" for finding in findings.values()))
    assert "torch" in run("doctor")[1]
    assert list(tmp_path.iterdir()) == []


def test_doctor_tells_an_output_folder_that_cannot_be_written(run, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONDIT_OUTPUT_DIR", str(tmp_path / "file" / "sub"))
    code, out, _ = run("doctor")
    assert code == 1
    assert "bad   output" in out


def test_training_continues_a_run_only_with_resume(run, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("condit.training.run.train", lambda path, **options: calls.append((path, options)))
    (tmp_path / "x.toml").touch()
    assert run("train", "x.toml")[:2] == (0, "runs/x\n")
    (tmp_path / "runs" / "x").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "x" / "step").touch()
    code, _, err = run("train", "x.toml")
    assert code == 2
    assert "already holds a run; add --resume" in " ".join(err.split())
    assert run("train", "x.toml", "--resume")[0] == 0
    assert [options for _, options in calls] == [{"out": Path("runs/x"), "resume": resume} for resume in (False, True)]


def test_models_are_listed_in_text_and_json(run, random_tiny):
    assert list(json.loads(run("models", "--json")[1])) == ["tiny", *(f"tiny/{use}" for use in USES)]
    code, out, _ = run("models")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[:2]] == [["tiny", "model"], ["tiny/style", "ip-adapter"]]
