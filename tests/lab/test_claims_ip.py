"""benchmarks/claims_ip.py: trials are built as they say, and a step of each is trained, drawn and measured."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from condit.nn.attention import Call, attend
from condit.training.deadiff import DEADiffTask
from condit_lab.icons.world import IconWorld
from few_icons import few_icons

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"
ICONS = few_icons()
SCRIPTS = ("timing", "trials", "ip_variants", "claims_ip")


@pytest.fixture(scope="module")
def claims():
    sys.path.insert(0, str(FOLDER))
    try:
        for name in SCRIPTS:
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        yield sys.modules["claims_ip"]
    finally:
        sys.path.remove(str(FOLDER))
        for name in SCRIPTS:
            sys.modules.pop(name, None)


@pytest.fixture
def model(random_tiny, make_tiny_unet, tmp_path) -> str:
    return str(make_tiny_unet(tmp_path / "model"))


@pytest.fixture
def run(claims, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["ip_variants"], "DRAW_STEPS", 1)
    monkeypatch.setattr(sys.modules["ip_variants"].rulers, "BANK", 60)

    def go(*more: str) -> dict:
        sizes = ["--steps", "1", "--batch", "2", "--count", "4", "--draw", "2"]
        claims.main(["--icons", ICONS, "--model", model, *sizes, "--out", str(tmp_path / "out"), *more])
        return json.loads((tmp_path / "out" / "claims.json").read_text())

    return go


def built(claims, model: str, name: str, *more: str):
    given = claims.parse(["--icons", ICONS, "--model", model, *more])
    return claims.build(claims.TRIALS[name], given)


def learning(task) -> set[str]:
    return {name for name, p in task.named_parameters() if p.requires_grad}


def test_with_tokens_appended_to_the_text_the_projector_alone_learns_unless_the_maps_do(claims, model):
    decoupled, appended, maps = (
        learning(built(claims, model, name)) for name in ("decoupled", "beside", "beside-maps")
    )
    assert appended == {n for n in decoupled if n.startswith("ip.image_proj.")} and appended
    assert maps == decoupled and any(".to_k_ip." in n for n in maps) and any(".to_v_ip." in n for n in maps)
    assert all(n.startswith(("ip.image_proj.", "ip.ip_adapter.")) for n in maps)


def test_trials_of_one_question_start_equal_and_see_equal_batches(claims, model):
    import random

    tasks = [built(claims, model, name) for name in ("decoupled", "beside")]
    one, other = (task.state_dict() for task in tasks)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    a, b = (task.batch(random.Random(3), 4) for task in tasks)
    assert torch.equal(a.pairs.references, b.pairs.references) and a.pairs.captions == b.pairs.captions
    assert not torch.equal(a.pairs.references, a.pairs.images)
    own = built(claims, model, "decoupled-own").batch(random.Random(3), 4)
    assert torch.equal(own.pairs.references, own.pairs.images)


def test_tokens_appended_to_the_text_share_its_softmax_and_its_frozen_maps(claims, model):
    task = built(claims, model, "beside")
    features = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    control = task.acting(features)
    site = next(s for s in task.unet.sites if s.kind == "cross")
    heads = control.inner.kv[site.path][0].shape[1]
    width = task.unet.get_submodule(site.path).to_k.out_features
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, n, width // heads, generator=g) for n in (6, 5, 5))
    actual = attend(Call(q, k, v, site), [control])
    layer, tokens = task.unet.get_submodule(site.path), task.ip.image_proj(features)
    image_k, image_v = (m(tokens).unflatten(-1, (heads, -1)).transpose(1, 2) for m in (layer.to_k, layer.to_v))
    scores = torch.cat([q @ k.mT, q @ image_k.mT], -1) / math.sqrt(width // heads)
    expected = scores.softmax(-1) @ torch.cat([v, image_v], 2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    # One softmax: not the text's answer with the image's added to it, which is what the decoupled control gives.
    plain = attend(Call(q, k, v, site))
    added = plain + (q @ image_k.mT / math.sqrt(width // heads)).softmax(-1) @ image_v
    assert (actual - added).abs().max() > 1e-2
    other = next(s for s in task.unet.sites if s.kind == "self")
    assert torch.equal(attend(Call(q, k, v, other), [control]), plain)


def test_swapped_layers_are_the_others(claims, model):
    tasks = [built(claims, model, name) for name in ("deadiff", "deadiff-swapped")]
    assert all(isinstance(task, DEADiffTask) for task in tasks)
    right, swapped = (set(task.adapter.config.content_layers) for task in tasks)
    count = len(tasks[0].adapter.paths)
    assert right and swapped and not right & swapped and right | swapped == set(range(count))
    one, other = (task.state_dict() for task in tasks)
    assert all(torch.equal(one[n], other[n]) for n in one)
    images = torch.rand(1, 3, 128, 128) * 2 - 1
    tables = []
    for task in tasks:
        tokens = task.shown("style", task.tower(images))
        tables.append(task.control(tokens, torch.zeros(1, 32, 16, 16)).table)
    assert all(tables[0][path] != tables[1][path] for path in tables[0])


def test_readers_may_start_from_finished_adapters_and_the_maps_never_do(claims, model, tmp_path):
    for name, folder in (("decoupled", "style"), ("deadiff", "deadiff")):
        finished = built(claims, model, name)
        with torch.no_grad():
            for p in finished.parameters():
                p.mul_(1.5)
        finished.export(tmp_path / "done" / folder, {})
        fresh = built(claims, model, name).state_dict()
        actual = built(claims, model, name, "--readers", str(tmp_path / "done")).state_dict()
        ready = finished.state_dict()
        reader = ("ip.image_proj.",) if name == "decoupled" else ("adapter.style.", "adapter.content.")
        assert any(n.startswith(reader) for n in actual)
        for n, x in actual.items():
            if n.startswith(reader):
                torch.testing.assert_close(x, ready[n], rtol=1e-3, atol=1e-4)  # kept in halves
            else:
                assert torch.equal(x, fresh[n])


def test_a_wrong_reference_is_of_another_style_and_concept(claims):
    scene = sys.modules["ip_variants"].Scene.open(IconWorld.open(ICONS), 12, 0)
    for i, j in enumerate(scene.elsewhere.tolist()):
        assert scene.wanted[i].style != scene.wanted[j].style and scene.wanted[i].base != scene.wanted[j].base
    style, content = (scene.batch(kind, torch.arange(12)) for kind in ("style", "content"))
    for i, icon in enumerate(scene.wanted):
        assert style.captions[i] == icon.label and icon.label not in content.captions[i]
        assert scene.shown[i].style == icon.style and scene.shown[i].base != icon.base
    assert not torch.equal(style.references, content.references)
    assert torch.equal(scene.batch("style", torch.tensor([0]), torch.tensor([3])).references, style.references[3:4])


def test_trials_are_trained_generated_and_measured_and_their_claims_fill_a_page(claims, run, tmp_path):
    page = tmp_path / "page.md"
    names = [compared.question.name for compared in claims.COMPARED]
    shipped = (FOLDER.parent / "docs" / "claims.md").read_text()
    assert all(f"<!-- claims:{name} -->" in shipped for name in names)
    page.write_text("".join(f"<!-- claims:{name} -->\nNot run yet\n<!-- /claims -->\n" for name in names))
    trials = "decoupled,decoupled-own,deadiff,deadiff-swapped"
    report = run("--only", trials, "--claims", str(page))
    assert set(report["trials"]) == set(trials.split(",")) and set(report["drawn"]["deadiff"]) == set()
    for row in (kind for trial in report["trials"].values() for kind in trial.values()):
        assert row["error"]["n"] == 4 and row["error"]["low"] <= row["error"]["value"] <= row["error"]["high"]
    values = [row["error"]["value"] for trial in report["trials"].values() for row in trial.values()]
    assert len(set(values)) == len(values)  # none is another one under its name
    text = page.read_text()

    def place(name: str) -> str:
        return text.split(f"<!-- claims:{name} -->")[1].split("<!-- /claims -->")[0]

    assert "Not run yet" in place("ip-decoupled")
    assert "| style score, decoupled-own minus decoupled, the same noise |" in place("ip-pairs")
    assert "leakage, increase, decoupled |" in place("ip-pairs")
    for kind in ("style", "content"):
        assert f"| error on {kind} pairs, deadiff-swapped minus deadiff, the same icons |" in place("deadiff-layers")
    # Another run reads what was trained and drawn; another setting trains anew.
    states = [tmp_path / "out" / "runs" / name / "state.pt" for name in trials.split(",")]
    before = [file.stat().st_mtime_ns for file in states]
    again = run("--only", trials)
    assert again["trials"] == report["trials"] and again["drawn"] == report["drawn"]
    assert [file.stat().st_mtime_ns for file in states] == before
    run("--only", "deadiff", "--seed", "1")
    assert states[2].stat().st_mtime_ns != before[2] and states[3].stat().st_mtime_ns == before[3]


def test_an_unknown_trial_is_refused(claims, capsys):
    with pytest.raises(SystemExit):
        claims.parse(["--icons", "x", "--only", "besides"])
    assert "no trial 'besides'; there are decoupled" in capsys.readouterr().err
