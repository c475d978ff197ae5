"""Finished runs become the shipped folder, whole or one adapter at a time."""

import json

import pytest
import torch

from condit.weights.files import read_tensors, save_tensors
from condit_lab.training.ship import ADAPTERS, FAMILIES, MODEL, ship


def make_run(runs, name, inner, value):
    """A finished run whose export holds one number."""
    folder = runs / name / "export" / inner
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "weights.safetensors", {"x": torch.tensor([value])})
    (runs / name / "export" / "card.json").write_text(
        json.dumps({"steps": 2, "images_seen": 4, "seconds": 60, "figures": {"error": value}})
    )
    (runs / name / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "images_per_s": 9.0}\n')


@pytest.fixture
def runs(tmp_path):
    for name, inner in [*MODEL.values(), ADAPTERS["gray"], ADAPTERS["edges"]]:
        make_run(tmp_path / "runs", name, inner, 1.0)
    (tmp_path / "ATTRIBUTION.md").write_text("by somebody")
    ship(tmp_path / "runs", tmp_path / "out", [tmp_path / "ATTRIBUTION.md"])
    return tmp_path


def test_a_whole_model_is_shipped_with_its_cards(runs):
    cards = json.loads((runs / "out" / "cards.json").read_text())
    assert [*cards] == ["model/clip", "model/vae", "model/transformer", "model/canvas", "edges", "gray"]
    assert "by somebody" in (runs / "out" / "ATTRIBUTION.md").read_text()


def test_one_adapter_is_shipped_and_the_rest_stays(runs):
    for name in ("edges", "subject"):
        make_run(runs / "runs", *ADAPTERS[name], 2.0)
    make_run(runs / "runs", *ADAPTERS["gray"], 3.0)  # not asked for
    ship(runs / "runs", runs / "out", only=["edges", "subject"])
    values = {
        n: float(read_tensors(runs / "out" / n / "weights.safetensors")["x"]) for n in ("edges", "subject", "gray")
    }
    assert values == {"edges": 2.0, "subject": 2.0, "gray": 1.0}
    cards = json.loads((runs / "out" / "cards.json").read_text())
    assert [*cards][-3:] == ["subject", "edges", "gray"] and cards["gray"]["figures"] == {"error": 1.0}
    assert (runs / "out" / "COMPLETE").exists() and (runs / "out" / "ATTRIBUTION.md").exists()


def test_what_cannot_be_shipped_leaves_the_folder_as_it_was(runs):
    with pytest.raises(ValueError, match="No part 'colour'"):
        ship(runs / "runs", runs / "out", only=["colour"])
    with pytest.raises(ValueError, match="has no export yet"):
        ship(runs / "runs", runs / "out", only=["edges", "subject"])
    with pytest.raises(ValueError, match="needs attribution"):
        ship(runs / "runs", runs / "out")
    assert not (runs / "out" / "subject").exists() and (runs / "out" / "COMPLETE").exists()


def test_the_unet_is_a_family_of_its_own(runs):
    family = FAMILIES["tiny-unet"]
    for run, inner in (*family.model.values(), *family.adapters.values()):
        make_run(runs / "runs", run, inner, 5.0)
    part = runs / "runs" / "small-unet-adapters" / "export" / "model" / "unet"
    part.mkdir()
    (part / "config.json").write_text("{}")
    ship(runs / "runs", runs / "unet", [runs / "ATTRIBUTION.md"], family="tiny-unet")
    assert [*json.loads((runs / "unet" / "cards.json").read_text())] == ["model", "style", "plus", "deadiff"]
    assert (runs / "unet" / "model" / "unet" / "config.json").is_file()
    assert not (runs / "unet" / "model" / "card.json").exists()
    with pytest.raises(ValueError, match="No part 'edges'"):
        ship(runs / "runs", runs / "unet", only=["edges"], family="tiny-unet")
