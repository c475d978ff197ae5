"""examples/: controls and methods in one file, on every backbone they name, from Python and from the command line."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import condit
from condit.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def reference() -> Image.Image:
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[32:96, 32:96] = (250, 40, 40)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=["tiny", "tiny-unet", "tiny-pixart"])
def pipe(request) -> condit.Pipeline:
    return condit.load(request.param)


def draw(pipe: condit.Pipeline, controls: Sequence[condit.Control] = (), prompt: str | list[str] = "a red apple"):
    return pipe(prompt, controls=controls, seed=0, num_inference_steps=3, output_type="latent").images


def test_reference_only_acts_on_every_backbone_and_keeps_the_laws(pipe, reference):
    make = module("reference_only").ReferenceOnly
    plain, acted = draw(pipe), draw(pipe, [make(reference)])
    assert not torch.equal(plain, acted) and torch.isfinite(acted).all()
    assert torch.equal(draw(pipe, [make(reference, strength=0.0)]), plain)
    assert torch.equal(draw(pipe), plain)  # absent after a call with it
    weak, strong = (float((draw(pipe, [make(reference, strength=s)]) - plain).norm()) for s in (1e-4, 1.0))
    assert weak < 0.05 * strong
    half = condit.When(0.0, 0.4)
    assert not torch.equal(draw(pipe, [make(reference, when=half)]), acted)


def test_n_references_serve_n_prompts(pipe, reference):
    make = module("reference_only").ReferenceOnly
    white = Image.new("RGB", (128, 128), "white")
    both = draw(pipe, [make([reference, white])], ["a red apple", "a house"])
    torch.testing.assert_close(both[:1], draw(pipe, [make(reference)]), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        both[1:],
        pipe("a house", controls=[make(white)], seed=1, num_inference_steps=3, output_type="latent").images,
        rtol=0,
        atol=1e-3,
    )


def test_reference_only_runs_from_the_command_line_and_its_recipe_needs_the_file_named_again(
    tmp_path, reference, capsys
):
    reference.save(tmp_path / "ref.png")
    out, name = tmp_path / "out.png", f"{EXAMPLES / 'reference_only.py'}:ReferenceOnly"
    arguments = ["generate", "a house", "--steps", "2", "-o", str(out)]
    for more in ([], ["--control", f"{name}={tmp_path / 'ref.png'}:0.8"]):
        with pytest.raises(SystemExit) as done:
            main([*arguments, *more])
        assert done.value.code == 0
        arguments.append("--force")
        if not more:
            plain = Image.open(out).tobytes()
    assert Image.open(out).tobytes() != plain
    with pytest.raises(SystemExit) as done:
        main(["replay", str(out)])
    assert done.value.code == 1 and "condit runs only files that you name" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["replay", str(out), "--control", name])
    assert done.value.code == 0 and "the image is identical" in capsys.readouterr().err


def test_flowedit_changes_what_the_words_change_and_nothing_else(reference):
    pipe, method = condit.load("tiny"), module("flowedit").FlowEdit
    how = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 2.0}
    same = pipe.edit(reference, "a red apple", "a red apple", method=method(), **how)
    assert torch.equal(same.images, same.sources) and same.inversion is None and same.psnr == []
    changed = pipe.edit(reference, "a red apple", "a green pear", method=method(), **how)
    assert not torch.equal(changed.images, changed.sources)
    again = pipe.edit(reference, "a red apple", "a green pear", method=method(), **how)
    assert torch.equal(changed.images, again.images)
    other = pipe.edit(reference, "a red apple", "a green pear", method=method(average=2, end=0.25), seed=3, **how)
    assert not torch.equal(changed.images, other.images)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    kept = pipe.edit(reference, "a red apple", "a green pear", method=method(), mask=mask, **how)
    right = (torch.arange(64) % 8) >= 4
    assert torch.equal(kept.images[:, right], kept.sources[:, right])
    assert not torch.equal(kept.images[:, ~right], kept.sources[:, ~right])


def test_flowedit_on_noise_is_refused_and_runs_from_the_command_line(tmp_path, reference):
    with pytest.raises(ValueError, match="paths are flows"):
        condit.load("tiny-pixart").edit(reference, "an apple", "a pear", method=module("flowedit").FlowEdit())
    reference.save(tmp_path / "apple.png")
    out, page = tmp_path / "out.png", tmp_path / "page.png"
    given = [str(tmp_path / "apple.png"), "a red apple", "a green apple", "--type", "none", "--steps", "3"]
    with pytest.raises(SystemExit) as done:
        main(["edit", *given, "--method", f"{EXAMPLES / 'flowedit.py'}:FlowEdit", "-o", str(out), "--page", str(page)])
    assert done.value.code == 0 and out.is_file() and page.is_file()


def test_a_file_without_the_name_or_without_a_control_is_refused(tmp_path):
    from condit.cli.own import load_own

    (tmp_path / "empty.py").write_text("ready = 1\n")
    with pytest.raises(ValueError, match="defines no class or function 'Missing'"):
        load_own(f"{tmp_path / 'empty.py'}:Missing")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_own(f"{tmp_path / 'absent.py'}:Missing")
