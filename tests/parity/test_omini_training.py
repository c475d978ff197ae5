"""Task "omini": the official training step through the trainer's own code, and what a recipe of it does."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import condit
from condit.backbones.mmdit import MMDiTConfig
from condit.data.pairs import fingerprint
from condit.nn.lora import LoRA
from condit.training.loop import Loop, LoopConfig
from condit.training.omini import OminiTask
from condit.training.omini_data import ConditionSpec, OminiData, Rows
from condit.training.run import train
from condit.weights.files import save_tensors

GOLDEN = Path(__file__).parent / "golden" / "ominicontrol"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
TRAIN = load_file(GOLDEN / "train_step.safetensors")
TRAJECTORY = load_file(GOLDEN / "trajectory.safetensors")
SIZE = 16, 24  # 4 x 6 cells of 4 pixels
WORDS = ["a red fox in the snow", "snow", "a fox", "the red snow", "red", "a snow fox"]


def write_pairs(folder: Path, count: int = 6) -> Path:
    """Pictures of coloured rectangles, a reference of role "subject" beside each."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        for name in ("t", "s"):
            small = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(small.repeat(4, 0).repeat(4, 1)).save(folder / f"{name}{i}.png")
        text = WORDS[i % len(WORDS)]
        rows.append({"file_name": f"t{i}.png", "subject_file_name": f"s{i}.png", "text": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return str(write_pairs(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def flux(tmp_path_factory, make_flux) -> str:
    config = MMDiTConfig(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    folder = tmp_path_factory.mktemp("flux") / "model"
    pipe = make_flux(config, dynamic=True)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    pipe.save_pretrained(folder)
    return str(folder)


SUBJECT = {"role": "subject", "delta": [0, -6]}
GRAY = {"role": "target", "annotator": "gray"}


def make(flux: str, pairs: str, *conditions: dict, **how) -> OminiTask:
    torch.manual_seed(0)
    given = {"height": 16, "width": 24, "text_tokens": 8, "held_out": 2, "draw": 0, "dtype": "float32"}
    return OminiTask(
        OminiData(**{"model": flux, "pairs": pairs, "conditions": conditions or (SUBJECT,), **given, **how})
    )


def shake(task: OminiTask) -> OminiTask:
    """Adapters that do something."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in task.model.adapters.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return task


# The official step


@pytest.fixture(scope="module")
def official(tmp_path_factory, flux) -> str:
    """The folder with the official transformer in place of its own."""
    folder = tmp_path_factory.mktemp("official")
    for part in Path(flux).iterdir():
        if part.name not in ("transformer", "vae"):
            (folder / part.name).symlink_to(part)
    axes = tuple(CONFIG["transformer"]["axes_dims_rope"])
    config = asdict(MMDiTConfig(**{**CONFIG["transformer"], "axes_dims_rope": axes}))
    tensors = {
        "transformer": load_file(GOLDEN / "transformer.safetensors"),
        "vae": load_file(GOLDEN / "vae.safetensors"),
    }
    for part, given in (("transformer", config), ("vae", {"_class_name": "AutoencoderKL", **CONFIG["vae"]})):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(given))
        save_tensors(folder / part / "diffusion_pytorch_model.safetensors", tensors[part])
    return str(folder)


CASES = {
    "aligned": [{"role": "subject"}],
    "aligned_independent": [{"role": "subject"}],
    "subject": [{"role": "subject", "delta": "left"}],
    "compact_shifted": [{"role": "subject", "delta": (0, -3), "scale": 2.0, "size": (8, 12)}],
    "two_shared_adapter": [{"role": "subject"}, {"role": "subject"}],
    "integration": [{"role": "target"}],
}


def equal(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_the_trainer_equals_the_official_trainers(official, pairs, case, checkpointing):
    given = {n.removeprefix(f"{case}/"): x for n, x in TRAIN.items() if n.startswith(f"{case}/")}
    how = {"independent": case == "aligned_independent", "integrate": case == "integration"}
    task = make(official, pairs, *CASES[case], checkpointing=checkpointing, **how)
    adapter = task.model.adapters["omini"]
    adapter.lora = LoRA.from_tensors(
        load_file(GOLDEN / f"lora_{'subject' if case == 'subject' else 'canny'}.safetensors")
    )
    t, x0 = given["t"], given["x_t"] - given["t"] * given["target_velocity"]
    noise, drawn = x0 + given["target_velocity"], None
    tokens = [given[f"cond_{i}/tokens"].reshape(1, -1, 16) for i in range(2) if f"cond_{i}/ids" in given]
    if case == "integration":  # both halves on the whole grid, as the trainer has them
        cells = (given["img_ids"][:, 1] * 6 + given["img_ids"][:, 2]).long()
        drawn = torch.zeros(24, dtype=torch.bool).index_fill(0, cells, True)
        whole = torch.zeros(2, 1, 24, 16)
        whole[0, :, drawn], whole[0, :, ~drawn], whole[1, :, drawn] = x0, tokens[0], noise
        x0, noise, tokens, drawn = whole[0], whole[1], [whole[0]], drawn.view(1, 4, 6)
    else:
        for spec, i in zip(task.specs, range(2), strict=False):
            equal(task.ids_of(spec), given[f"cond_{i}/ids"], atol=0)
    rows = Rows(x0[:, None], (), TRAJECTORY["text"], TRAJECTORY["pooled"], drawn)
    loss = task.loss(rows, x0, tokens, noise, t).mean()
    equal(loss[None], given["loss"])
    loss.backward()
    lora = adapter.lora
    norm = torch.cat([p.grad.flatten() for p in lora.parameters() if p.grad is not None]).norm()
    equal(norm[None], given["grad_global_norm"], atol=1e-5 * float(norm))
    owner_of_case = "subject" if case == "subject" else "canny"
    checked = 0
    for name, expected in given.items():
        if not name.startswith("grad/"):
            continue
        path, side, owner = name.removeprefix("grad/").removesuffix(".weight").rsplit(".", 2)
        if owner == owner_of_case:
            parameter = {"lora_A": lora.a, "lora_B": lora.b}[side][lora.keys[path]]
            # What a condition computes last is thrown away, so some weights have no gradient; there it is zero.
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            equal(found, expected, atol=1e-5 * float(norm))
            checked += 1
    assert checked


# Batches


@pytest.mark.parametrize("integrate", [False, True])
def test_a_row_of_a_batch_has_the_loss_of_the_row_alone(flux, pairs, integrate):
    task = shake(make(flux, pairs, *([{"role": "target"}] if integrate else [SUBJECT, GRAY]), integrate=integrate))
    rows = task.encode(task.read([0, 1, 2], torch.Generator().manual_seed(0)))
    g = torch.Generator().manual_seed(1)
    x0, t = rows.target[:, 0], torch.rand(3, generator=g)
    noise = torch.randn(x0.shape, generator=g)
    tokens = [x0] if integrate else [c[:, 0] for c in rows.conditions]
    together = task.loss(rows, x0, tokens, noise, t)
    for i in range(3):
        one = [slice(i, i + 1)]
        drawn = None if rows.drawn is None else rows.drawn[i : i + 1]
        alone = Rows(rows.target[i : i + 1], (), rows.text[i : i + 1], rows.pooled[i : i + 1], drawn)
        found = task.loss(alone, x0[one[0]], [c[one[0]] for c in tokens], noise[one[0]], t[one[0]])
        torch.testing.assert_close(together[i : i + 1], found, rtol=0, atol=1e-5)
    if rows.drawn is not None:
        assert len({int(d.sum()) for d in rows.drawn}) > 1  # masks of their own


def test_conditions_may_stand_at_positions_of_their_own_in_each_row(flux, pairs):
    from condit.nn.streams import grid_ids
    from condit.training.omini import Placed

    task = shake(make(flux, pairs))
    rows = task.encode(task.read([0, 1], torch.Generator().manual_seed(0)))
    x, t, c = rows.target[:, 0], torch.full((2,), 0.5), rows.conditions[0][:, 0]
    both = torch.stack([grid_ids(4, 6, delta=(0, -6)), grid_ids(4, 6, delta=(0, 6))])

    def predict(pick: slice, ids: Tensor) -> Tensor:
        placed = [Placed(c[pick], ids, "omini")]
        return task.model(x[pick], grid_ids(4, 6), t[pick], rows.text[pick], rows.pooled[pick], placed)

    with torch.no_grad():
        found = predict(slice(2), both)
        for i in range(2):
            torch.testing.assert_close(found[i : i + 1], predict(slice(i, i + 1), both[i]), rtol=0, atol=1e-5)
        assert (found[1:] - predict(slice(1, 2), both[0])).abs().max() > 1e-3


def test_encoded_rows_on_disk_train_as_pictures_do_without_the_text_encoders(flux, pairs, tmp_path):
    live, kept = make(flux, pairs, SUBJECT, GRAY), make(flux, pairs, SUBJECT, GRAY, cache=str(tmp_path))
    assert kept.text is None and len(list(tmp_path.glob("*/*.safetensors"))) == 7
    for task in (live, kept):
        shake(task).train()
    losses = [task(task.batch(random.Random(3), 4), torch.Generator().manual_seed(4))[0] for task in (live, kept)]
    # A batch of other size is encoded in another order of sums.
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/*.safetensors")}
    make(flux, pairs, SUBJECT, GRAY, cache=str(tmp_path))  # nothing is encoded twice
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/*.safetensors")}
    make(flux, pairs, SUBJECT, cache=str(tmp_path))  # but for other conditions
    assert len(list(tmp_path.iterdir())) == 2


def test_text_and_pictures_are_dropped_apart_and_all_conditions_of_a_pair_together(flux, pairs, monkeypatch):
    task = make(flux, pairs, SUBJECT, GRAY, text_dropout=0.5, image_dropout=0.5)
    seen = []

    def loss(rows, x0, tokens, noise, t):
        seen.append((rows, tokens))
        return t

    monkeypatch.setattr(task, "loss", loss)
    for seed in range(8):
        task(task.batch(random.Random(seed), 4), torch.Generator().manual_seed(seed))
    empty = task.empty_rows()
    states = set()
    for rows, _ in seen:
        for i in range(4):
            gone = [torch.equal(c[i], e[0]) for c, e in zip(rows.conditions, empty.conditions, strict=True)]
            assert len(set(gone)) == 1
            states.add((torch.equal(rows.text[i], empty.text[0]), gone[0]))
    assert states == {(False, False), (False, True), (True, False), (True, True)}


# A recipe


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
    found = next(line["validation"] for line in lines if "validation" in line)
    levels = (0.5, 0.7, 0.9)
    wanted = {f"{what}_{t}" for what in ("error", "wrong_reference", "no_reference") for t in levels}
    assert set(found) == wanted | {"follow_canny_f1"} and 0 <= found["follow_canny_f1"] <= 1


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
    found = []
    for checkpointing in (True, False):
        task = shake(make(flux, pairs, checkpointing=checkpointing)).train()
        task(task.batch(random.Random(0), 2), torch.Generator().manual_seed(0))[0].backward()
        found.append([p.grad for p in task.model.adapters.parameters() if p.grad is not None])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


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
def test_what_cannot_be_trained_is_told_before_it_begins(flux, pairs, conditions, how, message):
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


def test_no_conditions_another_model_and_an_unknown_field_are_told(flux, pairs, tmp_path):
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
