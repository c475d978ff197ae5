"""The command line as its users meet it: help, exit codes, clear errors, and pictures that can be drawn again."""

import errno
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import condit
from condit.backbones.diffit import DiffiT, DiffiTConfig
from condit.cli import demo, main
from condit.cli.generate import output_paths, parse_reference
from condit.cli.request import Reference, Request, Studio, differences, locate
from condit.cli.uses import OPTIONS, USES
from condit.controls.omini_tasks import OminiConfig
from condit.data.images import load_image, read_recipe, save_image
from condit.weights import catalog
from condit.weights.class_models import write_labels
from condit.weights.diffit import save_diffit
from condit_lab.icons.world import Icon, IconWorld, sample_path

VERBS = ("demo", "generate", "edit", "replay", "train", "evaluate", "verify", "models", "doctor", "data")


needs_tiny = pytest.mark.skipif(
    not {"tiny", "tiny/style"} <= set(catalog.MODELS) or not sample_path().exists(),
    reason="the embedded model or the icon sample is not in this tree",
)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """run("generate", ...) -> exit code, stdout, stderr; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONDIT_OUTPUT_DIR", raising=False)

    def call(*arguments: str) -> tuple[int | str | None, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def picture(tmp_path) -> Path:
    return save_image(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), tmp_path / "ref.png"
    )


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_names_every_verb_and_goes_to_stdout(run, asked):
    code, out, err = run(asked)
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
        (["generate"], "Missing argument"),
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
        (["generate", "a", "-o", "out.jpg"], "only a PNG stores its recipe"),
        (["train", "absent.toml"], "no recipe at absent.toml"),
        (["evaluate", "flux"], "No such command 'flux'"),
        (["evaluate", "classes", "runs/x"], "Missing option '--data'"),
        (["evaluate", "style", "--sets", "none"], "No such option: --sets"),
        (["evaluate", "style", "--split", "train"], "--split is combo or style; found 'train'"),
        (["evaluate", "tiny", "--methods", "plain"], "No such option: --methods"),
        (["verify", "flux"], "deadiff, dit4edit or all; found 'flux'"),
        (["verify", "all", "x.pt"], "FILE is supported for vit, dit, diffit; found all"),
        (["verify", "vit", "x.npz", "--golden", "."], "--golden and --into apply to the recorded tensors"),
        (["verify", "vit", "--heads", "4"], "--heads needs a FILE"),
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
    assert {"condit", "python", "torch", "device", "threads", "output", "hub", "extra ui"} <= set(findings)
    assert code == int(any(finding["state"] == "bad" for finding in findings.values()))
    assert "torch" in run("doctor")[1]
    assert list(tmp_path.iterdir()) == []


def test_doctor_tells_an_output_folder_that_cannot_be_written(run, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONDIT_OUTPUT_DIR", str(tmp_path / "file" / "sub"))
    code, out, _ = run("doctor")
    assert code == 1
    assert "bad   output" in out


def test_a_reference_may_carry_its_strength(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd:2").touch()
    assert parse_reference("a.png:0.6", 1.0) == ("a.png", 0.6)
    assert parse_reference("a.png", 0.7) == ("a.png", 0.7)
    assert parse_reference("odd:2", 1.0) == ("odd:2", 1.0)
    assert parse_reference(r"C:\pictures\a.png", 1.0) == (r"C:\pictures\a.png", 1.0)


def test_outputs_are_named_by_option_or_by_prompt_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONDIT_OUTPUT_DIR", raising=False)
    assert output_paths("x", Path("a.png"), 3, 1) == [Path("a.png")]
    assert output_paths("x", Path("a.png"), 3, 2) == [Path("a-3.png"), Path("a-4.png")]
    assert output_paths("../Red apple!", None, 3, 1) == [Path("condit-out/Red-apple-3.png")]
    assert output_paths("红 苹果", Path("folder"), 0, 1) == [Path("folder/红-苹果-0.png")]
    monkeypatch.setenv("CONDIT_OUTPUT_DIR", "elsewhere")
    assert output_paths("!!", None, 0, 1) == [Path("elsewhere/image-0.png")]


REQUEST = Request(
    "a cat's house; $(ls)",
    references=(
        Reference("style", "a b.png", 0.6),
        Reference("edges", "e.png", ready=True),
        Reference("tiny/x", "c.png"),
    ),
    negative="rain",
    seed=7,
    count=2,
    guidance=3.0,
)


def test_the_printed_command_is_the_request(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("a b.png", "e.png", "c.png"):
        save_image(Image.new("RGB", (8, 8)), name)
    drawn: list[Request] = []
    monkeypatch.setattr("condit.cli.generate.generate_and_save", lambda request, *_, **__: drawn.append(request))
    with pytest.raises(SystemExit) as end:
        main(shlex.split(REQUEST.command("out.png"))[1:])
    assert end.value.code == 0
    assert drawn == [REQUEST]


def test_every_row_of_the_table_is_an_option_that_is_parsed_and_printed_alike(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    save_image(Image.new("RGB", (8, 8)), "r.png")
    requests: list[Request] = []
    monkeypatch.setattr("condit.cli.generate.generate_and_save", lambda request, *_, **__: requests.append(request))
    for option, row in OPTIONS.items():
        with pytest.raises(SystemExit) as end:
            main(["generate", "a", f"--{option}", "r.png:0.5"])
        assert end.value.code == 0
        assert requests[-1].references == (Reference(row.use, "r.png", 0.5, row.ready),)
        assert f"--{option} r.png:0.5" in requests[-1].command("a.png")


@pytest.mark.parametrize("kind", [condit.DEADiff, condit.IPAdapter, condit.OminiControl])
def test_a_ready_edge_map_is_refused_by_an_adapter_that_takes_pictures(kind):
    studio = Studio.__new__(Studio)  # without the model, which the refusal does not need
    studio.model = "tiny"
    adapter = kind.__new__(kind)
    torch.nn.Module.__init__(adapter)
    adapter.config = OminiConfig("subject")
    studio.adapters = {"a.safetensors": adapter}
    plain, ready = Reference("a.safetensors", "p.png"), Reference("a.safetensors", "e.png", ready=True)
    for group in ([ready], [plain, ready]):
        with pytest.raises(ValueError, match=f"{kind.__name__}, takes an image and no ready-made .*; found e.png"):
            studio.control(group)


def test_a_request_survives_its_recipe():
    recipe = json.loads(
        json.dumps({"request": REQUEST.__dict__ | {"references": [r.__dict__ for r in REQUEST.references]}, "index": 1})
    )
    assert Request.from_recipe(recipe) == (REQUEST, 1)


@pytest.mark.parametrize(
    "recipe", [{}, {"request": {"prompt": ""}, "index": 0}, {"request": {"prompt": "a"}, "index": 1}]
)
def test_a_foreign_recipe_is_told(recipe):
    with pytest.raises(ValueError, match="recipe"):
        Request.from_recipe(recipe)


def test_references_of_a_recipe_are_found_beside_the_picture_or_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = Request("a", references=(Reference("style", "far/away/ref.png"),))
    with pytest.raises(FileNotFoundError, match="far/away/ref.png of this image is missing"):
        locate(request, tmp_path / "there")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "ref.png").touch()
    assert locate(request, tmp_path / "there").references[0].path == str(tmp_path / "there" / "ref.png")


def test_what_changed_since_a_picture_was_drawn_is_named():
    def recipe(version: str, model: str, path: str, content: str) -> dict:
        controls = [{"hash": "y", "reference": [{"path": path, "sha256": content}]}]
        return {"condit": version, "run": {"hash": model, "controls": controls}}

    then = recipe("0.1.0", "x", "a.png", "1")
    assert differences(then, recipe("0.1.0", "x", "moved/a.png", "1")) == []
    assert differences(then, recipe("0.2.0", "z", "a.png", "2")) == [
        "generated with condit 0.1.0, this is 0.2.0",
        "a reference differs from the one it was generated with",
        "hash was x, is z",
    ]


def test_replay_of_a_picture_without_a_recipe_is_a_clear_error(run, picture):
    code, _, err = run("replay", str(picture))
    assert code == 1
    assert "has no condit recipe" in err


def test_training_never_writes_over_a_run_without_being_asked(run, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("condit.training.run.train", lambda path, **options: calls.append((path, options)))
    (tmp_path / "x.toml").touch()
    assert run("train", "x.toml")[:2] == (0, "runs/x\n")
    (tmp_path / "runs" / "x").mkdir(parents=True)
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


@pytest.mark.parametrize(("option", "name"), [("--model", "nonsense"), ("--control", "tiny/nonsense=ref.png")])
def test_an_unknown_model_or_adapter_is_told_with_those_there_are(run, random_tiny, picture, option, name):
    code, out, err = run("generate", "a red apple", option, name)
    assert (code, out) == (1, "")
    assert "nonsense" in err
    assert "tiny" in err.replace("tiny/nonsense", "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


def test_a_generated_png_is_drawn_again_bit_for_bit(run, random_tiny, picture):
    words = ["--style", "ref.png:0.5", "--subject", "ref.png", "--edges", "ref.png", "--gray", "ref.png:0.3"]
    code, out, err = run("generate", "红苹果", *words, "--seed", "3", "--steps", "2", "-n", "2", "-o", "a.png")
    assert code == 0, err
    assert out.split() == ["a-3.png", "a-4.png"]
    recipe = read_recipe("a-4.png")
    assert recipe["index"] == 1
    with Image.open("a-4.png") as image:
        assert "Seed: 4" in image.info["parameters"]
    assert load_image("a-3.png").tobytes() != load_image("a-4.png").tobytes()

    code, out, err = run("replay", "a-4.png", "-o", "again.png")
    assert (code, out.split()) == (0, ["again.png"])
    assert "the image is identical" in err
    assert "warning" not in err
    assert load_image("again.png").tobytes() == load_image("a-4.png").tobytes()

    save_image(Image.new("RGB", (64, 64), "blue"), "ref.png")
    err = run("replay", "a-4.png", "-o", "again.png")[2]
    assert "warning: a reference differs from the one it was generated with" in err
    assert "the image differs" in err

    picture.unlink()
    code, _, err = run("replay", "a-4.png")
    assert code == 1
    assert "ref.png of this image is missing" in err


def test_replay_says_that_the_weights_are_others(run, random_tiny, picture):
    assert run("generate", "a", "--style", "ref.png", "--steps", "1", "-o", "a.png")[0] == 0
    recipe = read_recipe("a.png")
    recipe["run"]["controls"][0]["hash"] = "0123"  # pyright: ignore[reportIndexIssue]
    save_image(load_image("a.png"), "a.png", recipe=recipe)
    err = run("replay", "a.png")[2]
    assert "warning: controls.0.hash was 0123, is " in err
    assert "the image is identical" in err


def test_every_control_changes_the_picture_and_none_at_strength_0(run, random_tiny, picture):
    def drawn(*words: str) -> bytes:
        code, _, err = run("generate", "a red apple", "--steps", "2", "-o", "a.png", *words)
        assert code == 0, err
        return load_image("a.png").tobytes()

    plain = drawn()
    assert drawn() == plain
    results = {drawn(f"--{use}", "ref.png") for use in ("style", "subject", "edges", "gray", "edges-map")}
    assert len(results | {plain}) == 6
    assert drawn("--style", "ref.png:0", "--edges", "ref.png", "--strength", "0") == plain


def test_several_style_references_make_one_control(run, random_tiny, picture):
    save_image(Image.new("RGB", (64, 64), "blue"), "other.png")
    words = ["--style", "ref.png", "--style", "other.png", "--style", "other.png:0.5", "--subject", "ref.png"]
    code, _, err = run("generate", "a", *words, "--steps", "1", "-o", "a.png")
    assert code == 0, err
    controls = read_recipe("a.png")["run"]["controls"]  # pyright: ignore[reportIndexIssue]
    assert [len(control["reference"]) for control in controls] == [2, 1, 1]


def test_an_adapter_may_be_a_file_or_a_folder(run, random_tiny, picture):
    for path in (random_tiny / "style", random_tiny / "edges" / "adapter.safetensors"):
        code, _, err = run("generate", "a", "--control", f"{path}=ref.png", "--steps", "1", "-o", "a.png")
        assert code == 0, err


def test_no_metadata_leaves_the_recipe_out(run, random_tiny):
    assert run("generate", "a red apple", "--steps", "1", "-o", "a.png", "--no-metadata")[0] == 0
    with pytest.raises(ValueError, match="has no condit recipe"):
        read_recipe("a.png")
    assert run("generate", "a red apple", "--steps", "1", "-o", "a.jpg", "--no-metadata")[0] == 0


def test_generate_answers_in_json(run, random_tiny):
    code, out, _ = run("generate", "a red apple", "--steps", "1", "-o", "a.png", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["images"] == [{"path": "a.png", "seed": 0}]
    assert answer["seconds"] > 0


def test_a_full_disk_while_saving_is_a_clear_error_and_keeps_the_old_picture(run, random_tiny, picture, monkeypatch):
    before = picture.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run("generate", "a red apple", "--steps", "1", "-o", "ref.png")
    assert (code, out) == (1, "")
    assert "error: no space left while writing" in err
    assert picture.read_bytes() == before


def check_demo(run) -> None:
    code, out, err = run("demo", "--out", "demo-out", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert load_image(result["grid"]).width > 600
    for part in ("--style", "condit edit"):
        call = [call for call in result["calls"] if part in call["command"]][-1]
        before = load_image(call["path"])
        assert call["command"] in err
        assert run(*shlex.split(call["command"])[1:-1], "again.png")[0] == 0
        assert load_image("again.png").tobytes() == before.tobytes()


@pytest.fixture
def small_demo(monkeypatch):
    """The demo's rows with one picture each, and icons made up on the spot."""
    rows = tuple(replace(row, prompts=row.prompts[:1]) for row in demo.ROWS)
    monkeypatch.setattr(demo, "ROWS", rows)
    references = {*(icon for row in rows for icon in row.icons), *(change.icon for change in demo.CHANGES)}
    icons = [Icon(g.style, "", g.label, g.label, g.label, "", "train", True, "MIT") for g in references]

    class World(IconWorld):
        def rgba(self, index: int) -> np.ndarray:
            return np.random.default_rng(index).integers(0, 256, (128, 128, 4), np.uint8)

    monkeypatch.setattr(IconWorld, "open", lambda *_, **__: World(icons, {}, {}))


def test_the_demo_draws_its_grid_and_its_commands_repeat_it(run, random_tiny, small_demo):
    check_demo(run)


def test_the_demo_leaves_out_what_is_not_there_and_says_so(run, random_tiny, small_demo, monkeypatch):
    monkeypatch.delitem(catalog.MODELS, "tiny/gray")
    code, _, err = run("demo")
    assert code == 0
    assert "left out: gray -> colour (no tiny/gray)" in err


@needs_tiny
@pytest.mark.slow
def test_the_shipped_demo_draws_its_grid_and_its_commands_repeat_it(run):
    check_demo(run)


@needs_tiny
def test_the_references_of_the_demo_are_in_the_sample():
    world = IconWorld.open(sample_path())
    there = {(icon.style, icon.label) for icon in world.icons}
    references = [*(icon for row in demo.ROWS for icon in row.icons), *(change.icon for change in demo.CHANGES)]
    assert {(one.style, one.label) for one in references} <= there


def test_verify_tells_one_wrong_number_among_the_recorded_ones_and_exits_1(run, tmp_path):
    golden = tmp_path / "golden"
    shutil.copytree(Path(__file__).parent.parent / "parity" / "golden" / "diffit", golden / "diffit")
    recorded = load_file(golden / "diffit" / "latent_a.safetensors")
    recorded["act.block.1"][0, 0, 0] += 1e-3
    save_file(recorded, golden / "diffit" / "latent_a.safetensors")
    code, out, err = run("verify", "diffit", "--golden", str(golden))
    assert (code, err) == (1, "")
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["LARGE", "1.0e-03", "ok", "ok", "ok", "ok"]
    assert "latent_a: block.1: 1.0e-03" in out


def test_verify_without_fixtures_or_with_a_file_of_another_model_is_a_clear_error(run, tmp_path):
    code, out, err = run("verify", "dit", "--golden", str(tmp_path / "absent"))
    assert (code, out) == (1, "")
    assert "Name tests/parity/golden of a checkout" in err
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "x.safetensors")
    code, out, err = run("verify", "dit", "x.safetensors")
    assert (code, out) == (1, "")
    assert "It looks like a ViT" in err


@needs_tiny
def test_verify_takes_an_embedded_models_name_and_tells_what_else_it_is(run):
    assert "It looks like a FLUX transformer of diffusers" in run("verify", "dit", "tiny")[2]
    part = catalog.MODELS["tiny"].path / "transformer"  # its file bears a plain name where others bear fields
    assert "It looks like a FLUX transformer of diffusers" in run("verify", "diffit", str(part))[2]


def test_verify_tells_what_a_file_is_in_text_and_json(run, tmp_path):
    config = DiffiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=5)
    save_diffit(DiffiT(config), tmp_path / "x.safetensors")
    code, out, _ = run("verify", "diffit", "x.safetensors")
    assert code == 0
    assert "nearest DiffiT-XL/2: input_size 8 instead of 32, hidden_size 16 instead of 1152" in out
    report = json.loads(run("verify", "diffit", "x.safetensors", "--json")[1])
    assert (report["layout"], report["dtype"], report["differs"]["depth"]) == ("release", "float32", [2, 28])
    assert report["reference"] == {"note": "none: neither transformers nor diffusers has a DiffiT", "rows": []}


@needs_tiny
def test_a_model_with_one_sampler_takes_no_other(run):
    code, _, errors = run("generate", "a red apple", "--sampler", "ddim")
    assert code == 1 and "has one sampler only" in errors


@needs_tiny
def test_a_class_model_draws_a_class_by_name_and_takes_nothing_else(run, picture, tmp_path, monkeypatch):
    config = DiffiTConfig(input_size=16, in_channels=32, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    save_diffit(DiffiT(config), tmp_path / "model" / "x.safetensors")
    write_labels(tmp_path / "model", ["noto", "twemoji"])
    monkeypatch.setitem(catalog.MODELS, "two", catalog.Entry("model", "random", "none", tmp_path / "model"))
    code, out, _ = run("generate", "twemoji", "-m", "two", "--steps", "2", "--sampler", "ddim", "-o", "a.png")
    assert code == 0 and load_image(out.strip()).size == (128, 128)
    facts = read_recipe("a.png")["run"]
    assert isinstance(facts, dict) and facts["class"] == [1]
    code, _, err = run("replay", "a.png")
    assert code == 0 and "the image is identical" in err
    refused = {
        "generates classes and takes no references": ("--style", str(picture)),
        "takes no negative": ("--negative", "x"),
    }
    for why, more in refused.items():
        code, _, err = run("generate", "twemoji", "-m", "two", *more)
        assert code == 1 and why in err
    assert "mozilla" in run("generate", "mozilla", "-m", "two")[2]


# Editing


@needs_tiny
def test_edit_writes_the_picture_its_recipe_and_a_page(run, picture, tmp_path):
    code, out, err = run(
        *("edit", str(picture), "a red apple", "a green apple", "--type", "attribute", "--steps", "2"),
        *("-o", str(tmp_path / "green.png"), "--page", str(tmp_path / "page.png")),
    )
    assert code == 0 and "reconstruction" in err
    assert out.split() == [str(tmp_path / "green.png"), str(tmp_path / "page.png")]
    recipe = read_recipe(tmp_path / "green.png")
    assert (recipe["source"], recipe["target"]) == (["a red apple"], ["a green apple"])
    assert load_image(tmp_path / "page.png").height > 3 * 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--type", "melt"), "--type must be one of swap"),
        (("--reweight", "green"), "--reweight takes WORD=F"),
        (("--type", "none", "--reweight", "green=2"), "--type none does not control"),
        (("-o", "x.gif"), "expected a name that ends in .png"),
        (("--page", "page.txt"), "--page page.txt: expected a name that ends in .png"),
    ],
)
def test_a_wrong_edit_is_told_before_anything_is_loaded(run, picture, arguments, message):
    code, _, err = run("edit", str(picture), "a red apple", "a green apple", *arguments)
    assert code == 2 and message in " ".join(err.split())


@needs_tiny
def test_an_edit_of_a_size_that_the_model_does_not_draw_is_told(run, picture):
    code, _, err = run("edit", str(picture), "a red apple", "a green apple", "--height", "256", "--width", "128")
    assert code == 1 and "tiny generates 128 x 128; found 256 x 128" in err


def test_a_missing_picture_to_edit_is_told(run):
    code, _, err = run("edit", "nowhere.png", "a cat", "a dog")
    assert code == 1 and "nowhere.png" in err
