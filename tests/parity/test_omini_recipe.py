"""A recipe of the task "omini": its adapters, log, resume and errors."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import condit
from condit.data.pairs import fingerprint
from condit.training.loop import Loop, LoopConfig
from condit.training.omini import OminiTask
from condit.training.omini_data import ConditionSpec, OminiData
from condit.training.run import train
from omini_pairs import GRAY, SUBJECT, make, shake, write_flux, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return str(write_pairs(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def flux(tmp_path_factory, make_flux) -> str:
    return write_flux(make_flux, tmp_path_factory.mktemp("flux") / "model")


def write_recipe(path: Path, flux: str, pairs: str, *, data: str = "", steps: int = 4, more: str = "") -> Path:
    path.write_text(
        f"""task = "omini"
[data]
model = "{flux}"
pairs = "{pairs}"
height = 16
width = 24
text_tokens = 8
held_out = 2
draw = 1
draw_steps = 1
dtype = "float32"
{data}
[[data.conditions]]
role = "target"
annotator = "canny"
adapter = "edges"
[[data.conditions]]
role = "subject"
delta = "left"
adapter = "subject"
[train]
steps = {steps}
batch = 2
precision = "no"
warmup = 1
{more}
"""
    )
    return path


@pytest.fixture(scope="module")
def trained(flux, pairs, tmp_path_factory) -> Path:
    """Four steps with Prodigy."""
    out = tmp_path_factory.mktemp("run")
    recipe = write_recipe(out / "r.toml", flux, pairs, more='optimizer = "prodigy"\nlr = 1.0\nlog_every = 1')
    train(recipe, out=out / "run")
    return out


def test_a_recipe_trains_adapters_of_their_own_that_the_pipeline_loads(trained, flux):
    pipe = condit.load(flux, dtype=torch.float32)
    picture = Image.open(Path(trained) / "run" / next(p.name for p in (trained / "run").glob("sheet-*.png")))
    assert picture.size[0] > 24
    for name, delta in (("edges", (0, 0)), ("subject", "left")):
        adapter = condit.OminiControl.load(trained / "run" / "export" / name, pipe)
        assert adapter.config.delta == delta and adapter.config.rank == 4
        picture = Image.new("RGB", (24, 16))
        result = pipe("snow", controls=[adapter.control(picture)], height=16, width=24, num_inference_steps=1, seed=0)
        assert result.images[0].size == (24, 16)
    moved = condit.OminiControl.load(trained / "run" / "export" / "edges", pipe)
    assert any(bool(b.any()) for b in moved.lora.b.values())


def test_the_log_says_whether_the_condition_is_used_and_followed(trained):
    lines = [json.loads(line) for line in (trained / "run" / "log.jsonl").read_text().splitlines()]
    validation = next(line["validation"] for line in lines if "validation" in line)
    levels = (0.5, 0.7, 0.9)
    wanted = {f"{what}_{t}" for what in ("error", "wrong_reference", "no_reference") for t in levels}
    assert set(validation) == wanted | {"follow_canny_f1"} and 0 <= validation["follow_canny_f1"] <= 1


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(flux, pairs, tmp_path, optimizer):
    """In one process: the loop's own test kills one."""
    config = LoopConfig(
        steps=4,
        batch=2,
        precision="no",
        warmup=1,
        ema=0.9,
        optimizer=optimizer,
        lr=1.0 if optimizer == "prodigy" else 1e-2,
    )

    def task() -> OminiTask:
        return make(flux, pairs, SUBJECT, GRAY, held_out=1)

    whole = Loop(task(), config, tmp_path / "whole")
    whole.run()
    cut = Loop(task(), config, tmp_path / "cut")
    for step in range(2):
        cut.train_step(cut.make_batch(step))
        cut.step += 1
    cut.save()
    again = Loop(task(), config, tmp_path / "cut")
    assert again.step == 2
    again.run()
    assert whole.parameters.keys() == again.parameters.keys()
    assert all(torch.equal(p, again.parameters[n]) for n, p in whole.parameters.items())


def test_float32_adapters_train_over_a_base_of_bfloat16_and_of_float8(flux, pairs, tmp_path):
    for how in ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantize": "float8"}):
        task = make(flux, pairs, **how).train()
        assert all(p.dtype == torch.float32 for p in task.model.adapters.parameters())
        loop = Loop(task, LoopConfig(steps=1, batch=2, precision="no", warmup=1, lr=1e-2), tmp_path / str(len(how)))
        before = {n: p.detach().clone() for n, p in loop.parameters.items()}
        loss, _ = loop.train_step(loop.make_batch(0))
        assert np.isfinite(loss) and any(not torch.equal(p, before[n]) for n, p in loop.parameters.items())


def test_checkpointing_changes_no_gradient(flux, pairs):
    results = []
    for checkpointing in (True, False):
        task = shake(make(flux, pairs, checkpointing=checkpointing)).train()
        task(task.batch(random.Random(0), 2), torch.Generator().manual_seed(0))[0].backward()
        results.append([p.grad for p in task.model.adapters.parameters() if p.grad is not None])
    assert results[0] and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_conditions_share_an_adapter_or_have_their_own(flux, pairs):
    shared = make(flux, pairs, SUBJECT, GRAY)
    own = make(flux, pairs, SUBJECT, {**GRAY, "adapter": "gray"})
    assert list(shared.model.adapters) == ["omini"] and list(own.model.adapters) == ["omini", "gray"]
    counts = [sum(p.numel() for p in t.parameters() if p.requires_grad) for t in (shared, own)]
    assert counts[1] == 2 * counts[0]


def test_only_adapters_are_trained_and_nothing_drops_out(flux, pairs):
    task = make(flux, pairs).train()
    assert {n.split(".")[0] for n, p in task.named_parameters() if p.requires_grad} == {"model"}
    assert all("adapters" in n for n, p in task.named_parameters() if p.requires_grad)
    assert task.text is not None and not task.text.training and not task.vae.training and task.model.adapters.training


def test_another_metadata_file_is_another_cache(pairs, tmp_path):
    other = write_pairs(tmp_path, count=5)
    assert fingerprint(pairs) != fingerprint(other) and fingerprint(pairs) == fingerprint(Path(pairs))


# Errors


@pytest.mark.parametrize(
    ("conditions", "how", "message"),
    [
        ([{"role": "style"}], {}, "needs references of that role; the first pair has subject"),
        ([{"role": "subject", "annotator": "nothing"}], {}, "no annotator 'nothing'"),
        ([{"role": "subject", "size": [8, 12]}], {}, "lies on the target .delta 0., but 8 x 12 times scale 1.0"),
        ([GRAY], {"integrate": True}, "integrate needs exactly one condition"),
        ([SUBJECT], {"height": 18}, "sizes must be multiples of 4; found 18 x 24"),
    ],
)
def test_what_cannot_be_trained_raises_before_training(flux, pairs, conditions, how, message):
    with pytest.raises(ValueError, match=message):
        make(flux, pairs, *conditions, **how)


@pytest.mark.parametrize(
    ("condition", "how", "field"),
    [
        ({}, {"held_out": -3}, "held_out"),
        ({}, {"independent": "no"}, "independent"),
        ({}, {"integrate": 1}, "integrate"),
        ({}, {"text_dropout": 2}, "text_dropout"),
        ({}, {"image_dropout": float("nan")}, "image_dropout"),
        ({}, {"rank": 10_000_000}, "rank"),
        ({}, {"rank": 0}, "rank"),
        ({}, {"dtype": "float64"}, "dtype"),
        ({}, {"height": 0}, "height"),
        ({"delta": [0, 99_999_999]}, {}, r"conditions\.0\.delta"),
        ({"delta": [0, float("inf")]}, {}, r"conditions\.0\.delta"),
        ({"delta": "up"}, {}, r"conditions\.0\.delta"),
        ({"scale": 0}, {}, r"conditions\.0\.scale"),
        ({"adapter": "/elsewhere/x"}, {}, r"conditions\.0\.adapter"),
        ({"adapter": ".."}, {}, r"conditions\.0\.adapter"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_named_before_anything_is_loaded(condition, how, field):
    with pytest.raises(ValueError, match=f"(?m)^{field}"):
        make("nowhere", "nothing", {"role": "subject", **condition}, **how)


def test_numbers_of_a_condition_stay_as_the_recipe_writes_them():
    spec = ConditionSpec(role="subject", delta=(0, -6), scale=2)
    assert json.dumps(spec.model_dump()) == (
        '{"role": "subject", "annotator": null, "delta": [0, -6], "scale": 2, "size": null, "adapter": "omini"}'
    )


def test_no_conditions_another_model_and_an_unknown_field_raise(flux, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"\[\[data.conditions\]\]"):
        OminiData(model=flux, pairs=pairs, conditions=())
    with pytest.raises(ValueError, match="trains on FLUX.1; tiny is another model"):
        make("tiny", pairs)
    with pytest.raises(ValueError, match=r"conditions\.0\.colour"):
        make(flux, pairs, {"role": "subject", "colour": 1})
    recipe = write_recipe(tmp_path / "r.toml", flux, pairs, data='colour = "red"')
    with pytest.raises(ValueError, match="does not fit task 'omini'.*colour"):
        train(recipe, out=tmp_path / "run")
    assert ConditionSpec(role="a", size=(8, 8)).config(independent=True, rank=2, alpha=None).independent
