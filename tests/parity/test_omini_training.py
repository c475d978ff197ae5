"""Task "omini": the official training step through the trainer's own code, and what a recipe of it does."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.mmdit import MMDiTConfig
from condit.nn.lora import LoRA
from condit.training.omini_data import Rows
from condit.weights.files import save_tensors
from omini_pairs import GRAY, SUBJECT, make, shake, write_flux, write_pairs

GOLDEN = Path(__file__).parent / "golden" / "ominicontrol"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
TRAIN = load_file(GOLDEN / "train_step.safetensors")
TRAJECTORY = load_file(GOLDEN / "trajectory.safetensors")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return str(write_pairs(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def flux(tmp_path_factory, make_flux) -> str:
    return write_flux(make_flux, tmp_path_factory.mktemp("flux") / "model")


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


def equal(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


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
            actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            equal(actual, expected, atol=1e-5 * float(norm))
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
        actual = task.loss(alone, x0[one[0]], [c[one[0]] for c in tokens], noise[one[0]], t[one[0]])
        torch.testing.assert_close(together[i : i + 1], actual, rtol=0, atol=1e-5)
    if rows.drawn is not None:
        assert len({int(d.sum()) for d in rows.drawn}) > 1  # masks of their own


def test_each_row_may_have_its_own_positions_of_conditions(flux, pairs):
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
        actual = predict(slice(2), both)
        for i in range(2):
            torch.testing.assert_close(actual[i : i + 1], predict(slice(i, i + 1), both[i]), rtol=0, atol=1e-5)
        assert (actual[1:] - predict(slice(1, 2), both[0])).abs().max() > 1e-3


def test_encoded_rows_on_disk_train_as_images_do_without_the_text_encoders(flux, pairs, tmp_path):
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


def test_text_and_images_are_dropped_apart_and_all_conditions_of_a_pair_together(flux, pairs, monkeypatch):
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
