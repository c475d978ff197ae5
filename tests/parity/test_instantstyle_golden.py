"""InstantStyle against the official classes, and weight types against ComfyUI_IPAdapter_plus; golden/instantstyle holds
what they computed. Tolerances of its README: tokens 1e-5, one UNet call 2e-5, trajectories 1e-4."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ip_golden import GOLDEN, close, golden_pipe
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from condit.controls.control import Control, Run, Step, Where
from condit.controls.instantstyle import EASES, STAGES, InstantStyle, block_weights, modules_of
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import Layer
from condit.controls.wrap import Together
from condit.drawing.pipeline import Pipeline
from condit.encoders.text import ClipText
from condit.nn.attention import Call, Site, join_heads, sdpa, split_heads

TOKENS, CALL, TRAJECTORY = 1e-5, 2e-5, 1e-4
SETS = {"all": "all", "style": "style", "layout": "layout", "style_layout": "style+layout"}
CASES = [("sdxl", "global"), ("sdxl", "plus"), ("sd15", "global")]
every_case = pytest.mark.parametrize(("tag", "variant"), CASES)


def pipe_of(tag: str):
    return golden_pipe(tag, "instantstyle")


@cache
def style_of(tag: str, variant: str, preset: str = "all") -> InstantStyle:
    pipe = pipe_of(tag)
    return InstantStyle.load(pipe.file(f"{variant}_adapter.safetensors"), pipe, preset=preset, head_dim=8)


def embedded(style: InstantStyle, tag: str, preset: str, scale: float) -> Control:
    from condit.controls.instantstyle import preset as blocks

    given = pipe_of(tag).tensors("inputs")
    hidden = style.adapter.config.feature == "hidden"
    embeds = given["clip_hidden_penultimate" if hidden else "clip_image_embeds"]
    return style.adapter.control(embeds=embeds, strength=scale, where=blocks(preset, pipe_of(tag).backbone))


def sets_of(tag: str) -> list[str]:
    return [name for name in SETS if name in pipe_of(tag).config["target_blocks"]]


@every_case
def test_each_preset_at_each_scale_is_the_official_one(tag, variant):
    pipe, style = pipe_of(tag), style_of(tag, variant)
    expected, given = pipe.tensors(f"{variant}_blocks"), pipe.tensors("inputs")
    hidden = variant == "plus"
    tokens = style.adapter.tokens(given["clip_hidden_penultimate" if hidden else "clip_image_embeds"])
    close(tokens, expected["tokens"], TOKENS)
    plain = pipe.predict(given)
    close(plain, given["noise_pred/no_adapter"], CALL)
    for name in sets_of(tag):
        for scale in ("0", "0.5", "1"):
            found = pipe.predict(given, embedded(style, tag, SETS[name], float(scale)))
            close(found, expected[f"{name}/scale_{scale}"], CALL)
            assert torch.equal(found, plain) == (scale == "0")
        close(found, expected[f"{name}/v1_scale_1"], CALL)


@every_case
def test_each_preset_acts_at_the_official_layers_and_holds_no_other_weights(tag, variant):
    pipe = pipe_of(tag)
    for name in sets_of(tag):
        official = pipe.config["selected_attn2_processors"][f"{variant}/{name}"]
        adapter = style_of(tag, variant, SETS[name]).adapter
        assert {f"{path}.processor" for path in adapter.sites} == set(official)
        assert len(adapter.ip_adapter) == len(official)  # no K', V' of other blocks
        some = adapter.tensors()
        whole = load_file(pipe.file(f"{variant}_adapter.safetensors"))
        assert all(torch.equal(t, whole[n]) for n, t in some.items())
        assert len(some) == len(whole) - 2 * (
            len(pipe.config["selected_attn2_processors"][f"{variant}/all"]) - len(official)
        )


@every_case
def test_a_session_of_one_preset_equals_the_whole_adapter_with_it(tag, variant):
    given = pipe_of(tag).tensors("inputs")
    part, whole = (
        pipe_of(tag).predict(given, embedded(style_of(tag, variant, held), tag, "style", 0.7))
        for held in ("style", "all")
    )
    assert torch.equal(part, whole)


@every_case
def test_the_official_generate_is_reproduced_with_presets_and_content_subtracted(tag, variant):
    pipe, style = pipe_of(tag), style_of(tag, variant)
    t = pipe.tensors(f"{variant}_ddim")
    picture = Image.fromarray(t["image_uint8"].numpy())
    close(style.adapter._encoder[0].pixels([picture]), t["pixel_values"], TOKENS)  # type: ignore[union-attr]
    if variant == "global":
        close(style.adapter.features([picture]), t["clip_image_embeds"], TOKENS)
    runs = sorted({n.split("/latents")[0] for n in t if "/latents/" in n})
    assert len(runs) == {"sdxl": {"global": 7, "plus": 4}, "sd15": {"global": 5}}[tag][variant]
    for run in runs:
        name, _, content = run.partition("/content_")
        words = {} if content == "none" else {"content": t["content_text_embed"], "content_scale": float(content)}
        strength = pipe.config["ddim"]["adapter_scale"]
        control = style.control(picture, preset=SETS[name], strength=strength, **words)
        found = style.adapter.features([picture])
        less = found if not words else found - float(content) * t["content_text_embed"]
        close(style.adapter.tokens(less), t[f"{run}/image_tokens"], TOKENS)
        nothing = style.adapter.tokens(style.adapter.nothing(found))
        close(nothing, t[f"{run}/uncond_image_tokens"], TOKENS)  # the negative side is not shifted
        for i, x in enumerate(pipe.ddim(t, control)):
            close(x, t[f"{run}/latents/step_{i + 1}"], TRAJECTORY)


def test_a_reference_each_for_style_and_layout_acts_in_its_blocks_with_the_weights_once():
    pipe, style = pipe_of("sdxl"), style_of("sdxl", "global")
    given = pipe.tensors("inputs")
    rng = np.random.default_rng(0)
    one, other = (Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(2))
    both = style.control(style=one, layout=other, strength=0.8, layout_strength=0.3)
    assert isinstance(both, Together) and all(part.adapter is style.adapter for part in both.inside)
    apart = [style.control(one, preset="style", strength=0.8), style.control(other, preset="layout", strength=0.3)]
    close(pipe.predict(given, both), pipe.predict(given, *apart), CALL)
    assert {p.split(".transformer_blocks.")[0] for part in both.inside for p in part.kv} == {
        "up_blocks.0.attentions.1",
        "down_blocks.2.attentions.1",
    }
    part = style_of("sdxl", "global", "style")
    with pytest.raises(ValueError, match="preset 'layout' acts at .* of which no K', V' were loaded"):
        part.control(one, preset="layout")
    with pytest.raises(ValueError, match="one reference, or style= and layout="):
        style.control()


# ComfyUI's weight types

FOLDER = GOLDEN / "instantstyle"
COMFY, FACTS = (
    load_file(FOLDER / "comfy_weight_types.safetensors"),
    json.loads((FOLDER / "comfy_weight_types.json").read_text()),
)
WEIGHT, HEADS = FACTS["base_weight_in_tensors"], FACTS["heads"]


class Tokens(nn.Module):
    """A projector that is given tokens."""

    tokens = 4

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


def comfy_sites(n: int) -> list[Site]:
    """In the order of the checkpoint, which is not that of execution: the middle stands last."""
    paths = FACTS["index_to_block"][f"layers{n}"]
    ordered = sorted(paths, key=lambda path: path.startswith("mid"))
    return [Site(f"{path}.transformer_blocks.0.attn2", "cross", i) for i, path in enumerate(ordered)]


def comfy_adapter(n: int) -> IPAdapter:
    layers = [Layer(i, site.path, 24, HEADS) for i, site in enumerate(comfy_sites(n))]
    adapter = IPAdapter(IPConfig(10, 4, 10, form="cross", feature="hidden"), layers, projector=Tokens())
    for pair in adapter.ip_adapter.values():
        pair.to_k_ip.weight.data = COMFY["to_k_ip"]  # type: ignore[union-attr]
        pair.to_v_ip.weight.data = COMFY["to_v_ip"]  # type: ignore[union-attr]
    return adapter.requires_grad_(False)


def branch(n: int, t: int, **how) -> Tensor:
    """What the image branch adds at index t, for the unconditional and the conditional row."""
    control = comfy_adapter(n).reference(COMFY["cond_tokens"], empty=COMFY["uncond_tokens"], **how)
    path = FACTS["index_to_block"][f"layers{n}"][t] + ".transformer_blocks.0.attn2"
    rows = []
    for row, side in enumerate((control.negative(), control)):
        run = Run(SimpleNamespace(sites=comfy_sites(n)), 1, (4, 6), torch.zeros(1, 0), None, 4)  # type: ignore[arg-type]
        acting = side.prepare(run).at(Step(0, 1, 1.0))
        q, k, v = (split_heads(COMFY[name][row : row + 1], HEADS) for name in ("q", "text_k", "text_v"))
        call = Call(q, k, v, Site(path, "cross", 0), image=slice(0, 24), plain=q)
        close(join_heads(sdpa(call)), COMFY["text_out"][row : row + 1], 1e-6)
        out = sdpa(call) if acting is None else acting.around(call, sdpa)
        rows.append(join_heads(out) - COMFY["text_out"][row : row + 1])
    return torch.cat(rows)


@pytest.mark.parametrize("n", [11, 16])
@pytest.mark.parametrize("kind", [*EASES, *STAGES])
def test_a_weight_type_is_comfys_at_every_index(n, kind):
    weights = block_weights(kind, comfy_sites(n), WEIGHT).strength
    table = FACTS[f"layers{n}"][kind]
    assert modules_of(comfy_sites(n)) == FACTS["index_to_block"][f"layers{n}"]
    for t, module in enumerate(FACTS["index_to_block"][f"layers{n}"]):
        assert weights[module] == pytest.approx(WEIGHT * table[t], abs=1e-6)
        if f"layers{n}/{kind}/t{t}" in COMFY:
            close(branch(n, t, strength=weights), COMFY[f"layers{n}/{kind}/t{t}"], 1e-5)


@pytest.mark.parametrize("n", [11, 16])
def test_the_choices_of_blocks_are_comfys(n):
    for kind, table in FACTS["dict_weight_types"][f"layers{n}"].items():
        composition, boost = 0.3, 0.6
        found = block_weights(kind, comfy_sites(n), WEIGHT, composition=composition, boost=boost).strength
        words = {"w": WEIGHT, "w_comp": composition, "0.25*w_comp": 0.25 * composition}
        words |= {"w (or style boost)": boost, "w (or composition boost)": boost}
        expected = {int(t): words[x] if isinstance(x, str) else x * WEIGHT for t, x in table.items()}
        if kind == "composition precise":
            expected[6] = boost
        places = FACTS["index_to_block"][f"layers{n}"]
        assert {places.index(m): w for m, w in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("boost", [None, 0.6])
def test_the_precise_types_of_16_modules_are_comfys(boost):
    """IPAdapterPlus.py, ipadapter_execute, "style transfer precise" and "composition precise" where not is_sdxl."""
    places, pushed, fine = FACTS["index_to_block"]["layers16"], boost or WEIGHT, (*range(4), *range(9, 16))
    for kind, expected in {
        "style transfer precise": {**dict.fromkeys(fine, WEIGHT), 4: 0.25 * pushed, 5: pushed},
        "composition precise": {
            **dict.fromkeys(fine, pushed),
            **dict.fromkeys((6, 7, 8), 0.1 * pushed),
            4: 0.25 * WEIGHT,
            5: WEIGHT,
        },
    }.items():
        weights = block_weights(kind, comfy_sites(16), WEIGHT, boost=boost).strength
        assert {places.index(module): w for module, w in weights.items()} == pytest.approx(expected)


@pytest.mark.parametrize("n", [11, 16])
@pytest.mark.parametrize("kind", ["style transfer precise", "composition precise"])
def test_what_is_pushed_away_acts_on_the_negative_side(n, kind):
    places = FACTS["index_to_block"][f"layers{n}"]
    weights = {11: {3: 0.8, 6: 0.8}, 16: {4: 0.2, 5: 0.8, 9: 0.8}}[n]
    layout = [3] if n == 11 else [4, 5]
    away = layout if kind.startswith("style") else [t for t in weights if t not in layout]
    against = block_weights(kind, comfy_sites(n)).against
    assert against is not None and all(f"{places[t]}.*" in against for t in away)
    assert not any(f"{places[t]}.*" in against for t in set(weights) - set(away))
    how = {
        "strength": {places[t]: w for t, w in weights.items()},
        "against": Where(tuple(f"{places[t]}.*" for t in away)),
    }
    for t in weights:
        close(branch(n, t, **how), COMFY[f"layers{n}/{kind}/t{t}"], 1e-5)


@pytest.mark.parametrize("how", ["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"])
def test_the_scalings_of_the_strength_are_comfys(how):
    close(branch(11, 0, strength=WEIGHT, scaling=how), COMFY[f"embeds_scaling/{how}"], 1e-5)


def test_a_bilinear_region_is_comfys():
    found = branch(11, 0, strength=WEIGHT, mask=COMFY["mask"], mask_mode="bilinear")
    close(found, COMFY["masked/linear"], 1e-5)


def test_every_tensor_of_comfys_fixture_is_tested():
    stored = [n.split("/") for n in COMFY if n.startswith("layers")]
    assert {kind for _, kind, _ in stored} == {*EASES, *STAGES, "style transfer precise", "composition precise"}
    assert len(stored) >= 2 * 11


def test_sdxls_second_text_encoder_names_what_to_leave_out(make_sd, make_latent):
    """Its pooled prompt is the content vector of the official code; SD 1.x has no projection, so no tower."""
    theirs, ours = make_sd("sdxl"), make_latent("sdxl")
    parts = [theirs.tokenizer, theirs.tokenizer_2], [theirs.text_encoder, theirs.text_encoder_2]
    pipe = Pipeline(replace(ours.parts, text=ClipText(*parts, penultimate=True)))
    tower = pipe.text_tower()
    assert tower is not None
    _, _, pooled, _ = theirs.encode_prompt("a red fox", do_classifier_free_guidance=False)
    close(tower(["a red fox"]), pooled, TOKENS)
    assert make_latent("sd15").text_tower() is None
