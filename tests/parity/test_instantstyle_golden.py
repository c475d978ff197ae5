"""InstantStyle against the official classes, and weight types against ComfyUI_IPAdapter_plus; golden/instantstyle holds
what they computed. What is compared, and how exactly: lab/src/condit_lab/parity/instantstyle.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from condit.controls.instantstyle import EASES, STAGES, block_weights
from condit.controls.ip_reference import IPReference
from condit.controls.wrap import Together
from condit.drawing.pipeline import Pipeline
from condit.encoders.text import ClipText
from condit_lab.parity.check import difference
from condit_lab.parity.instantstyle import CHECKS, SETS, Comfy, embedded, runs_of, sets_of, style_of
from condit_lab.parity.unets import CALL, TOKENS, golden_pipe

FOLDER = Path(__file__).parent / "golden" / "instantstyle"
CASES = [("sdxl", "global"), ("sdxl", "plus"), ("sd15", "global")]
every_case = pytest.mark.parametrize(("tag", "variant"), CASES)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_the_recorded_tensors_are_reproduced(check):
    assert check.run(FOLDER).exceeding() == []


@every_case
def test_strength_zero_is_the_plain_unet_and_a_preset_holds_no_other_weights(tag, variant):
    pipe = golden_pipe(FOLDER, tag)
    given, whole = pipe.tensors("inputs"), load_file(pipe.file(f"{variant}_adapter.safetensors"))
    official = pipe.config["selected_attn2_processors"]
    plain = pipe.predict(given)
    for name in sets_of(FOLDER, tag):
        style = style_of(FOLDER, tag, variant, SETS[name])
        assert torch.equal(pipe.predict(given, embedded(FOLDER, tag, style, SETS[name], 0.0)), plain)
        some, count = style.adapter.tensors(), len(official[f"{variant}/{name}"])
        assert len(style.adapter.ip_adapter) == count
        assert all(torch.equal(t, whole[n]) for n, t in some.items())
        assert len(some) == len(whole) - 2 * (len(official[f"{variant}/all"]) - count)


@every_case
def test_a_session_of_one_preset_equals_the_whole_adapter_with_it(tag, variant):
    pipe = golden_pipe(FOLDER, tag)
    given = pipe.tensors("inputs")
    part, whole = (
        pipe.predict(given, embedded(FOLDER, tag, style_of(FOLDER, tag, variant, held), "style", 0.7))
        for held in ("style", "all")
    )
    assert torch.equal(part, whole)


def test_every_run_of_the_official_generate_is_compared():
    counts = {
        f"{tag}_{variant}": len(runs_of(golden_pipe(FOLDER, tag).tensors(f"{variant}_ddim"))) for tag, variant in CASES
    }
    assert counts == {"sdxl_global": 7, "sdxl_plus": 4, "sd15_global": 5}


def test_a_reference_each_for_style_and_layout_acts_in_its_blocks_with_the_weights_once():
    pipe, style = golden_pipe(FOLDER, "sdxl"), style_of(FOLDER, "sdxl", "global")
    given = pipe.tensors("inputs")
    rng = np.random.default_rng(0)
    one, other = (Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(2))
    both = style.control(style=one, layout=other, strength=0.8, layout_strength=0.3)
    assert isinstance(both, Together)
    parts = [cast("IPReference", part) for part in both.inside]
    assert all(p.adapter is style.adapter for p in parts)
    apart = [style.control(one, preset="style", strength=0.8), style.control(other, preset="layout", strength=0.3)]
    assert difference(pipe.predict(given, both), pipe.predict(given, *apart)) <= CALL
    assert {p.split(".transformer_blocks.")[0] for part in parts for p in part.kv} == {
        "up_blocks.0.attentions.1",
        "down_blocks.2.attentions.1",
    }
    part = style_of(FOLDER, "sdxl", "global", "style")
    with pytest.raises(ValueError, match="preset 'layout' acts at .* whose K', V' were not loaded"):
        part.control(one, preset="layout")
    with pytest.raises(ValueError, match="one reference, or style= and layout="):
        style.control()


# ComfyUI's weight types


def test_every_weight_type_of_comfys_fixture_is_known():
    stored = [n.split("/") for n in Comfy(FOLDER, "comfy_weight_types").tensors if n.startswith("layers")]
    assert {kind for _, kind, _ in stored} == {*EASES, *STAGES, "style transfer precise", "composition precise"}
    assert len(stored) >= 2 * 11


@pytest.mark.parametrize("kind", ["style transfer precise", "composition precise"])
def test_what_a_precise_type_pushes_away_is_named_by_the_type(kind):
    comfy = Comfy(FOLDER, "comfy_weight_types")
    _, away = comfy.precise(11, kind)
    against = block_weights(kind, comfy.sites(11)).against
    assert against is not None and all(f"{comfy.places(11)[place]}.*" in against for place in away)


def test_sdxls_second_text_encoder_names_what_to_leave_out(make_sd, make_latent):
    """Its pooled prompt is the content vector of the official code; SD 1.x has no projection, so no tower."""
    theirs, ours = make_sd("sdxl"), make_latent("sdxl")
    parts = [theirs.tokenizer, theirs.tokenizer_2], [theirs.text_encoder, theirs.text_encoder_2]
    pipe = Pipeline(replace(ours.parts, text=ClipText(*parts, penultimate=True)))
    tower = pipe.text_tower()
    assert tower is not None
    _, _, pooled, _ = theirs.encode_prompt("a red fox", do_classifier_free_guidance=False)
    assert difference(tower(["a red fox"]), pooled) <= TOKENS
    assert make_latent("sd15").text_tower() is None
