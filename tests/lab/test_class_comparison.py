"""Class models trained for a step on icons: embedded, exported, and compared on the same icons."""

import json

import pytest
import torch
from PIL import Image

import condit
from class_tasks import SIZES, VIT, step, write_vae
from condit.training.class_conditional import ClassConditionalData, ClassConditionalTask
from condit.training.classify import ClassifyData, ClassifyTask
from condit.weights import catalog
from condit.weights.diffit import load_diffit
from condit.weights.dit import load_dit
from condit.weights.files import read_tensors
from condit.weights.folders import WEIGHTS
from condit_lab.suites.class_claims import class_claims
from condit_lab.suites.classes import (
    ACCURACY,
    AGREEMENT,
    CLIP,
    CONCEPT,
    CONCEPT5,
    DISTANCE,
    ERROR,
    card_of,
    evaluate_classes,
)
from condit_lab.training.ship import copy_part
from few_icons import few_icons

ICONS = few_icons()


@pytest.fixture(scope="module")
def coarse(tmp_path_factory) -> dict[str, str]:
    """A latent of 8 x 8 for icons, and a cache that the tests share."""
    folder = tmp_path_factory.mktemp("coarse")
    return {"vae": write_vae(folder / "vae", 16), "cache": str(folder / "cache")}


@pytest.mark.parametrize(
    "backbone, more", [("DiT", {"checkpointing": True}), ("DiT", {"adaln": "plain"}), ("DiffiT", {})], ids=str
)
def test_a_backbone_trains_a_step_on_icons_and_its_export_loads_strictly(backbone, more, tmp_path, coarse):
    task = ClassConditionalTask(
        ClassConditionalData(backbone=backbone, sizes=SIZES, icons=ICONS, label="style", flip=False, **coarse, **more)
    )
    folder = step(task, tmp_path) / "transformer"
    network = load_diffit(folder / WEIGHTS) if backbone == "DiffiT" else load_dit(folder / WEIGHTS)
    assert network.config == task.network.config
    if backbone == "DiT":
        assert load_dit(folder).config.latent == (8, 8)
        assert load_dit(folder).config.gates == (more.get("adaln") != "plain")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, task.network.null_label])
    assert torch.equal(network(x, t, y), task.network.eval()(x, t, y))
    names = json.loads((folder / "config.json").read_text())["id2label"]
    assert [names[str(i)] for i in range(len(names))] == task.classes
    assert "twemoji" in task.classes
    assert "streamline-emojis" not in task.classes  # the style that nobody trains on


def test_an_embedded_class_model_is_halved_to_ship_and_generates_by_name(tmp_path, monkeypatch):
    task = ClassConditionalTask(
        ClassConditionalData(
            backbone="DiT", sizes=SIZES, icons=ICONS, label="style", flip=False, vae="tiny", predicts="x0"
        )
    )
    copy_part(step(task, tmp_path / "run"), tmp_path / "dit", half=True)
    tensors = read_tensors(tmp_path / "dit" / "transformer" / WEIGHTS).values()
    assert all(x.dtype is not torch.float32 for x in tensors)
    monkeypatch.setitem(catalog.MODELS, "small-dit", catalog.Entry("model", "random", "none", tmp_path / "dit"))
    pipe = condit.load("small-dit")
    assert next(pipe.backbone.parameters()).dtype is torch.float32
    (picture,) = pipe("twemoji", seed=0, num_inference_steps=2).images
    assert picture.size == (128, 128)
    (tmp_path / "cards.json").write_text(json.dumps({"dit": {"steps": 7}}))
    assert card_of("small-dit") == {"steps": 7} and card_of(str(tmp_path / "nowhere")) == {}


def test_exported_class_models_are_compared_on_the_same_icons(tmp_path, coarse):
    given = {"icons": ICONS, "label": "style", "flip": False, "sizes": SIZES, **coarse}
    folders = [
        step(ClassConditionalTask(ClassConditionalData(backbone=backbone, **given)), tmp_path / backbone)
        for backbone in ("DiT", "DiffiT")
    ]
    folders.append(step(ClassifyTask(ClassifyData(icons=ICONS, label="style", sizes=VIT)), tmp_path / "ViT"))
    folders.append(step(ClassifyTask(ClassifyData(icons=ICONS, label="base", sizes=VIT)), tmp_path / "concepts"))
    messages: list[str] = []
    result = evaluate_classes(folders, tmp_path / "out", data=ICONS, vae=coarse["vae"], count=16, tell=messages.append)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == result
    figures = {(f["model"], f["measure"]): f for f in result["figures"]}
    for name in ("DiT", "DiffiT"):
        for measure in (ERROR, AGREEMENT, DISTANCE):
            interval = figures[name, measure]["interval"]
            assert interval["low"] <= interval["value"] <= interval["high"]
    # The difference is of the same icons: its middle is that of the means.
    one, other = (figures[name, ERROR] for name in ("DiT", "DiffiT"))
    expected = other["interval"]["value"] - one["interval"]["value"]
    assert one["less"] is None and other["less"]["value"] == pytest.approx(expected)
    untrained, judge = (figures[name, ACCURACY]["interval"]["value"] for name in ("ViT", "the judge, a CNN"))
    assert 0 <= untrained < judge
    for who in ("concepts", CLIP):
        first, five = (figures[who, measure]["interval"] for measure in (CONCEPT, CONCEPT5))
        assert 0 <= first["value"] <= five["value"] <= 100 and first["n"] == five["n"] > 0
    assert (
        figures[CLIP, CONCEPT5]["interval"]["value"] > figures["concepts", CONCEPT5]["interval"]["value"]
    )  # untrained
    claims = class_claims(result)
    assert claims.keys() == {"diffit-dit", "vit-style", "vit-concept"}
    assert f"{result['models']['DiffiT']['parameters']:,}" in claims["diffit-dit"]
    assert result["models"]["DiT"]["steps"] == 1 and result["models"]["DiT"]["parameters"] > 1000
    assert Image.open(tmp_path / "out" / "classes.png").width > 200
    # Again, the same figures.
    again = evaluate_classes(folders[:1], tmp_path / "again", data=ICONS, vae=coarse["vae"], count=16)
    assert again["figures"][0]["interval"] == one["interval"]
    with pytest.raises(ValueError, match="is not a style of the icon world"):
        of_groups = step(ClassifyTask(ClassifyData(icons=ICONS, label="group", sizes=VIT)), tmp_path / "groups")
        evaluate_classes([folders[0], of_groups], tmp_path / "bad", data=ICONS, vae=coarse["vae"], count=16)
