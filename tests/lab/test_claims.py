"""benchmarks/claims_omini.py and the variants of a condition that it compares: a step each, on the committed icons."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from condit_lab.training.adapters import TokenTask
from condit_lab.training.token_variants import InDoubleBlocks, Variant
from few_icons import few_icons

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"
ICONS = few_icons()


@pytest.fixture(scope="module")
def claims():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("claims_omini", FOLDER / "claims_omini.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules["claims_omini"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("claims_omini", "trials", "timing"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(random_tiny_folder) -> str:
    return str(random_tiny_folder / "model")


def run(claims, model: str, out: Path, *more: str) -> dict:
    given = [
        "--icons",
        ICONS,
        "--model",
        model,
        "--steps",
        "1",
        "--batch",
        "2",
        "--count",
        "4",
        "--out",
        str(out),
        *more,
    ]
    claims.main(given)
    return json.loads((out / "claims.json").read_text())


SOME = "gray", "gray-add", "gray-double", "gray-joint"  # every kind of variant


def test_a_trial_of_every_kind_trains_a_step_and_is_measured_with_intervals(claims, model, tmp_path):
    report = run(claims, model, tmp_path, "--only", ",".join(SOME))
    assert set(SOME) <= set(claims.TRIALS) and all(set(names) <= set(claims.TRIALS) for names in claims.CLAIMS.values())
    assert set(report["trials"]) == set(SOME) and set(report["strengths"]) == {
        "0",
        "0.25",
        "0.5",
        "1",
        "1.5",
        "2",
    }
    for row in (*report["trials"].values(), *report["strengths"].values()):
        assert row["error"]["n"] == 4 and row["error"]["low"] <= row["error"]["value"] <= row["error"]["high"]
    assert report["strengths"]["1"] == report["trials"]["gray"]
    # Without a condition at all, another one changes nothing.
    assert report["strengths"]["0"]["wrong"]["value"] == 1
    values = [row["error"]["value"] for row in report["trials"].values()]
    assert len(set(values)) == len(values)  # none is another one under its name
    page = (tmp_path / "claims.md").read_text()
    assert "benchmarks/claims_omini.py --icons" in page and page.count("| gray |") == len(claims.CLAIMS)


def test_a_page_gets_the_claims_whose_trials_were_all_run(claims, model, tmp_path):
    page = tmp_path / "page.md"
    names = [*(question.name for question in claims.QUESTIONS), "omini-strength"]
    shipped = (FOLDER.parent / "docs" / "claims.md").read_text()
    assert all(f"<!-- claims:{name} -->" in shipped for name in names)
    page.write_text("".join(f"<!-- claims:{name} -->\nNot run yet\n<!-- /claims -->\n" for name in names))
    run(claims, model, tmp_path, "--only", "gray,gray-double", "--claims", str(page))
    text = page.read_text()

    def place(name: str) -> str:
        return text.split(f"<!-- claims:{name} -->")[1].split("<!-- /claims -->")[0]

    assert "error at noise level 0.9, gray-double" in place("omini-blocks") and "gray at 0.25" in place(
        "omini-strength"
    )
    for question in claims.QUESTIONS:
        assert question.name == "omini-blocks" or "Not run yet" in place(question.name)


def test_a_study_that_was_stopped_reads_what_it_trained(claims, model, tmp_path):
    first = run(claims, model, tmp_path, "--only", "gray-add")
    state = tmp_path / "runs" / "gray-add" / "state.pt"
    before = torch.load(state, weights_only=True)["parameters"]
    second = run(claims, model, tmp_path, "--only", "gray-add")
    assert first["trials"] == second["trials"]
    after = torch.load(state, weights_only=True)["parameters"]
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_an_unknown_trial_is_refused(claims, capsys):
    with pytest.raises(SystemExit):
        claims.parse(["--icons", "x", "--only", "grey"])
    assert "no trial 'grey'; there are gray" in capsys.readouterr().err


def predictions(task: TokenTask, seed: int = 0) -> torch.Tensor:
    from condit.encoders.vae import encode_tokens

    batch = task.examples(task.held_out, 2)
    x0, text = encode_tokens(task.vae, batch.images), task.text(batch.captions)
    keep = torch.zeros(len(x0), dtype=torch.bool)
    with torch.no_grad():
        return task.predict(x0, torch.full((len(x0),), 0.5), text, *task.conditions(batch, text, keep))


def shaken(task: TokenTask) -> TokenTask:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in task.omini.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return task


def test_keys_in_all_blocks_are_the_tokens_in_the_sequence_and_in_double_blocks_they_are_not(model, monkeypatch):
    tokens = shaken(TokenTask(ICONS, model, kind="gray"))
    double = shaken(TokenTask(ICONS, model, kind="gray", variant={"what": "double"}))
    expected = predictions(tokens)
    assert (predictions(double) - expected).abs().max() > 1e-3
    everywhere = lambda self, call, attend: (  # noqa: E731
        attend(call if call.image is None else call.append_kv(*self.memory[call.site.path]))
    )
    monkeypatch.setattr(InDoubleBlocks, "around", everywhere)
    torch.testing.assert_close(predictions(double), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["double", "add"])
def test_gradients_reach_the_adapter_in_every_variant(model, what):
    task = shaken(TokenTask(ICONS, model, kind="gray", variant={"what": what}))
    batch = task.examples(task.held_out, 2)
    task(batch, torch.Generator().manual_seed(0))[0].backward()
    assert sum(float(p.grad.abs().sum()) for p in task.omini.parameters() if p.grad is not None) > 0


def test_strength_of_a_variant_is_the_log_weight_of_a_control(model):
    task = shaken(TokenTask(ICONS, model, kind="gray"))
    plain = predictions(task)
    task.variant = Variant(strength=0.5)
    assert (predictions(task) - plain).abs().max() > 1e-4
    task.variant = Variant()
    assert torch.equal(predictions(task), plain)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"what": "times"}, "'tokens', 'double' or 'add'; found 'times'"),
        ({"what": "double", "independent": False}, "independent condition"),
        ({"what": "add", "scale": 2}, "Leave scale, delta and strength out"),
    ],
)
def test_variants_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Variant(**given)
