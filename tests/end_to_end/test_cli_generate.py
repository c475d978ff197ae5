"""`condit generate`, `edit` and `replay` with small random models: images, recipes and errors."""

import errno
import json
import os

import pytest
from PIL import Image

from condit.backbones.diffit import DiffiT, DiffiTConfig
from condit.data.images import load_image, read_recipe, save_image
from condit.weights import catalog
from condit.weights.class_models import write_labels
from condit.weights.diffit import save_diffit


def test_replay_of_an_image_without_a_recipe_is_a_clear_error(run, picture):
    code, _, err = run("replay", str(picture))
    assert code == 1
    assert "has no condit recipe" in err


@pytest.mark.parametrize(("option", "name"), [("--model", "nonsense"), ("--control", "tiny/nonsense=ref.png")])
def test_an_unknown_model_or_adapter_raises_with_the_known_ones(run, random_tiny, picture, option, name):
    code, out, err = run("generate", "a red apple", option, name)
    assert (code, out) == (1, "")
    assert "nonsense" in err
    assert "tiny" in err.replace("tiny/nonsense", "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


def test_the_best_of_several_candidates_are_kept_and_replayed(run, random_tiny):
    code, out, err = run("generate", "red apple", "--candidates", "3", "--best", "2", "--steps", "1", "-o", "a.png")
    assert code == 0, err
    first, second = out.split()
    assert (first, second) == ("a-1.png", "a-2.png")
    indices = [read_recipe(path)["index"] for path in (first, second)]
    assert len(set(indices)) == 2
    assert '"count": 3' in json.dumps(read_recipe(first))
    code, _, err = run("replay", second, "-o", "again.png")
    assert "the image is identical" in err
    code, _, err = run("generate", "red apple", "--candidates", "3", "--best", "4")
    assert code == 2 and "--best 4 with --candidates 3" in err


def test_a_generated_png_is_replayed_bit_for_bit(run, random_tiny, picture):
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
    err = run("replay", "a-4.png", "-o", "again.png", "--force")[2]
    assert "warning: a reference differs from the one it was generated with" in err
    assert "the image differs" in err

    picture.unlink()
    code, _, err = run("replay", "a-4.png")
    assert code == 1
    assert "ref.png of this image is missing" in err


def test_replay_warns_of_other_weights(run, random_tiny, picture):
    assert run("generate", "a", "--style", "ref.png", "--steps", "1", "-o", "a.png")[0] == 0
    recipe = read_recipe("a.png")
    recipe["run"]["controls"][0]["hash"] = "0123"  # pyright: ignore[reportIndexIssue]
    save_image(load_image("a.png"), "a.png", recipe=recipe)
    err = run("replay", "a.png")[2]
    assert "warning: controls.0.hash was 0123, is " in err
    assert "the image is identical" in err


def test_every_control_changes_the_image_and_none_at_strength_0(run, random_tiny, picture):
    def drawn(*words: str) -> bytes:
        code, _, err = run("generate", "a red apple", "--steps", "2", "-o", "a.png", "--force", *words)
        assert code == 0, err
        return load_image("a.png").tobytes()

    plain = drawn()
    assert drawn() == plain
    results = {drawn(f"--{use}", "ref.png") for use in ("style", "subject", "edges", "gray", "edges-map")}
    assert len(results | {plain}) == 6
    assert drawn("--style", "ref.png:0", "--edges", "ref.png", "--strength", "0") == plain


def test_all_style_references_make_one_control(run, random_tiny, picture):
    save_image(Image.new("RGB", (64, 64), "blue"), "other.png")
    words = ["--style", "ref.png", "--style", "other.png", "--style", "other.png:0.5", "--subject", "ref.png"]
    code, _, err = run("generate", "a", *words, "--steps", "1", "-o", "a.png")
    assert code == 0, err
    controls = read_recipe("a.png")["run"]["controls"]  # pyright: ignore[reportIndexIssue]
    assert [len(control["reference"]) for control in controls] == [2, 1, 1]


def test_an_adapter_may_be_a_file_or_a_folder(run, random_tiny, picture):
    for path in (random_tiny / "style", random_tiny / "edges" / "adapter.safetensors"):
        code, _, err = run("generate", "a", "--control", f"{path}=ref.png", "--steps", "1", "-o", "a.png", "--force")
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


def test_a_full_disk_while_saving_is_a_clear_error_and_keeps_the_old_image(run, random_tiny, picture, monkeypatch):
    before = picture.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run("generate", "a red apple", "--steps", "1", "-o", "ref.png", "--force")
    assert (code, out) == (1, "")
    assert "error: no space left while writing" in err
    assert picture.read_bytes() == before


def test_a_model_with_one_sampler_takes_no_other(run):
    code, _, errors = run("generate", "a red apple", "--sampler", "ddim")
    assert code == 1 and "has one sampler only" in errors


def test_a_class_model_generates_a_class_by_name_and_takes_nothing_else(run, picture, tmp_path, monkeypatch):
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
        "uses an adapter that belongs to the model, and two has none": ("--style", str(picture)),
        "takes no negative": ("--negative", "x"),
    }
    for why, more in refused.items():
        code, _, err = run("generate", "twemoji", "-m", "two", *more)
        assert code == 1 and why in err
    assert "mozilla" in run("generate", "mozilla", "-m", "two")[2]


# Editing


def test_edit_writes_the_image_its_recipe_and_a_page(run, picture, tmp_path):
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
def test_a_wrong_edit_raises_before_anything_is_loaded(run, picture, arguments, message):
    code, _, err = run("edit", str(picture), "a red apple", "a green apple", *arguments)
    assert code == 2 and message in " ".join(err.split())


def test_an_edit_of_a_size_that_the_model_does_not_support_raises(run, picture):
    code, _, err = run("edit", str(picture), "a red apple", "a green apple", "--height", "256", "--width", "128")
    assert code == 1 and "tiny generates 128 x 128; found 256 x 128" in err


def test_a_missing_image_to_edit_raises(run):
    code, _, err = run("edit", "nowhere.png", "a cat", "a dog")
    assert code == 1 and "nowhere.png" in err
