"""Training of DEADiff on a random Stable Diffusion: the three tasks, what learns, exact resume, what is exported."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from condit.controls.deadiff import DEADiff
from condit.diffusion.vp import Process
from condit.training import deadiff
from condit.training.deadiff import DEADiffData, DEADiffTask
from condit.training.loop import Loop, LoopConfig
from condit.training.paired import Paired
from condit.training.run import tasks
from condit.weights.deadiff import to_published
from few_icons import few_icons

WIDTH = 12
QFORMER = {"queries": 3, "layers": 2, "heads": 2, "hidden": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight pictures, each of its own colour, in two styles of four subjects, in groups."""
    path, rows, rng = tmp_path_factory.mktemp("pairs"), [], np.random.default_rng(0)
    for i in range(8):
        colour = np.array([i & 4, (i & 2) * 2, (i & 1) * 4]) * 40 + 40
        picture = (colour + rng.integers(-40, 40, (20, 24, 3))).astype(np.uint8)
        Image.fromarray(picture).save(path / f"{i}.png")
        groups = {"style_group": f"s{i % 2}", "content_group": f"c{i // 2}"}
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"t{i}", **groups}))
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


@pytest.fixture
def make_task(monkeypatch, folder, make_latent, make_tower):
    def make(prediction: str = "epsilon", **how) -> DEADiffTask:
        parts = replace(make_latent().parts, process=Process(prediction_type=prediction))  # type: ignore[arg-type]
        monkeypatch.setattr(deadiff, "load_base", lambda *_: parts)
        monkeypatch.setattr(deadiff, "image_tower", lambda *_: make_tower())
        torch.manual_seed(0)
        return DEADiffTask(DEADiffData(**{"model": "base", "pairs": str(folder), "qformer": QFORMER, **how}))

    return make


def step(task: DEADiffTask, kind, seed: int = 0) -> tuple[Tensor, dict[str, float]]:
    batch = task.source.batch(random.Random(seed), kind, 4)
    return task(batch, torch.Generator().manual_seed(seed))


def test_a_recipe_finds_the_task():
    assert tasks()["deadiff"] is DEADiffTask


def test_batches_are_of_one_kind_and_the_kinds_come_equally_often(make_task):
    class Empty:
        def batch(self, rng, kind, size):
            return Paired(kind, torch.empty(0), torch.empty(0), [])

    task, rng = make_task(), random.Random(0)
    task.source = Empty()
    kinds = [task.batch(rng, 1).kind for _ in range(300)]
    assert all(70 < kinds.count(kind) < 130 for kind in ("style", "content", "reconstruction"))
    assert {make_task(shares=[0, 2, 0]).batch(rng, 1).kind for _ in range(9)} == {"content"}


def test_only_reconstruction_has_the_reference_as_its_target_and_no_words(make_task):
    task, rng = make_task(), random.Random(0)
    for _ in range(30):
        batch = task.batch(rng, 2)
        apart = (batch.images.mean((2, 3)) - batch.references.mean((2, 3))).abs().amax(1)  # of colours
        assert bool((apart < 0.2).all()) == (batch.kind == "reconstruction")
        assert all(caption == "" for caption in batch.captions) == (batch.kind == "reconstruction")


def test_captions_may_be_left_out_for_guidance(make_task):
    batch = make_task(caption_drop=1.0, shares=[1, 0, 0]).batch(random.Random(0), 4)
    assert batch.captions == [""] * 4


TRAINED = {
    "style": {"style", "style maps"},
    "content": {"content", "content maps"},
    "reconstruction": {"style", "content", "style maps", "content maps"},
}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_step_reaches_what_its_task_shows_and_nothing_else(make_task, kind):
    task = make_task(drop=[0, 0, 0])
    loss, logs = step(task, kind)
    loss.backward()
    table = task.adapter.reference({"style": torch.zeros(1, 3, WIDTH)}).table
    reached = set()
    for name, p in task.named_parameters():
        if p.grad is None or not p.grad.any():
            continue
        assert name.startswith("adapter.") and "ln_vision" not in name
        part = name.removeprefix("adapter.")
        path = part.removeprefix("unet.").rpartition(".image_")[0]
        reached.add(f"{table[path]} maps" if part.startswith("unet.") else part.split(".")[0])
    assert reached == TRAINED[kind]
    assert logs == {f"loss_{kind}": pytest.approx(float(loss.detach()))}


def test_everything_that_the_released_optimiser_has_learns_here(make_task):
    """But the MLM head and, in the last layer, the feed-forward of the word: nothing reads them."""
    task = make_task(drop=[0, 0, 0])
    step(task, "reconstruction")[0].backward()
    idle = {n for n, p in task.adapter.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    last = ("layer.1.intermediate.dense", "layer.1.output.dense", "layer.1.output.LayerNorm")
    assert all(any(part in name for part in last) for name in idle)
    frozen = {name for name, p in task.adapter.named_parameters() if not p.requires_grad}
    assert frozen == {f"{b}.ln_vision.{part}" for b in ("style", "content") for part in ("weight", "bias")}
    assert all(to_published(name) is not None for name, _ in task.adapter.named_parameters())


def test_dropped_samples_have_zero_tokens(make_task):
    """All dropped: the loss is that of zero tokens, and no Q-Former learns."""
    task = make_task(drop=[1, 1, 1])
    dropped = step(task, "style")[0]
    dropped.backward()
    assert all(p.grad is None or not p.grad.any() for p in task.adapter.style.parameters())
    batch, g = task.source.batch(random.Random(0), "style", 4), torch.Generator().manual_seed(0)
    x0, text, _ = task.encoded(batch, g)
    t, noise = torch.randint(1000, (4,), generator=g), torch.randn(x0.shape, generator=g)
    zeros = {"style": torch.zeros(1, 3, WIDTH)}
    torch.testing.assert_close(dropped, task.errors(x0, noise, t, text, zeros).mean(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_plain_error_of_what_the_base_predicts(make_task, prediction):
    task = make_task(prediction)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    t, text = torch.tensor([100, 900]), task.text(["a", "b"])
    tokens = {"style": torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        actual = task.errors(x0, noise, t, text, tokens)
        for i in range(2):
            a = float(task.process.alphas_cumprod[t[i]])
            x_t = a**0.5 * x0[i] + (1 - a) ** 0.5 * noise[i]
            target = noise[i] if prediction == "epsilon" else a**0.5 * noise[i] - (1 - a) ** 0.5 * x0[i]
            control = task.control({"style": tokens["style"][i : i + 1]}, x0[:1])
            out = task.unet(x_t[None], t[i : i + 1], text.tokens[i : i + 1], controls=[control])
            torch.testing.assert_close(actual[i], (out[0] - target).square().mean(), rtol=1e-5, atol=0)


def test_dropout_draws_from_the_batchs_generator_and_leaves_the_global_one_alone(make_task):
    task = make_task().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (float(step(task, "style", seed)[0].detach()) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other
    task.eval()
    assert float(step(task, "style", 0)[0].detach()) != first


CONFIG = {"steps": 4, "batch": 2, "lr": 1e-2, "precision": "no", "warmup": 1, "decay": False, "save_minutes": 0.0}


def run(task: DEADiffTask, out: Path, **how) -> dict[str, Tensor]:
    Loop(task, LoopConfig(**{**CONFIG, **how}), out).run()
    return {name: p.detach().clone() for name, p in task.adapter.named_parameters()}


def test_a_run_that_stops_continues_bit_by_bit_and_exports_what_load_reads(
    make_task, make_latent, make_tower, tmp_path
):
    whole = run(make_task(), tmp_path / "whole")
    run(make_task(), tmp_path / "parts", steps=2)
    parts = run(make_task(), tmp_path / "parts")
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    start = dict(make_task().adapter.named_parameters())
    assert not torch.equal(whole["style.query_tokens"], start["style.query_tokens"])

    pipe = make_latent()
    loaded = DEADiff.load(tmp_path / "whole" / "export", pipe, image_encoder=make_tower())
    picture = np.zeros((16, 16, 3), np.uint8)
    drawn = pipe("t1", controls=[loaded.control(picture)], seed=0, output_type="latent", num_inference_steps=2).images
    assert drawn.shape == (1, 4, 8, 12)
    card = json.loads((tmp_path / "whole" / "export" / "card.json").read_text())
    assert card["steps"] == 4 and card["base"] == "0" * 16 and card["method"] == "DEADiff"


def test_training_goes_on_from_an_export(make_task, tmp_path):
    first = make_task()
    first.export(tmp_path, {})
    second = make_task(init=str(tmp_path))
    for name, p in second.adapter.named_parameters():
        torch.testing.assert_close(
            p, first.adapter.get_parameter(name), rtol=1e-3, atol=1e-4
        )  # stored in half precision
    with pytest.raises(ValueError, match="content_layers"):
        make_task(init=str(tmp_path), content_layers=[0])


def test_the_q_formers_may_start_from_blip_diffusions_release(make_task, tmp_path):
    task = make_task(qformer={**QFORMER, "vocabulary": 30523, "positions": 4})
    reader = {}
    for name, value in task.adapter.style.state_dict().items():
        if not name.startswith("proj."):
            old = (to_published(f"style.{name}") or "").removeprefix("style_blip.").replace("Qformer.", "text_model.")
            reader[old] = torch.randn(value.shape)
    projection = {n: torch.randn(v.shape) for n, v in task.adapter.style.proj.state_dict().items()}
    for part, tensors in (("blip_model/blip_weight.pt", reader), ("proj_layer/proj_weight.pt", projection)):
        (tmp_path / part).parent.mkdir()
        torch.save(
            {**tensors, "text_model.cls.predictions.bias": torch.zeros(3)} if "blip" in part else tensors,
            tmp_path / part,
        )
    deadiff.load_blip(task.adapter, tmp_path)
    for b in (task.adapter.style, task.adapter.content):
        assert torch.equal(b.query_tokens, reader["query_tokens"])
        assert torch.equal(b.proj.dense1.weight, projection["dense1.weight"])
        assert torch.equal(b.ln_vision.bias, reader["ln_vision.bias"])


def test_figures_and_sheet_of_held_out_pairs(make_task, folder):
    task = make_task(held_out=str(folder)).eval()
    task.examples_count, task.steps = (4, 2), 2
    figures = task.validate()
    assert {name.split("_")[0] for name in figures} == {"style", "content", "reconstruction"}
    assert all(np.isfinite(value) for value in figures.values())
    assert task.sheet().size[0] > 0  # type: ignore[union-attr]
    assert make_task().validate() == {} and make_task().sheet() is None


def test_the_icon_world_is_a_source(make_task):
    task = make_task(pairs=None, icons=few_icons())
    batch: Paired = task.batch(random.Random(0), 2)
    assert batch.images.shape == (2, 3, 32, 48) and batch.references.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"shares": [1, 1]}, "shares must be three numbers"),
        ({"shares": [0, 0, 0]}, "not all 0"),
        ({"drop": [0.1, 0.1, 2]}, r"drop\.2\n.*less than or equal to 1"),
        ({"drop": [float("nan"), 0, 0]}, r"drop\.0\n.*finite number"),
        ({"caption_drop": -0.1}, "caption_drop"),
        ({"plain_pixels": "no"}, r"plain_pixels\n.*valid boolean"),
        ({"shares": [1, -1, 1]}, r"shares\.1\n"),
        ({"colour": 1}, "colour"),
        ({"pairs": None}, "either icons .* or pairs"),
        ({"icons": "icons"}, "either icons .* or pairs"),
        ({"content_layers": [99]}, "content_layers has 99"),
        ({"qformer": {"width": 8}}, "tokens have width 8"),
    ],
)
def test_an_impossible_recipe_raises_with_the_reason(make_task, how, message):
    with pytest.raises(ValueError, match=message):
        make_task(**how)


def test_a_folder_without_pairs_of_a_wanted_kind_raises(make_task, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "style_group": "s", "content_group": "c"}\n')
    with pytest.raises(ValueError, match="no style pair"):
        make_task(pairs=str(tmp_path))
    assert make_task(pairs=str(tmp_path), shares=[0, 0, 1]).batch(random.Random(0), 1).kind == "reconstruction"


def test_the_image_tower_comes_from_a_folder_of_clip_without_its_last_block(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    whole = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval()
    whole.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tower = deadiff.image_tower(str(tmp_path), False)
    with torch.no_grad():
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tower.tokens(pixels), expected, rtol=0, atol=1e-6)
    plain = deadiff.image_tower(str(tmp_path), True)
    torch.testing.assert_close(plain.prepare(pixels), pixels, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="tower must name the folder of a CLIP"):
        deadiff.image_tower(None, False)
