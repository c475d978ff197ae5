"""The embedded PixArt: a step of training on the committed icons, its export as a model that draws and edits."""

import json
from pathlib import Path

import pytest
import torch

import condit
from condit.backbones.pixart import PRESETS, PixArtConfig
from condit.controls.dit4edit import DiT4Edit
from condit.diffusion.vp import training_pair
from condit.drawing.pipeline import Pipeline
from condit.encoders.vae import encode_latents
from condit.training.loop import Loop, LoopConfig
from condit.weights import catalog
from condit_lab.training.pixart import PROCESS, PixArtTask
from few_icons import few_icons

ICONS = few_icons()
SMALL = PixArtConfig(
    num_attention_heads=2,
    attention_head_dim=64,
    in_channels=32,
    out_channels=32,
    num_layers=1,
    sample_size=16,
    caption_channels=192,
)
TWO_STEPS = LoopConfig(steps=2, batch=4, precision="no", warmup=1, ema=0.5, muon_lr=0.01)


class Stopped(Exception):
    pass


@pytest.fixture
def new_task(random_tiny, monkeypatch):
    """A task without what costs more than a step: figures and sheets."""
    monkeypatch.setitem(PRESETS, "small", SMALL)

    def make(**settings) -> PixArtTask:
        torch.manual_seed(0)
        task = PixArtTask(ICONS, str(random_tiny / "model"), preset="small", **settings)
        monkeypatch.setattr(task, "sheet", lambda: None)
        monkeypatch.setattr(task, "validate", lambda: {})
        return task

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "state.pt", weights_only=True)["parameters"]


def test_a_run_stopped_and_resumed_ends_as_one_that_was_not_and_loads(tmp_path, new_task, monkeypatch):
    Loop(new_task(taught_from=0.5), TWO_STEPS, tmp_path / "whole").run()
    cut = Loop(new_task(taught_from=0.5), TWO_STEPS, tmp_path / "cut")
    step, done = cut.train_step, []

    def one_step(batches):
        if done:
            raise Stopped
        done.append(step(batches))
        return done[0]

    monkeypatch.setattr(cut, "train_step", one_step)
    with pytest.raises(Stopped):
        cut.run()
    cut.save()
    resumed = Loop(new_task(taught_from=0.5), TWO_STEPS, tmp_path / "cut")
    assert resumed.step == 1
    resumed.run()
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == again.keys() and all(name.startswith("transformer.") for name in whole)
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    folder = tmp_path / "whole" / "export"
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["beta_schedule"] == "linear"
    pipe = condit.load(folder)
    assert isinstance(pipe, Pipeline) and pipe.size == (128, 128) and pipe.parts.process == PROCESS
    picture = pipe("a red apple", num_inference_steps=2, seed=0).images[0]
    assert picture.size == (128, 128)
    inversion = pipe.invert(picture, "a red apple", num_inference_steps=2)
    same = pipe.edit(inversion, None, "a red apple", controls=[DiT4Edit()], output_type="latent")
    assert torch.equal(same.images, same.sources)
    # A folder of the catalog is found by its name.
    monkeypatch.setitem(catalog.MODELS, "tiny-pixart", catalog.Entry("model", "random", "none", folder))
    assert condit.load("tiny-pixart").name == "tiny-pixart"
    assert condit.load("tiny-pixart").parts.hash == pipe.parts.hash


def test_the_teacher_changes_the_aim_at_high_noise_and_never_the_input(new_task):
    task = new_task(taught_from=0.5)
    batch = task.data.examples(4)
    x0 = encode_latents(task.vae, batch.images)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 100, 500, 900])
    with torch.no_grad():
        actual, other = task.teacher(x0, noise, t, batch.captions)
    before, after = (training_pair(PROCESS, x, e, t) for x, e in ((x0, noise), (actual, other)))
    assert torch.allclose(before[0], after[0], atol=1e-4)  # x0 moves by some units, and x is their sum with noise
    changed = (before[1] - after[1]).abs().flatten(1).amax(1) > 1e-3
    assert changed.tolist() == [False, False, True, True]


def test_figures_tell_the_error_in_the_flows_units(new_task):
    task = new_task()
    batch = task.data.examples(4)
    x0, words = encode_latents(task.vae, batch.images), task.words(batch.captions)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the head starts at zero: the clean latent found is alpha x
        error = task.error(x0, noise, 0.5, words)
    ratios = (1 / PROCESS.alphas_cumprod - 1).sqrt()
    i = int((ratios >= 1).nonzero()[0])
    a, s = PROCESS.alphas_cumprod[i].sqrt(), (1 - PROCESS.alphas_cumprod[i]).sqrt()
    level = s / (a + s)
    x = (1 - level) * x0 + level * noise
    wanted = ((x - a * (a * x0 + s * noise)) / level - (noise - x0)).square().mean()
    assert error.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_padding_is_masked_for_an_empty_prompt(new_task):
    actual = new_task().words(["a red apple", ""])
    assert actual.mask is not None and actual.mask.sum(1).tolist()[1] == 2  # begin and end
    assert actual.tokens.shape == (2, 24, 192) and actual.pooled.shape == (2, 0)


def test_bad_settings_and_a_missing_part_raise(tmp_path, new_task, monkeypatch):
    with pytest.raises(ValueError, match=r"taught_from must be a noise level from 0 to 1; found 2\."):
        new_task(taught_from=2.0)
    task = new_task()
    task.export(tmp_path, {})
    monkeypatch.delitem(catalog.MODELS, "tiny")
    with pytest.raises(ValueError, match="'tiny', which is not installed"):
        condit.load(tmp_path)
