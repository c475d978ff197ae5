"""Training of the embedded MM-DiT with transparency: data, code, optimiser, exact resume, export."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from condit.data.icon_sample import sample_path
from condit.diffusion.objectives import add_noise
from condit.encoders.clip_tokenizer import SPECIAL_TOKENS
from condit.weights.files import read_tensors, save_tensors
from condit_lab.draw import figures, train
from condit_lab.draw.code import RgbaCode, to_planes, to_rgba
from condit_lab.draw.data import Drawings, Mixture, from_icon_world
from condit_lab.draw.export import export, load_model
from condit_lab.draw.model import ModelConfig
from condit_lab.draw.muon import Muon, orthogonalise
from condit_lab.draw.sketch import Sketch, fit_basis, fit_sketch
from condit_lab.draw.text import whole_word_tokenizer
from condit_lab.draw.train import DrawRecipe, TrainConfig, Trainer

MICRO = ModelConfig(
    width=64,
    double_blocks=1,
    single_blocks=1,
    components=8,
    looks=16,
    sketch_depth=1,
    sketch_components=8,
    text_width=64,
    text_layers=1,
    text_tokens=8,
    vocabulary=400,
)


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    world = from_icon_world(str(sample_path()))
    trained = [i for i, row in enumerate(world.rows) if row.split == "train"][::6]
    held_out = [i for i, row in enumerate(world.rows) if row.split == "held-out"][:4]
    return world.select(trained + held_out)


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    """The code is fitted to 64 drawings, figures are of 8 and samples take 2 steps: a run's length is elsewhere."""
    monkeypatch.setattr(train, "fit_code", partial(train.fit_code, n=64))
    monkeypatch.setattr(figures, "make_probes", partial(figures.make_probes, sample=8))
    monkeypatch.setattr(figures, "draw", partial(figures.draw, steps=2))


def trainer(drawings: Drawings, out: Path, *, images: int, init: Path | None = None, **changes) -> Trainer:
    config = TrainConfig(images=images, batch=4, micro_batch=2, warmup=2, averages=(0.9, 0.99), **changes)
    torch.use_deterministic_algorithms(True)
    try:
        return Trainer(DrawRecipe(model=MICRO, train=config), drawings, out, init=init)
    finally:
        torch.use_deterministic_algorithms(False)


def weights(run: Trainer) -> dict[str, Tensor]:
    averages = {f"{i}.{k}": v for i, a in enumerate(run.averages) for k, v in a.shadow.items()}
    return {**{k: p.detach() for k, p in run.parameters.items()}, **averages}


def steps(run: Trainer, n: int) -> None:
    for _ in range(n):
        run.train_step()


def test_a_pack_reads_as_it_was_written(drawings, tmp_path, monkeypatch):
    monkeypatch.setattr("condit_lab.draw.data.PART_BYTES", 20_000)
    drawings.write(tmp_path)
    read = Drawings.open(tmp_path)
    assert len(list(tmp_path.glob("pictures-*.bin"))) > 1
    assert read.rows == drawings.rows and read.pictures == drawings.pictures


def test_a_missing_pack_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pack of drawings"):
        Drawings.open(tmp_path)


def test_the_mixture_holds_its_share_of_the_core_and_the_rest_of_all_styles(drawings):
    rows = [
        row if row.style != "noto" else type(row)(row.style, row.concept, row.split, False, row.captions)
        for row in drawings.rows
    ]
    mixture = Mixture(rows, 0.5)
    drawn = mixture.draw(4000, torch.Generator().manual_seed(0)).tolist()
    assert all(rows[i].core for i in drawn[:2000])
    sizes, counts = Counter(row.style for row in rows), Counter(rows[i].style for i in drawn[2000:])
    total = sum(size**0.5 for size in sizes.values())
    assert all(counts[style] == pytest.approx(2000 * size**0.5 / total, rel=0.4) for style, size in sizes.items())


def test_a_complete_code_is_exact_and_premultiplied_colour_is_consistent(drawings):
    rgba = drawings.rgba(range(12))
    planes = to_planes(rgba)
    code = RgbaCode(256)
    code.fit([planes])
    back = code.decode(code.encode(planes), (8, 8))
    assert torch.allclose(back, planes, atol=2e-3)  # eigenvectors in float32
    exact = rgba.float() / 255
    again = to_rgba(planes)
    assert torch.allclose(again[:, 3], exact[:, 3], atol=1e-5)
    assert torch.allclose(again[:, :3] * again[:, 3:], exact[:, :3] * exact[:, 3:], atol=1e-5)


def test_captions_are_cut_before_the_end_token_and_commas_take_none():
    words = ["red cat, flat style", "红苹果，扁平风格"]
    tokenizer = whole_word_tokenizer(words * 3, vocab_size=400, limit=5)
    pad, _, begin, end = range(4)
    with_comma, without, long, empty = tokenizer.ids(["red, cat", "red cat", "red cat flat style cat", ""]).tolist()
    assert with_comma == without == [begin, *without[1:3], end, pad]
    assert len(long) == 5 and long[:3] == without[:3] and long[-1] == end
    assert empty == [begin, end, pad, pad, pad]


def test_the_blind_error_is_that_of_a_gaussian_of_the_codes_deviations():
    code = RgbaCode(4)
    code.deviation.copy_(torch.tensor([4.0, 1.0, 0.25, 0.01]))
    variance, t = code.deviation, 0.7
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, 4, generator=generator) * variance.sqrt()
    e = torch.randn(400_000, 4, generator=generator)
    x_t = (1 - t) * x + t * e
    guess = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2) * x_t
    assert code.blind_error(t) == pytest.approx(float(((guess - x) / t).square().mean()), rel=0.01)


def test_muon_steps_as_torchs_does(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((96, 64), (96, 64), (64, 80))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    one, other = Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, atol=2e-3)  # torch iterates in bf16; a step moves an entry by about 2e-3


def test_orthogonalise_brings_singular_values_near_one():
    x = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.5 and values.max() < 1.3


def test_a_run_killed_and_resumed_ends_with_the_weights_of_one_never_stopped(drawings, tmp_path):
    whole, first = (trainer(drawings, tmp_path / name, images=40) for name in ("whole", "parts"))
    steps(whole, 5)
    steps(first, 3)
    first.save()
    resumed = trainer(drawings, tmp_path / "parts", images=40)
    assert (resumed.step, resumed.images) == (3, 12)
    steps(resumed, 2)
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["transformer.proj_out.weight"], torch.zeros_like(one["transformer.proj_out.weight"]))


def test_micro_batches_sum_to_the_batch(drawings, tmp_path):
    parts, whole = (trainer(drawings, tmp_path / str(n), images=40) for n in (2, 4))
    whole.config.micro_batch = 4
    steps(parts, 1)
    steps(whole, 1)
    for name, p in weights(parts).items():
        assert torch.allclose(p, weights(whole)[name], atol=2e-3), name  # Adam's first step has the gradient's sign


def test_an_export_starts_another_run_and_the_count_of_images_goes_on(drawings, tmp_path):
    run = trainer(drawings, tmp_path / "run", images=40)
    steps(run, 2)
    run.save()
    export(tmp_path / "run", tmp_path / "export")
    again = trainer(drawings, tmp_path / "again", images=40, init=tmp_path / "export")
    assert again.images == 8 and again.step == 0
    for name, p in again.parameters.items():
        assert torch.equal(p.detach(), run.averages[0].shadow[name].bfloat16().float()), name
    assert torch.equal(again.model.code.basis, run.model.code.basis)
    assert torch.equal(again.model.text.looks, run.model.text.looks.bfloat16().float())
    assert torch.equal(again.model.variance, run.model.variance)
    steps(again, 1)


def test_an_export_from_before_the_sketch_starts_a_run_that_fits_one(drawings, tmp_path):
    run = trainer(drawings, tmp_path / "run", images=40)
    steps(run, 2)
    run.save()
    export(tmp_path / "run", tmp_path / "export")
    file, embedder = tmp_path / "export" / "model.safetensors", "transformer.x_embedder.weight"
    older = {name: x for name, x in read_tensors(file).items() if not name.startswith("text.sketch.")}
    older |= {"text.canvas_weight": torch.ones(8, 16), "text.canvas_bias": torch.ones(8)}
    older[embedder] = older[embedder][:, :40].clone()  # 32 channels of a token and 8 of the canvas
    save_tensors(file, older, {})
    with pytest.raises(ValueError, match="before the sketch"):
        load_model(tmp_path / "export")
    again = trainer(drawings, tmp_path / "again", images=40, init=tmp_path / "export")
    assert again.images == 8
    assert torch.equal(again.model.text.looks, run.model.text.looks.bfloat16().float())
    assert again.model.text.sketch.basis.abs().sum() > 0
    assert torch.equal(again.model.transformer.x_embedder.weight[:, :40], older[embedder].float())
    assert again.model.transformer.x_embedder.weight[:, 40:].abs().sum() == 0
    steps(again, 1)


def test_training_lowers_the_error_on_its_drawings_and_a_sheet_is_generated(drawings, tmp_path):
    run = trainer(drawings, tmp_path, images=160, log_every=5, figures_every=80)
    before = figures.errors(run.model, run.probes)
    run.run()
    after = figures.errors(run.model, run.probes)
    assert after["train_error_0.7"] < 0.9 * before["train_error_0.7"]
    assert {"train_wrong_words_0.9", "held_error_1.0"} <= set(after)
    assert sorted(p.name for p in tmp_path.glob("sheet-*.png")) == ["sheet-000000080.png", "sheet-000000160.png"]


def test_a_fresh_model_predicts_the_words_drawing_and_what_one_number_tells(drawings, tmp_path):
    """Its error is that of the best estimate by each number alone, given the words: no step was taken."""
    run = trainer(drawings, tmp_path, images=40)
    run.model.eval()
    x0, rows = run.codes.float(), torch.arange(len(run.codes))
    words = run.model.text(run.captions[run.starts[rows]])
    error = {}
    for level in (0.4, 1.0):
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((len(x0),), level)
        with torch.no_grad():
            error[level] = (run.model.predict(add_noise(x0, noise, t), t, words) - x0).square()
    assert torch.allclose(error[1.0], (words.sketch - x0).square(), atol=1e-5)
    weights = run.mixture.weights()[:, None, None]
    expected = run.model.variance * 0.4**2 / (0.6**2 * run.model.variance + 0.4**2)
    assert torch.allclose((error[0.4] * weights).mean((0, 1)), expected, rtol=0.25)


def test_a_sketch_learns_drawings_of_words_and_combines_them():
    """Drawings are a sum of what the concept and the style look like; a quarter of the combinations is held out."""
    generator = torch.Generator().manual_seed(0)
    concepts, styles = (torch.randn(n, 4, 6, generator=generator) for n in (24, 12))
    pairs = torch.cartesian_prod(torch.arange(24), torch.arange(12))
    codes = concepts[pairs[:, 0]] + styles[pairs[:, 1]]
    first = len(SPECIAL_TOKENS)
    captions = pairs + torch.tensor([first, first + 24])
    held_out = (pairs.sum(1) % 4) == 0
    torch.manual_seed(0)
    sketch = Sketch(first + 36, width=64, depth=1, components=24, shape=(4, 6))
    trained, weights = codes[~held_out], torch.ones(int((~held_out).sum()))
    components = fit_basis(sketch, trained, weights)
    losses = fit_sketch(sketch, captions[~held_out], torch.arange(len(trained) + 1), components, weights, epochs=300)
    assert losses[-1] < 0.15 * losses[0]
    error = (sketch(captions[held_out]) - codes[held_out]).square().mean() / codes.var()
    assert error < 0.3
    nothing = torch.zeros(1, 2, dtype=torch.int64)
    assert (sketch(nothing)[0] - trained.mean(0)).square().mean() < 0.2 * codes.var()


def test_weights_of_a_mixture_are_how_often_it_draws_each_row(drawings):
    rows = [
        row if row.style != "noto" else type(row)(row.style, row.concept, row.split, False, row.captions)
        for row in drawings.rows
    ]
    mixture = Mixture(rows, 0.5)
    drawn = torch.bincount(mixture.draw(200_000, torch.Generator().manual_seed(0)), minlength=len(rows))
    assert torch.allclose(drawn / 200_000 * len(rows), mixture.weights(), rtol=0.3)
    assert mixture.weights().mean() == pytest.approx(1, abs=1e-5)


def test_the_rate_warms_up_stays_and_falls(drawings, tmp_path):
    run = trainer(drawings, tmp_path, images=100, decay_from=60)
    rates = []
    for run.step, run.images in ((0, 0), (1, 4), (10, 60), (20, 80), (25, 100)):
        rates.append(run.rate())
    assert rates == [0.5, 1.0, 1.0, 0.5, 0.0]
