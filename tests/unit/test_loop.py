"""The training loop: exact resume after a kill, bad numbers, recipes."""

import inspect
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from condit.training.loop import Loop, Task, fast_precision
from condit.training.optim import lr_factor, parameter_groups
from condit.training.plugins import added_tasks
from condit.training.run import read_recipe, tasks, train
from loop_toy import CONFIG, Toy


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    whole = Loop(Toy(), CONFIG, tmp_path / "whole")
    parts = Loop(Toy(), CONFIG.model_copy(update={"batch": 2, "accumulate": 2}), tmp_path / "parts")
    losses = []
    for loop in (whole, parts):
        loop.optimizers = []  # they would step and clear; what they would see is compared
        losses.append(loop.train_step(loop.make_batch(0))[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, p in whole.parameters.items():
        assert p.grad is not None and p.grad.abs().max() > 1e-4
        torch.testing.assert_close(p.grad, parts.parameters[name].grad, rtol=0, atol=1e-6)
    assert whole.images_a_step == parts.images_a_step == 4
    assert whole.card({})["images_seen"] == parts.card({})["images_seen"]


KILLED = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from loop_toy import CONFIG, Toy
from condit.training.loop import Loop
Loop(Toy(kill_at=8), CONFIG, Path({out!r})).run()
"""


def test_a_run_killed_and_resumed_ends_with_the_weights_of_one_never_stopped(tmp_path):
    Loop(Toy(), CONFIG, tmp_path / "whole").run()
    script = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path / "cut"))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    resumed = Loop(Toy(), CONFIG, tmp_path / "cut")
    assert 0 < resumed.step < CONFIG.steps
    resumed.run()
    whole, cut = (torch.load(tmp_path / name / "export" / "net.pt") for name in ("whole", "cut"))
    assert whole["images"] == cut["images"] == 48
    assert all(torch.equal(whole["net"][k], cut["net"][k]) for k in whole["net"])
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "cut")]
    for name in states[0]["parameters"]:
        assert torch.equal(states[0]["parameters"][name], states[1]["parameters"][name])


def test_a_task_knows_the_share_of_the_run_that_is_done(tmp_path):
    seen = []

    class Watching(Toy):
        def forward(self, batch, generator):
            seen.append(self.progress)
            return super().forward(batch, generator)

        def validate(self):
            seen.append(self.progress)
            return {}

    Loop(Watching(), CONFIG.model_copy(update={"steps": 4}), tmp_path).run()
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_autocast_is_bf16_only_where_the_device_computes_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert fast_precision() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fast_precision() == "no"
    made = Loop(Toy(), CONFIG.model_copy(update={"precision": "auto"}), tmp_path)
    assert made.precision == made.card({})["precision"] == "no"


def test_runs_of_either_precision_follow_each_other_in_one_process(tmp_path):
    seen = []

    class Watched(Toy):
        def forward(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            seen.append(self.net(batch).dtype)
            return super().forward(batch, generator)

    for precision in ("bf16", "no", "bf16"):
        config = CONFIG.model_copy(update={"precision": precision, "steps": 1})
        Loop(Watched(), config, tmp_path / f"{precision}{len(seen)}").run()
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_compile_compiles_what_the_task_names_and_looks_run_eagerly(tmp_path, monkeypatch):
    compiled, stances = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled.append((self, how)))

    class Named(Toy):
        def compiled(self):
            return [self.net]

        def validate(self):
            stances.append(torch._dynamo.eval_frame._stance.stance)
            return {}

    for on in (False, True):
        task = Named()
        Loop(task, CONFIG.model_copy(update={"steps": 1, "compile": on}), tmp_path / str(on)).run()
        assert compiled == ([(task.net, {"dynamic": False})] if on else [])
    assert stances == ["force_eager"] * 2
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_training_moves_the_weights_and_lowers_the_loss(tmp_path):
    config = CONFIG.model_copy(update={"steps": 60, "batch": 32})
    task = Toy()
    generator = torch.Generator().manual_seed(1)
    held_out = task.batch(random.Random("held out"), 64)
    before = float(task(held_out, generator)[0])
    Loop(task, config, tmp_path).run()
    assert float(task(held_out, generator)[0]) < 0.8 * before


def test_bad_losses_are_skipped_then_stop_with_advice_and_keep_the_checkpoint(tmp_path):
    config = CONFIG.model_copy(update={"steps": 100})
    with pytest.raises(ValueError, match="lower `lr`"):
        Loop(Toy(bad_from=6), config, tmp_path).run()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)["parameters"]
    assert all(torch.isfinite(p).all() for p in saved.values())


def test_a_run_that_had_ended_keeps_its_figures_when_it_is_resumed(tmp_path):
    class Judged(Toy):
        def validate(self) -> dict[str, float]:
            return {"loss": 0.5}

        def export(self, folder: Path, card: dict) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "card.json").write_text(json.dumps(card))

    cards = []
    for _ in range(2):
        assert Loop(Judged(), CONFIG, tmp_path).run() == {"loss": 0.5}
        cards.append(json.loads((tmp_path / "export" / "card.json").read_text()))
    assert cards[0]["figures"] == cards[1]["figures"] == {"loss": 0.5} and cards[0]["steps"] == cards[1]["steps"] == 12


def test_another_recipes_checkpoint_is_refused(tmp_path):
    Loop(Toy(), CONFIG, tmp_path).run()

    class Other(Toy):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"another recipe: 2 parameters differ \(first: more.bias, None instead of"):
        Loop(Other(), CONFIG, tmp_path)

    class Wider(Toy):
        def __init__(self):
            super().__init__()
            name, weight = next((n, p) for n, p in self.named_parameters() if p.ndim == 2)
            module, leaf = name.rsplit(".", 1)
            setattr(self.get_submodule(module), leaf, nn.Parameter(weight.detach().repeat(2, 1)))

    with pytest.raises(ValueError, match="another recipe: 1 parameters differ .* instead of"):
        Loop(Wider(), CONFIG, tmp_path)


def test_averaged_weights_are_put_in_and_taken_out_bit_exactly(tmp_path):
    loop = Loop(Toy(), CONFIG, tmp_path)
    live = {k: p.detach().clone() for k, p in loop.parameters.items()}
    for p in loop.average.shadow.values():
        p.add_(1.0)
    with loop.averaged():
        assert not any(torch.equal(p, live[k]) for k, p in loop.parameters.items())
    assert all(torch.equal(p, live[k]) for k, p in loop.parameters.items())


def test_lr_warms_up_holds_and_falls_to_zero():
    assert lr_factor(0, 100, 10) == 0.1
    assert lr_factor(15, 100, 10) == 1.0
    assert lr_factor(60, 100, 10) == pytest.approx(0.5)
    assert lr_factor(100, 100, 10) == 0.0


def test_muon_gets_hidden_matrices_and_nothing_else():
    module = nn.ModuleDict({"hidden": nn.Linear(64, 64), "table": nn.Embedding(70, 64), "norm": nn.Linear(64, 64)})
    matrices, embeddings, rest = parameter_groups(module)
    assert [p is module["hidden"].weight for p in matrices] == [True]
    assert [p is module["table"].weight for p in embeddings] == [True]
    assert len(rest) == 3


def test_recipe_errors_name_the_field(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('task = "tokens"\n[data]\n[train]\nsteps = 3\nbatch = "many"\n')
    with pytest.raises(ValueError, match="train.batch"):
        read_recipe(recipe)
    recipe.write_text('task = "tokens"\n[data]\n[train]\nsteps = 3\nbatch = 2\nsped = 1\n')
    with pytest.raises(ValueError, match="train.sped"):
        read_recipe(recipe)
    for wrong in ("steps = 0", "batch = 0", "accumulate = 0", "lr = -1e-3", "ema = 1.0", "log_every = 0", "clip = 0"):
        field = wrong.split()[0]
        fields = "\n".join({"steps": "steps = 3", "batch": "batch = 2", field: wrong}.values())
        recipe.write_text(f'task = "tokens"\n[data]\n[train]\n{fields}\n')
        with pytest.raises(ValueError, match=rf"train.{field}: Input should be (greater|less) than"):
            read_recipe(recipe)
    recipe.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="r.toml is not TOML"):
        read_recipe(recipe)
    recipe.write_text('task = "paint"\n[data]\n[train]\nsteps = 3\nbatch = 2\n')
    with pytest.raises(ValueError, match="no task 'paint'"):
        train(recipe, out=tmp_path)
    recipe.write_text('task = "latent"\n[data]\nfolder = "x"\n[train]\nsteps = 3\nbatch = 2\n')
    with pytest.raises(ValueError, match="does not fit task 'latent'"):
        train(recipe, out=tmp_path)


ROOT = Path(__file__).parents[2]
RECIPES = [path for folder in ("recipes", "lab/recipes") for path in sorted((ROOT / folder).glob("*.toml"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_fits_its_task(path):
    recipe = read_recipe(path)
    task: type[Task] = tasks().get(recipe.task) or added_tasks()[recipe.task].load()
    if task.data_type is not None:
        task.data_type.model_validate(recipe.data)
        return
    fields = {name for kind in inspect.getmro(task) for name in inspect.signature(kind.__init__).parameters}
    assert set(recipe.data) <= fields


@pytest.mark.parametrize(
    ("task", "data", "where"),
    [
        ("omini", 'model = "m"\npairs = "p"\nheld_out = -3\nconditions = [{ role = "target" }]', "held_out: .*-3"),
        ("omini", 'model = "m"\npairs = "p"\nconditions = [{ role = 1 }]', "conditions.0.role: .*found 1"),
        ("ip-adapter", 'model = "m"\nnoise_offset = nan', "noise_offset: .*nan"),
        ("deadiff", 'model = "m"\ndrop = [nan, 0, 0]', "drop.0: .*nan"),
        ("deadiff", 'model = "m"\nshares = [0, 0, 0]', r"shares: shares must be three .*not all 0.*found \[0"),
        ("class-conditional", "flip = true", "backbone: Field required"),
        ("classify", 'flip = "no"', "flip: .*'no'"),
        ("pixels", "size = 0", "size: .*found 0"),
    ],
)
def test_a_wrong_field_of_data_is_named_with_the_file(tmp_path, task, data, where):
    path = tmp_path / "r.toml"
    path.write_text(f'task = "{task}"\n[data]\n{data}\n[train]\nsteps = 1\nbatch = 1\n')
    with pytest.raises(ValueError, match=f"r.toml: .data. does not fit task '{task}': {where}"):
        train(path, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("classify", "sizes = { patch_size = 8, dim = 65536, heads = 2 }"),
        ("class-conditional", 'backbone = "DiT"\nsizes = { hidden_size = 65536, num_heads = 2 }'),
        ("pixels", "sizes = { blocks = [1, 1], widths = [65536, 65536] }"),
    ],
)
def test_a_network_that_the_machine_cannot_hold_is_refused_before_it_is_made(tmp_path, task, data, random_tiny):
    for name in ("one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "set" / name / "0.png")
    path = tmp_path / "r.toml"
    path.write_text(f'task = "{task}"\n[data]\nfolder = "set"\nsize = 16\n{data}\n[train]\nsteps = 1\nbatch = 1\n')
    with pytest.raises(ValueError, match=r"million weights, and training it takes [\d,.]+ GB; this machine has"):
        train(path, out=tmp_path / "run")


def test_paths_of_a_recipe_are_relative_to_its_folder(tmp_path, monkeypatch):
    from condit.training.run import read_recipe

    (tmp_path / "recipes" / "pairs").mkdir(parents=True)
    recipe = tmp_path / "recipes" / "a.toml"
    data = 'pairs = "pairs"\nicons = "elsewhere"\nmodel = "tiny"\nwhere = "pairs"'
    recipe.write_text(f'task = "omini"\n[data]\n{data}\n[train]\nsteps = 1\nbatch = 1\n')
    monkeypatch.chdir(tmp_path)
    found = read_recipe(recipe).data
    assert found["pairs"] == str(tmp_path / "recipes" / "pairs")  # there
    assert (found["icons"], found["model"], found["where"]) == (
        "elsewhere",
        "tiny",
        "pairs",
    )  # not there; a name; no path
