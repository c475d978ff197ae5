"""A call of the command line as a value: parsed, printed, stored in a PNG and read again."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import condit
from condit.cli import main
from condit.cli.adapters import Adapters
from condit.cli.outputs import output_paths
from condit.cli.reference import Reference, parse_reference
from condit.cli.request import Request, differences, locate
from condit.cli.uses import OPTIONS
from condit.controls.omini_tasks import OminiConfig
from condit.data.images import save_image


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
    monkeypatch.setattr("condit.cli.generate.report", lambda *_, **__: None)
    with pytest.raises(SystemExit) as end:
        main(shlex.split(REQUEST.command("out.png"))[1:])
    assert end.value.code == 0
    assert drawn == [REQUEST]


def test_every_row_of_the_table_is_an_option_that_is_parsed_and_printed_alike(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    save_image(Image.new("RGB", (8, 8)), "r.png")
    requests: list[Request] = []
    monkeypatch.setattr("condit.cli.generate.generate_and_save", lambda request, *_, **__: requests.append(request))
    monkeypatch.setattr("condit.cli.generate.report", lambda *_, **__: None)
    for option, row in OPTIONS.items():
        with pytest.raises(SystemExit) as end:
            main(["generate", "a", f"--{option}", "r.png:0.5"])
        assert end.value.code == 0
        assert requests[-1].references == (Reference(row.use, "r.png", 0.5, row.ready),)
        assert f"--{option} r.png:0.5" in requests[-1].command("a.png")


@pytest.mark.parametrize("kind", [condit.DEADiff, condit.IPAdapter, condit.OminiControl])
def test_a_ready_edge_map_is_refused_by_an_adapter_that_takes_images(kind):
    adapters = Adapters.__new__(Adapters)  # without the model, which the refusal does not need
    adapters.model = "tiny"
    adapter = kind.__new__(kind)
    torch.nn.Module.__init__(adapter)
    adapter.config = OminiConfig("subject")
    adapters.loaded = {("a.safetensors", None): adapter}
    plain, ready = Reference("a.safetensors", "p.png"), Reference("a.safetensors", "e.png", ready=True)
    for group in ([ready], [plain, ready]):
        with pytest.raises(ValueError, match=f"{kind.__name__}, takes an image and no ready-made .*; found e.png"):
            adapters.control(group)


def test_a_request_survives_its_recipe():
    recipe = json.loads(
        json.dumps({"request": REQUEST.__dict__ | {"references": [r.__dict__ for r in REQUEST.references]}, "index": 1})
    )
    assert Request.from_recipe(recipe) == (REQUEST, 1)


@pytest.mark.parametrize(
    "recipe", [{}, {"request": {"prompt": ""}, "index": 0}, {"request": {"prompt": "a"}, "index": 1}]
)
def test_a_recipe_of_another_program_raises(recipe):
    with pytest.raises(ValueError, match="recipe"):
        Request.from_recipe(recipe)


def test_references_of_a_recipe_are_looked_for_next_to_the_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = Request("a", references=(Reference("style", "far/away/ref.png"),))
    with pytest.raises(FileNotFoundError, match="far/away/ref.png of this image is missing"):
        locate(request, tmp_path / "there")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "ref.png").touch()
    assert locate(request, tmp_path / "there").references[0].path == str(tmp_path / "there" / "ref.png")


def test_differences_since_an_image_was_generated_are_named():
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
