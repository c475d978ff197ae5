"""The whole library from the command line: settings of references, several prompts, rows of a file, grids."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import condit
from condit.cli import main
from condit.cli.adapters import Adapters
from condit.cli.compare import read_axis
from condit.cli.reference import Reference, read_reference
from condit.cli.request import FORMAT, Request, migrated
from condit.cli.rows import read_rows
from condit.data.images import load_image, read_recipe, save_image
from condit.jobs import run as jobs
from condit.jobs.local import Rank
from condit.jobs.plan import Job
from condit.jobs.run import engine_of
from painter import contents
from random_tiny import RandomTiny


def write_picture(path: str, seed: int = 0) -> Path:
    return save_image(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)), path)


# Settings of a reference


@pytest.mark.parametrize(
    "value",
    [
        "a.png:0.5",
        "a b.png:1,when=0.2-0.7",
        "a.png:1,when=0-1,where=up_blocks.1.*+mid_block.*,mask=m.png",
        "a.png:0.8,preset=style+layout,subtract=a cat+a dog",
        "a.png:1,as=content",
        "a.png:1,task=subject-512,cached=first-step",
    ],
)
def test_a_reference_is_printed_as_it_is_read(value):
    reference = read_reference("x.safetensors", value)
    assert reference.words() == ["--control", f"x.safetensors={value}"]


def test_a_file_named_like_a_setting_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a,mask=b.png").touch()
    assert read_reference("style", "a,mask=b.png").path == "a,mask=b.png"
    assert read_reference("style", "c,mask=b.png").mask == "b.png"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a.png,when=0.7-0.2", "when=0-0.7; found '0.7-0.2'"),
        ("a.png,when=never", "when takes START-END"),
        ("a.png,as=subject", "expected style or content; found 'subject'"),
        ("a.png,cached=always", "expected first-step or independent"),
    ],
)
def test_a_wrong_setting_names_the_reference_and_what_is_expected(run, value, message):
    code, _, err = run("generate", "a", "--style", value)
    assert code == 2 and message in " ".join(err.split()) and "a.png" in err


def test_settings_reach_the_adapter_that_takes_them_and_no_other(make_latent, make_ip, make_deadiff, pictures):
    pipe = make_latent("sd15")
    adapters = Adapters("sd15", pipe)
    dead = make_deadiff(pipe)
    adapters.loaded = {("dead", None): dead}
    source = [Image.fromarray(picture) for picture in pictures(2)]
    references = [
        Reference("dead", source[0], 0.5, when=(0, 0.5)),  # type: ignore[arg-type]  # an image instead of its file
        Reference("dead", source[1], 0.25, role="content", when=(0, 0.5)),  # type: ignore[arg-type]
    ]
    (control,) = adapters.controls(references)
    assert control.describe()["strength"] == {"style": 0.5, "content": 0.25}
    assert control.describe()["when"] == [0, 0.5]
    with pytest.raises(ValueError, match="of DEADiff, takes no preset=; it takes when, where, mask, as"):
        adapters.controls([Reference("dead", "a.png", preset="style")])


def test_when_and_mask_limit_a_reference_of_the_command_line(run, random_tiny):
    write_picture("ref.png")
    save_image(Image.new("L", (64, 64), 0).convert("RGB"), "black.png")

    def made(*words: str) -> bytes:
        code, _, err = run("generate", "a", "--steps", "2", "-o", "a.png", "--force", *words)
        assert code == 0, err
        return load_image("a.png").tobytes()

    plain, whole = made(), made("--style", "ref.png")
    assert made("--style", "ref.png,mask=black.png") == plain
    assert made("--style", "ref.png,when=0-0.5") not in (plain, whole)
    recipe = read_recipe("a.png")
    assert Request.from_recipe(recipe)[0].references == (Reference("style", "ref.png", when=(0, 0.5)),)
    code, _, err = run("replay", "a.png", "-o", "b.png")
    assert code == 0 and "the image is identical" in err


def test_an_edit_takes_references_of_every_option(monkeypatch, run):
    write_picture("a.png")
    seen = []
    monkeypatch.setattr(Adapters, "controls", lambda self, references: seen.append(references) or [])

    class Pipe:
        model = type("Model", (), {"inversion": ("fixed_point", 2)})

        def edit(self, *_, **__):
            raise ValueError("enough")

    class Studio:
        pipe, adapters = Pipe(), Adapters("tiny", None)  # type: ignore[arg-type]

    monkeypatch.setattr("condit.cli.generate.studio_of", lambda _: lambda: Studio())
    code, _, err = run("edit", "a.png", "a", "b", "--edges", "a.png:0.5", "--style", "a.png,when=0-0.5")
    assert code == 1 and "enough" in err
    assert seen == [(Reference("style", "a.png", when=(0, 0.5)), Reference("edges", "a.png", 0.5))]


# Several prompts, other formats


def test_several_prompts_make_an_image_each_in_a_folder(run, random_tiny):
    code, out, _ = run("generate", "a fox", "a cat", "--steps", "1", "-o", "made", "--json")
    answer = json.loads(out)
    assert code == 0 and [image["path"] for image in answer["images"]] == ["made/a-fox-0.png", "made/a-cat-0.png"]
    assert run("generate", "a fox", "--steps", "1", "-o", "one.png")[0] == 0
    assert load_image("one.png").tobytes() == load_image("made/a-fox-0.png").tobytes()
    code, _, err = run("generate", "a fox", "a cat", "-o", "one.png")
    assert code == 2 and "2 prompts need a folder" in err


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_a_jpeg_and_a_webp_hold_their_recipe(run, random_tiny, suffix):
    assert run("generate", "a red apple", "--seed", "3", "--steps", "1", "-o", f"a.{suffix}")[0] == 0
    code, _, err = run("replay", f"a.{suffix}")
    assert code == 0 and "the image is identical" in err
    exif = Image.open(f"a.{suffix}").getexif().get_ifd(0x8769)
    comment = exif[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert comment.startswith("a red apple\n") and "Seed: 3" in comment


def test_a_recipe_that_is_too_long_for_a_jpeg_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="a JPEG cannot hold a recipe of"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", recipe={"prompt": "x" * 70_000})
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_the_first_format_is_migrated_and_one_of_a_later_format_is_refused():
    recipe = json.loads((Path(__file__).parent.parent / "unit" / "fixtures" / "recipe-1.json").read_text())
    request, index = Request.from_recipe(recipe)
    assert (request.prompt, request.references[0].strength, index) == ("a rocket", 0.5, 1)
    assert migrated(recipe)["format"] == FORMAT
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}; this condit reads 1 to {FORMAT}"):
        Request.from_recipe({**recipe, "format": FORMAT + 1})


def test_a_recipe_as_a_json_file_is_written_and_replayed(run, random_tiny):
    assert run("generate", "a rocket", "--steps", "1", "-o", "a.png")[0] == 0
    code, out, _ = run("recipe", "a.png", "-o", "a.json")
    assert code == 0 and json.loads(Path("a.json").read_text()) == read_recipe("a.png")
    code, out, err = run("replay", "a.json", "-o", "b.png")
    assert code == 0, err
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()


# Rows


ROWS = [
    {"prompt": "a fox", "seed": 3},
    {"prompt": "a cat", "style": "ref.png:0.5,when=0-0.5", "name": "cat"},
    {"prompt": "a cat", "count": 2, "name": "two"},
]


def write_rows(rows: list[object], path: str = "rows.jsonl") -> None:
    Path(path).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_rows_are_made_once_and_a_second_run_makes_what_is_missing(run, random_tiny):
    write_picture("ref.png")
    write_rows(ROWS)
    command = ("generate", "--from", "rows.jsonl", "--steps", "1", "-o", "made")
    assert run(*command)[0] == 0
    files = contents(Path("made"))
    (fox,) = [name for name in files if name.startswith("a-fox-")]
    assert sorted(files) == [fox, "cat.png", "metadata.jsonl", "settings.json", "two-0.png", "two-1.png"]
    assert json.loads(files["metadata.jsonl"].splitlines()[0]) == {"file_name": fox, "text": "a fox", "seed": 3}
    before = Path("made/cat.png").stat().st_mtime_ns
    Path("made/two-0.png").unlink()
    Path("made/.cat.png.0a1b2c3d.tmp").write_bytes(b"cut")  # of a process that was killed
    code, out, _ = run(*command, "--json")
    assert code == 0 and json.loads(out)["made"] == ["made/two-0.png"]
    assert contents(Path("made")) == files and not list(Path("made").glob("*.tmp"))
    assert Path("made/cat.png").stat().st_mtime_ns == before


def made_by(folder: str, model: Path, workers: int = 1, rank: Rank | None = None) -> dict[str, bytes]:
    """The files of a job of four rows on the random model."""
    write_rows([{"prompt": f"a fox {seed}", "seed": seed} for seed in range(4)])
    rows = read_rows(Path("rows.jsonl"), Path(folder), {"model": "tiny", "steps": 1})[0]
    job = Job(Path(folder), tuple(rows), RandomTiny(model))
    assert jobs.run(job, engine_of("local", workers, rank or Rank()), rank=rank).errors == {}
    return contents(Path(folder))


def test_ranks_make_the_files_of_one_process(run, random_tiny):
    one = made_by("one", random_tiny)
    made_by("ranks", random_tiny, rank=Rank(1, 2))
    assert len(one) == 4 + 2 and made_by("ranks", random_tiny, rank=Rank(0, 2)) == one


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(run, random_tiny):
    assert made_by("two", random_tiny, workers=2) == made_by("one", random_tiny)


def test_broken_rows_are_named_and_the_others_are_made(run, random_tiny):
    write_rows([ROWS[0], "{", {"seed": 1}, {"prompt": "a", "colour": 1}, {"prompt": "a", "style": "absent.png"}])
    code, out, err = run("generate", "--from", "rows.jsonl", "--steps", "1", "-o", "made")
    assert code == 1 and len(list(Path("made").glob("*.png"))) == 1
    for part in ("rows.jsonl:2: this is not JSON", "rows.jsonl:3: no prompt", "4: no key 'colour'", "5: no image at"):
        assert part in err
    errors = [json.loads(line) for line in Path("made/errors.jsonl").read_text().splitlines()]
    assert [error["row"] for error in errors] == [f"rows.jsonl:{number}" for number in (2, 3, 4, 5)]


def test_an_image_of_another_request_is_not_taken_for_this_one(run, random_tiny):
    write_rows([ROWS[0] | {"name": "fox"}])
    assert run("generate", "--from", "rows.jsonl", "--steps", "1", "-o", "made")[0] == 0
    before = Path("made/fox.png").read_bytes()
    code, _, err = run("generate", "--from", "rows.jsonl", "--steps", "2", "-o", "made")
    assert code == 1 and "made/fox.png was made by another request" in err
    assert Path("made/fox.png").read_bytes() == before
    write_rows([ROWS[0]])  # without a name, the name is that of the request
    for steps in ("1", "2"):
        assert run("generate", "--from", "rows.jsonl", "--steps", steps, "-o", "made")[0] == 0
    assert len(list(Path("made").glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "name": "../x"}, "name must be that of a file"),
        ({"prompt": "a", "name": ""}, "name must be that of a file"),
        ({"prompt": 3}, "prompt: Input should be a valid string"),
        ({"prompt": "a", "steps": "many"}, "steps: Input should be a valid integer"),
        ({"prompt": "a", "count": 0}, "count is 0; expected 1 to 64"),
        ({"prompt": "a", "style": 3}, "references are strings"),
        ([1], "expected an object"),
    ],
)
def test_a_wrong_row_says_why(tmp_path, row, message):
    write_rows([row], str(tmp_path / "rows.jsonl"))
    rows, problems = read_rows(tmp_path / "rows.jsonl", tmp_path, {"model": "tiny", "references": ()})
    assert rows == [] and message in problems["rows.jsonl:1"]


def test_two_rows_of_one_name_are_told(tmp_path):
    write_rows([{"prompt": "a", "name": "x"}, {"prompt": "b", "name": "x.png"}], str(tmp_path / "rows.jsonl"))
    rows, problems = read_rows(tmp_path / "rows.jsonl", tmp_path, {"model": "tiny"})
    assert [row.name for row in rows] == ["rows.jsonl:1"]
    assert "x.png is the name of rows.jsonl:1 too" in problems["rows.jsonl:2"]


# Grids


def test_compare_varies_strength_and_seed_in_a_grid(run, random_tiny):
    write_picture("ref.png")
    words = ["--columns", "strength=0,1", "--rows", "seed=0,1", "--steps", "1"]
    code, out, err = run("compare", "a rocket", "--style", "ref.png", *words)
    assert (code, out) == (0, "condit-out/compare-a-rocket-0.png\n"), err
    assert load_image(out.strip()).height > 2 * 192


def test_axes_set_what_they_name():
    request = Request("a", references=(Reference("style", "r.png"), Reference("edges", "e.png")))
    strength, adapter, steps = (read_axis(text) for text in ("strength=0,0.5", "adapter=x|y", "steps=2,4"))
    assert [r.strength for r in strength.set(request, 0.5).references] == [0.5, 0.5]
    assert [r.use for r in adapter.set(request, "y").references] == ["y", "edges"]
    assert steps.set(request, 4).steps == 4
    for text in ("colour=1", "seed", "seed=a"):
        with pytest.raises(Exception, match="axis is NAME=VALUE|seed=a"):
            read_axis(text)


# Help


def test_help_groups_the_options(run):
    out = run("generate", "-h")[1]
    headings = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[:2] == ["Arguments", "Options"]
    assert {"Model", "References and adapters", "Sampling", "Start from an image", "Output"} <= set(headings)


def test_a_request_with_every_setting_is_printed_as_it_is_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_picture("r.png")
    reference = Reference("style", "r.png", 0.5, when=(0, 0.5), where=("a.*", "b.*"), mask="r.png", preset="style")
    request = Request("a", references=(reference,), guidance_rescale=0.5, clip_skip=1, image="r.png", change=0.5)
    requests = []
    monkeypatch.setattr("condit.cli.generate.generate_and_save", lambda request, *_, **__: requests.append(request))
    monkeypatch.setattr("condit.cli.generate.report", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        main(shlex.split(request.command("o.png"))[1:])
    assert requests == [request]


def test_a_style_lora_is_loaded_by_its_option(monkeypatch, make_pipe):
    calls = []
    lora = condit.StyleLoRA.__new__(condit.StyleLoRA)
    torch.nn.Module.__init__(lora)
    monkeypatch.setattr(condit.StyleLoRA, "load", lambda path, pipe: calls.append(path) or lora)
    monkeypatch.setattr(condit.StyleLoRA, "control", lambda self, strength, when: (strength, when))
    adapters = Adapters("tiny", make_pipe())
    reference = read_reference("lora", "ink.safetensors:0.7,when=0-0.5")
    assert adapters.controls([reference]) == [(0.7, (0.0, 0.5))] and calls == ["ink.safetensors"]
    with pytest.raises(ValueError, match="takes no mask="):
        adapters.controls([read_reference("lora", "ink.safetensors,mask=m.png")])


@pytest.mark.slow
def test_rows_of_a_process_killed_at_any_moment_end_with_the_files_of_one_that_was_not(tmp_path):
    write_rows([{"prompt": f"a fox {i}", "seed": i} for i in range(6)], str(tmp_path / "rows.jsonl"))
    environment = {**os.environ, "PYTHONPATH": str(Path(condit.__file__).parent.parent)}
    words = ["generate", "--from", "rows.jsonl", "--steps", "2", "-o"]

    def start(folder: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "condit.cli", *words, folder]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)

    assert start("whole").wait(timeout=300) == 0
    for made in range(1, 5):  # killed at some moment after the next image is there
        process = start("killed")
        while len(list((tmp_path / "killed").glob("*.png"))) < made and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.01 * made)
        process.kill()
        process.wait()
    assert start("killed").wait(timeout=300) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
