"""Training of IP-Adapter on a random Stable Diffusion: what learns, what is dropped, exact resume, what is exported."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from condit.controls.ip_adapter import IPAdapter
from condit.encoders.image import CLIPImage
from condit.training import ip_adapter
from condit.training.denoising import errors, latents_of
from condit.training.ip_adapter import IPAdapterData, IPAdapterTask
from condit.training.loop import Loop, LoopConfig
from condit.training.run import tasks
from few_icons import few_icons

ICONS = few_icons()
CONFIG = {"steps": 4, "batch": 3, "lr": 1e-2, "precision": "no", "warmup": 1, "decay": False, "save_minutes": 0.0}


@pytest.fixture
def make_task(monkeypatch, make_latent):
    def make(kind: str = "sdxl", **how) -> IPAdapterTask:
        monkeypatch.setattr(ip_adapter, "load_base", lambda *_: make_latent(kind).parts)
        torch.manual_seed(0)
        return IPAdapterTask(IPAdapterData(**{"model": "base", "icons": ICONS, **how}))

    return make


@pytest.fixture(scope="module")
def clip() -> CLIPImage:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=6)
    return CLIPImage(CLIPVisionModelWithProjection(config).eval())


def trained(task: IPAdapterTask) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in task.named_parameters() if p.requires_grad}


def run(task: IPAdapterTask, out: Path, monkeypatch, **how) -> dict[str, Tensor]:
    for name, nothing in (("sheet", None), ("validate", {})):
        monkeypatch.setattr(task, name, lambda nothing=nothing: nothing)
    Loop(task, LoopConfig(**{**CONFIG, **how}), out).run()
    return trained(task)


def test_projector_and_image_maps_learn_and_nothing_else(make_task):
    task = make_task()
    task(task.batch(random.Random(0), 4), torch.Generator().manual_seed(0))[0].backward()
    learns = {n for n, p in task.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == set(trained(task)) == {n for n, _ in task.named_parameters() if n.startswith("ip.")}


def test_image_maps_start_as_the_texts(make_task):
    task = make_task()
    for layer, pair in zip(task.ip.layers, task.ip.ip_adapter.values(), strict=True):
        attention = task.unet.get_submodule(layer.path)
        assert torch.equal(pair.to_k_ip.weight, attention.to_k.weight)  # type: ignore[union-attr]
        assert torch.equal(pair.to_v_ip.weight, attention.to_v.weight)  # type: ignore[union-attr]


def test_where_trains_these_layers_alone(make_task):
    task = make_task(where="mid_block.*")
    assert task.ip.sites and all(path.startswith("mid_block.") for path in task.ip.sites)
    assert len(make_task().ip.sites) > len(task.ip.sites)


def test_rows_lose_the_reference_the_words_or_both_as_often_as_published(make_task):
    task, rng, seen = make_task(), random.Random(0), []
    task.source = type("Plain", (), {"batch": lambda self, rng, kind, size: plain(kind, size)})()
    for _ in range(40):
        batch = task.batch(rng, 100)
        seen += [(bool(k), bool(c)) for k, c in zip(batch.kept, batch.pairs.captions, strict=True)]
    for lost in ((False, True), (True, False), (False, False)):
        assert 0.04 < seen.count(lost) / len(seen) < 0.06
    assert all(task_kind == "reconstruction" for task_kind in task.kinds)


def plain(kind, size):
    return ip_adapter.Paired(kind, torch.empty(0), torch.empty(0), ["a"] * size)


def test_a_lost_reference_is_zeros_and_the_loss_the_plain_error(make_task):
    task = make_task(drop=[1, 0, 0])
    batch = task.batch(random.Random(0), 3)
    loss = task(batch, torch.Generator().manual_seed(0))[0]
    g = torch.Generator().manual_seed(0)
    x0, text = latents_of(task.vae, batch.pairs.images, g), task.text(batch.pairs.captions)
    t, noise = torch.randint(1000, (3,), generator=g), torch.randn(x0.shape, generator=g)
    none = task.ip.reference(torch.zeros(3, 12))
    torch.testing.assert_close(loss, errors(task.parts, x0, noise, t, text, [none]).mean(), rtol=0, atol=1e-6)


def test_noise_offset_moves_the_mean_of_each_channel(make_task):
    losses = []
    for offset in (0.0, 0.5):
        task = make_task(noise_offset=offset)
        loss, _ = task(task.batch(random.Random(0), 3), torch.Generator().manual_seed(0))
        losses.append(float(loss.detach()))
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("projector", ["global", "plus"])
def test_a_clip_from_a_folder_is_read_as_published(make_task, monkeypatch, clip, projector):
    monkeypatch.setattr(ip_adapter, "load_image_encoder", lambda folder: clip)
    task = make_task(image_encoder="folder", projector=projector)
    pictures, kept = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([1.0, 0.0])
    actual = task.features(pictures, kept)
    numbers = ((pictures[0].movedim(0, -1) + 1) * 127.5).round().to(torch.uint8).numpy()
    pixels = clip.pixels([ip_adapter.Image.fromarray(numbers)])
    read, none = (clip.embeds, torch.zeros(1, 6)) if projector == "global" else (clip.hidden, clip.hidden(clip.zeros()))
    torch.testing.assert_close(actual[:1], read(pixels), rtol=0, atol=0.05)  # 8 bits a colour
    torch.testing.assert_close(actual[1:], none, rtol=0, atol=1e-6)
    assert task.ip.tokens(actual).shape == (2, 4 if projector == "global" else 16, 12)
    task(task.batch(random.Random(0), 2), torch.Generator().manual_seed(0))[0].backward()


def test_a_run_that_stops_continues_bit_by_bit_and_exports_what_load_reads(
    make_task, make_latent, monkeypatch, tmp_path
):
    whole = run(make_task(), tmp_path / "whole", monkeypatch)
    run(make_task(), tmp_path / "parts", monkeypatch, steps=2)
    parts = run(make_task(), tmp_path / "parts", monkeypatch)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert not torch.equal(whole["ip.image_proj.proj.weight"], trained(make_task())["ip.image_proj.proj.weight"])

    pipe, folder = make_latent("sdxl"), tmp_path / "whole" / "export"
    adapter = IPAdapter.load(folder, pipe)
    picture = np.full((16, 16, 3), 200, np.uint8)
    how: dict[str, Any] = {"seed": 0, "output_type": "latent", "num_inference_steps": 2}
    drawn = pipe("a", controls=[adapter.control(picture)], **how).images
    assert not torch.equal(drawn, pipe("a", **how).images)
    card = json.loads((folder / "card.json").read_text())
    assert card["steps"] == 4 and card["base"] == "0" * 16 and card["method"] == "IPAdapter"
    goes_on = trained(make_task(init=str(folder)))
    for name, value in whole.items():  # stored in half precision, averaged
        torch.testing.assert_close(goes_on[name], value, rtol=0, atol=0.05)


def test_figures_and_sheet_of_held_out_pairs(make_task):
    task = make_task(shares=[1, 0, 1]).eval()
    task.examples_count = (4, 2)
    figures = task.validate()
    assert {name.split("_")[0] for name in figures} == {"style", "reconstruction"}
    assert all(np.isfinite(value) for value in figures.values())
    assert task.sheet().size[0] > 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"shares": [0, 0, 0]}, "not all 0"),
        ({"drop": [0.5, 0.5, 0.5]}, "sum to 1 at most"),
        ({"projector": "full"}, r"projector\n.*'global', 'plus' or 'face'"),
        ({"noise_offset": float("nan")}, r"noise_offset\n.*finite number"),
        ({"drop": [-0.1, 0, 0]}, r"drop\.0\n"),
        ({"tokens": 0}, "tokens"),
        ({"projector": "plus"}, "image_encoder must name"),
        ({"icons": None}, "either icons .* or pairs"),
    ],
)
def test_an_impossible_recipe_raises_with_the_reason(make_task, how, message):
    with pytest.raises(ValueError, match=message):
        make_task(**how)


def test_a_recipe_finds_the_task():
    assert tasks()["ip-adapter"] is IPAdapterTask
