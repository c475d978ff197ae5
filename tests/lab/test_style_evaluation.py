"""`condit evaluate style` on the packed sample and the embedded model: 4 pairs, 2 steps; the tables and the page."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from condit.controls.ip_adapter import IPConfig
from condit.weights.catalog import MODELS, Entry, Kind
from condit.weights.files import save_tensors
from condit_lab.icons.world import IconWorld, sample_path
from condit_lab.suites import style, style_rows, style_rulers
from condit_lab.suites.style import Protocol, choose_pairs, evaluate_style, rank_blocks, write_table
from condit_lab.suites.style_claims import CLAIMS, style_claims
from condit_lab.suites.style_methods import (
    METHODS,
    Method,
    Stage,
    choose,
    look,
    nothing,
    plain,
    subtracted,
    with_strengths,
)
from condit_lab.suites.style_rulers import (
    ACCURACY,
    ALIGNMENT,
    LEAKAGE,
    LIKENESS,
    MEASURES,
    OWN,
    RETRIEVAL,
    SCORE,
    SUBJECT,
    TOP5,
)

COUNT = 4
STRENGTHS = ("plain=0.5,1", "subtract=0,1", "block=2", "subject=1")
ASKED = ("plain", "subtract", "block", "subject", "subject-tokens", "copy", "real")


@pytest.fixture(scope="module")
def world():
    return IconWorld.open(sample_path())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run, and what it told."""
    folder, messages = tmp_path_factory.mktemp("style"), []
    sites = ("transformer_blocks.0.attn",)
    protocol = Protocol(count=COUNT, steps=2, methods=ASKED, strengths=STRENGTHS, sites=sites)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style_rulers, "BANK", 60)  # the manifold of real icons is half of the time otherwise
        return folder, evaluate_style(folder, protocol, tell=messages.append), messages


def value(result, method, measure, strength=1.0):
    rows = [r for r in result["rows"] if (r["method"], r["strength"], r["measure"]) == (method, strength, measure)]
    return rows[0]["value"] if rows else None


def test_a_method_is_run_with_its_no_control_and_its_baseline():
    assert [m.name for m in choose(["subtract"])] == ["none", "plain", "subtract"]
    assert [m.name for m in choose(["subject"])] == ["none", "subject"]
    with pytest.raises(ValueError, match="There is no method 'worms'. Choose from: none, words, plain"):
        choose(["worms"])


def test_a_method_of_another_model_is_held_against_its_own_baseline():
    rows = (
        Method("other-none", "no control", nothing, model="other", blank="other-none", baseline=None),
        Method("other-plain", "plain", plain, model="other", blank="other-none", baseline="other-plain"),
        Method("other", "another", plain, model="other", blank="other-none", baseline="other-plain"),
    )
    assert [m.name for m in choose(["other"], METHODS + rows)] == ["other-none", "other-plain", "other"]
    assert len(choose(None, METHODS + rows)) == len(METHODS) + 3


def test_strengths_are_given_to_all_or_to_one():
    methods = {m.name: m.strengths for m in with_strengths(choose(["subtract", "copy"]), ["1,0.3,1", "subtract=0.5"])}
    assert methods == {"none": (1.0,), "plain": (0.3, 1.0), "subtract": (0.5,), "copy": (1.0,)}
    for wrong in ("plain=", "a,b", "plain=nan"):
        with pytest.raises(ValueError, match="Strengths must be numbers"):
            with_strengths(METHODS, [wrong])
    with pytest.raises(ValueError, match="'adain', which is not among the methods"):
        with_strengths(choose(["subtract"]), ["adain=1"])


def test_the_block_probe_has_other_pairs_than_the_evaluation(world):
    cells, spare = choose_pairs(world, Protocol(count=8))
    assert (len(cells), len(spare)) == (8, 8)
    assert not {c.icon for c in cells} & {c.icon for c in spare}
    assert choose_pairs(world, Protocol(count=5))[0] == cells[:5]
    few, rest = choose_pairs(world, Protocol(count=500))
    assert len(few) > 40 and len(rest) == style.PROBE


def test_references_are_not_from_training_and_show_another_concept(world):
    cells, _ = choose_pairs(world, Protocol(count=12))
    given = look(world, cells)
    for wanted, icon in zip(given.wanted, given.icons, strict=True):
        assert icon.split != "train" and wanted.split == "combo"
        assert icon.style == wanted.style and icon.base != wanted.base
    assert all(a.base == b.base for a, b in zip(given.wanted, look(world, cells, "subject").icons, strict=True))


def test_blocks_are_ranked_by_leakage_among_those_with_style():
    layers = [("idle", 0.0, -0.01), ("style", 0.2, 0.02), ("both", 0.3, 0.2), ("weak", 0.1, 0.0)]
    ranked = rank_blocks([{"site": s, "style": a, "leakage": b, "n": 4} for s, a, b in layers])
    assert [entry["site"] for entry in ranked] == ["style", "both", "weak", "idle"]
    none = rank_blocks([{"site": s, "style": a, "leakage": 0.0, "n": 4} for s, a in (("x", -0.2), ("y", -0.1))])
    assert [entry["site"] for entry in none] == ["y", "x"]


def test_figures_of_known_methods_have_their_known_values(run):
    result = run[1]
    assert result["n"] == COUNT and result["concepts"] == COUNT
    # No control leaks nothing above itself; the reference leaks itself and lies where it is asked for.
    assert value(result, "none", LEAKAGE) == value(result, "none", OWN) == value(result, "none", LIKENESS) == 0
    assert value(result, "copy", RETRIEVAL) == 1
    assert (value(result, "copy", LEAKAGE) or 0) > 0.1
    assert (value(result, "copy", LIKENESS) or 0) > 0.8
    assert value(result, "real", SUBJECT) == pytest.approx(1)
    # Subtracting nothing is the plain adapter at 1.
    for measure in (SCORE, ACCURACY, LEAKAGE, LIKENESS, TOP5):
        assert value(result, "subtract", measure, 0.0) == value(result, "plain", measure, 1.0)
    assert value(result, "subtract", SCORE, 1.0) != value(result, "plain", SCORE, 1.0)
    # Of a method that is shown the subject, style and leakage of the reference have no meaning.
    assert value(result, "subject", RETRIEVAL) is None and value(result, "subject", LEAKAGE) is None
    assert value(result, "subject", SUBJECT) is not None
    assert all(r["low"] <= r["value"] <= r["high"] for r in result["rows"])


def test_every_point_is_compared_with_the_baselines_curve(run):
    result = run[1]
    compared = {m.name for m in MEASURES if m.compared}
    points = {(x["method"], x["strength"]) for x in result["comparisons"]}
    assert points == {("subtract", 0.0), ("subtract", 1.0), ("block", 2.0), ("copy", 1.0), ("real", 1.0)}
    for method, strength in points:
        assert {x["measure"] for x in result["comparisons"] if (x["method"], x["strength"]) == (method, strength)} == (
            compared
        )
    assert all(x["baseline"] == "plain" for x in result["comparisons"])


def test_methods_that_are_shown_a_subject_are_compared_image_by_image(run):
    result = run[1]
    assert {(p["method"], p["other"]) for p in result["pairs"]} == {("subject-tokens", "subject")}
    for measure in (LIKENESS, SUBJECT, TOP5):
        [pair] = [p for p in result["pairs"] if p["measure"] == measure]
        one, other = (value(result, name, measure) or 0 for name in ("subject-tokens", "subject"))
        assert pair["value"] == pytest.approx(one - other, abs=2e-4) and pair["n"] == COUNT
        assert pair["low"] <= pair["value"] <= pair["high"]
    assert not {p["measure"] for p in result["pairs"]} & {LEAKAGE, RETRIEVAL}
    assert "| OminiControl shown the subject | plain IP-Adapter shown the subject | 1 |" in style_rows.markdown(result)


def test_the_claims_hold_the_figures_of_the_run(run):
    result = run[1]
    claims = style_claims(result)
    assert claims.keys() == CLAIMS.keys() - {"deadiff-prompt"}  # which a UNet answers
    assert all("`condit evaluate style --count 4" in text for text in claims.values())
    assert (
        f"| {LIKENESS}, OminiControl shown the subject | {value(result, 'subject-tokens', LIKENESS):.3f} |"
        in claims["ip-subject"]
    )
    for entry in result["comparisons"]:
        if entry["measure"] != LEAKAGE or entry["method"] not in ("subtract", "block"):
            continue
        what = {m["name"]: m["what"] for m in result["methods"]}[entry["method"]] + f" at {entry['strength']:g}"
        lines = [line for line in claims["instantstyle-leakage"].splitlines() if f", {what} " in line]
        difference = entry["gap"]["difference"]
        if not entry["strength"]:
            assert not lines  # nothing is subtracted
        elif difference is None:
            assert len(lines) == 2 and f"{value(result, entry['method'], LEAKAGE, entry['strength']):.3f}" in lines[1]
        else:
            assert len(lines) == 1 and f"| {difference:.3f} | {entry['gap']['low']:.3f} to" in lines[0]
    others = {**result, "methods": [m for m in result["methods"] if m["name"] in ("none", "plain", "subject")]}
    assert style_claims(others) == {}


def test_the_command_writes_tables_and_claims_into_their_pages(run, tmp_path, monkeypatch, capsys):
    from condit.cli import main

    protocols = []
    monkeypatch.setattr(style, "evaluate_style", lambda out, protocol, **how: protocols.append(protocol) or run[1])
    page, claims = tmp_path / "page.md", tmp_path / "claims.md"
    page.write_text("<!-- style-evaluation -->\n<!-- /style-evaluation -->\n")
    places = style_claims(run[1])
    claims.write_text("".join(f"<!-- claims:{name} -->\nNot run yet\n<!-- /claims -->\n" for name in places))
    with pytest.raises(SystemExit) as end:
        main(
            [
                "evaluate",
                "style",
                "--bf16",
                "-n",
                "8",
                "--table",
                str(page),
                "--claims",
                str(claims),
                "-o",
                str(tmp_path),
            ]
        )
    assert not end.value.code, capsys.readouterr().err
    assert protocols == [Protocol(count=8, bf16=True)]
    assert " --count 8 --seed 0 --bf16" in protocols[0].command(data=False, adain=False)
    assert "| no control |" in page.read_text() and "Not run yet" not in claims.read_text()


class Silent:
    """A pipeline that must not draw."""

    def __init__(self, pipe):
        self.parts, self.dtype = pipe.parts, pipe.dtype

    def __call__(self, *args, **kwargs):
        raise AssertionError("drawn again")


def test_the_same_images_are_not_generated_again(run, stage, world):
    folder, result, messages = run
    assert sum("pictures" in line for line in messages) == 8  # none, plain twice, subtract twice, block, both subjects
    protocol = Protocol(count=COUNT, steps=2)
    silent = {"tiny": replace(stage, pipe=Silent(stage.pipe))}
    cells, _ = choose_pairs(world, protocol)
    study = style.StyleStudy(protocol, world, cells, folder / "images", silent, lambda line: None)
    method = next(m for m in METHODS if m.name == "plain")
    assert len(style.make_pictures(study, method, 0.5)) == COUNT
    with pytest.raises(AssertionError, match="drawn again"):
        style.make_pictures(replace(study, protocol=Protocol(count=COUNT, steps=3)), method, 0.5)


def test_rulers_are_examined_on_real_icons(run):
    values = {row["ruler"].split(" (")[0]: row for row in run[1]["rulers"]}
    assert values["judge's logits"]["style"] > 0.8 and abs(values["judge's logits"]["concept"] - 0.5) < 0.1
    assert values["CLIP's concept half"]["concept"] > 0.8 and abs(values["CLIP's concept half"]["style"] - 0.5) < 0.1


def test_the_run_leaves_a_page_and_figures(run):
    folder, result, _ = run
    assert json.loads((folder / "style.json").read_text()) == json.loads(json.dumps(result))
    assert result["command"].startswith("condit evaluate style --count 4 --seed 0 --methods plain,subtract")
    page = (folder / "index.html").read_text()
    assert "://" not in page and page.count("<img") >= 8
    assert len(list((folder / "plots").iterdir())) == sum(m.compared for m in MEASURES)
    with Image.open(folder / "sheets" / "subtract.png") as sheet:
        assert sheet.width > 500
    with Image.open(folder / "plots" / "text-alignment-ta.png") as plot:
        assert len(plot.convert("RGB").getcolors(1_000_000) or ()) > 20


def test_the_tables_take_their_place_in_a_document(run, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- style-evaluation -->\nold\n<!-- /style-evaluation -->\nafter\n")
    write_table(run[1], document)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| no control |  |" in text and "| content subtraction | 0 |" in text
    assert "the curve |" in text or " even |" in text


def test_what_cannot_run_is_said_or_refused(tmp_path, world):
    with pytest.raises(ValueError, match="AdaIN needs the weights"):
        evaluate_style(tmp_path, Protocol(count=4, methods=("adain",)))
    with pytest.raises(ValueError, match="at least 2; found 1"):
        evaluate_style(tmp_path, Protocol(count=1))
    study = style.StyleStudy(Protocol(), world, [], tmp_path, {"tiny": Stage(None)}, lambda line: None)
    assert [m.name for m in style.runnable(study, METHODS)] == ["none", "words", "copy", "real"]
    assert {"method": "unet-none", "why": "no model tiny-unet"} in study.skipped
    assert {"method": "adain", "why": "no weights of AdaIN; give their folder: --adain DIR"} in study.skipped
    requested = replace(study, protocol=Protocol(methods=("subject-tokens",)))
    with pytest.raises(ValueError, match="subject-tokens: no adapter tiny/subject"):
        style.runnable(requested, METHODS)


@pytest.fixture
def unet(make_tiny_unet, make_deadiff, tmp_path, monkeypatch):
    """A random UNet with its adapters in the catalog."""
    import condit
    from condit.encoders.clip_patches import ClipPatches
    from condit.encoders.qformer import QFormerConfig

    model = make_tiny_unet(tmp_path / "model")
    pipe = condit.load(model)
    width, features = pipe.backbone.config.cross_attention_dim, pipe.image.features
    tower = ClipPatches(pipe.image.clip.vision_model)
    sizes = {"queries": 2, "layers": 1, "heads": 2, "hidden": 8, "vocabulary": 30523, "positions": 4}
    made = {
        "style": condit.IPAdapter.new(pipe, IPConfig(features, 2, width)),
        "deadiff": condit.DEADiff.new(
            pipe.backbone, QFormerConfig(width=width, image_width=tower.features, **sizes), tower
        ),
    }
    monkeypatch.setitem(MODELS, "tiny-unet", Entry("model", "", "", model))
    kinds: dict[str, Kind] = {"style": "ip-adapter", "deadiff": "deadiff"}
    for name, kind in kinds.items():
        file = save_tensors(tmp_path / f"{name}.safetensors", made[name].tensors(), {"condit": made[name].metadata()})
        monkeypatch.setitem(MODELS, f"tiny-unet/{name}", Entry(kind, "", "", file))


def test_the_unets_rows_are_held_against_its_own_adapter(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(style_rulers, "BANK", 60)
    names = ("unet-subtract", "unet-preset", "unet-deadiff")
    strengths = tuple(f"{name}=1" for name in ("unet-plain", *names))
    result = evaluate_style(tmp_path / "out", Protocol(count=2, steps=1, methods=names, strengths=strengths))
    assert result["models"].keys() == {"tiny", "tiny-unet"} and not result["skipped"]
    assert {x["method"]: x["baseline"] for x in result["comparisons"]} == dict.fromkeys(names, "unet-plain")
    assert value(result, "unet-none", LEAKAGE) == 0
    drawn = {name: value(result, name, SCORE) for name in ("unet-none", "unet-plain", *names)}
    assert len(set(drawn.values())) == len(drawn)
    claims = style_claims(result)
    assert claims.keys() == {"instantstyle-leakage", "deadiff-prompt"}
    assert "UNet, InstantStyle's style block at 1" in claims["instantstyle-leakage"]
    assert f"| {ALIGNMENT}, UNet, plain IP-Adapter at 1, where" in claims["deadiff-prompt"]


@pytest.fixture(scope="module")
def stage():
    from condit.controls.ip_adapter import IPAdapter
    from condit.drawing.loading import load

    pipe = load("tiny")
    return Stage(pipe, {"tiny/style": IPAdapter.load("tiny/style", pipe)})


def test_subtraction_feeds_the_adapter_the_difference_and_leaves_the_statistics(stage, world):
    given = look(world, choose_pairs(world, Protocol(count=2))[0])
    image, adapter = stage.pipe.image, stage.adapters["tiny/style"]
    features = image(stage.pipe.read_images(list(given.references), None))
    words = stage.pipe.parts.text([icon.label for icon in given.icons]).pooled / 128**0.5 * image.gain
    expected = features.clone()
    expected[:, :256] -= 0.5 * words
    [control] = subtracted(stage, given, 0.5)
    wanted = adapter.reference(expected)
    for path, (k, v) in control.kv.items():
        assert torch.allclose(k, wanted.kv[path][0], atol=1e-4) and torch.allclose(v, wanted.kv[path][1], atol=1e-3)
    # The side without a prompt isn't shifted (InstantStyle).
    assert all(
        torch.equal(a, b)
        for path in control.empty
        for a, b in zip(control.empty[path], wanted.empty[path], strict=True)
    )


def test_markdown_names_what_was_left_out(run):
    result = {**run[1], "skipped": [{"method": "adain", "why": "no weights"}]}
    assert style_rows.markdown(result).endswith("Left out: adain (no weights).\n")
