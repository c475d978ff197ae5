"""weights/lora_files.py: LoRA files of other tools. References: peft, and diffusers' own conversion of FLUX."""

import json
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from condit.backbones.mmdit import PRESETS, MMDiT
from condit.nn.lora import Linear, LoRA
from condit.weights.catalog import read_adapter
from condit.weights.files import save_tensors
from condit.weights.flux_names import DOUBLE, SINGLE, WHOLE
from condit.weights.lora_files import published

WIDTH = 3072  # of FLUX.1


def up_rows(part: str) -> int:
    """Rows of FLUX's matrices, in widths."""
    if part.endswith(("mod_lin", "_qkv")):
        return 6 if part.endswith("mod_lin") else 3
    return {"modulation_lin": 3, "linear1": 7, "img_mlp_0": 4, "txt_mlp_0": 4}.get(part, 1)


def in_width(part: str) -> int:
    return {"img_mlp_2": 4, "txt_mlp_2": 4, "linear2": 5}.get(part, 1)


def flux_names() -> dict[str, tuple[int, int]]:
    """Every matrix of FLUX with two blocks of each kind in its own names -> (rows, columns)."""
    shapes = {}
    for kind, table in (("double", DOUBLE), ("single", SINGLE)):
        for part in table:
            dotted = re.sub(r"^(img|txt)_(attn|mlp|mod)_", r"\1_\2.", part).replace("modulation_lin", "modulation.lin")
            for i in range(2):
                shapes[f"{kind}_blocks.{i}.{dotted}"] = up_rows(part) * WIDTH, in_width(part) * WIDTH
    shapes |= {"img_in": (WIDTH, 64), "txt_in": (WIDTH, 4096), "final_layer.linear": (64, WIDTH)}
    shapes["final_layer.adaLN_modulation.1"] = 2 * WIDTH, WIDTH
    for name, columns in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        shapes |= {f"{name}.in_layer": (WIDTH, columns), f"{name}.out_layer": (WIDTH, WIDTH)}
    return shapes


def made(names: dict[str, tuple[int, int]], a: str, b: str, spell) -> dict[str, Tensor]:
    """Rank 1 pairs under `spell(name)`: A counts the file's matrices, B its own rows."""
    found = {}
    for number, (name, (rows, columns)) in enumerate(names.items()):
        found[f"{spell(name)}.{a}.weight"] = torch.full((1, columns), number + 1.0)
        found[f"{spell(name)}.{b}.weight"] = torch.arange(rows, dtype=torch.float32)[:, None] + number / 64
    return found


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


@pytest.fixture(scope="module")
def flux() -> MMDiT:
    with torch.device("meta"):
        return MMDiT(PRESETS["flux-dev"])


def test_every_rule_has_a_name_of_flux_and_the_names_hit_every_rule():
    names = {kohya(name).removeprefix("lora_unet_") for name in flux_names()}
    rules = {f"double_blocks_0_{p}" for p in DOUBLE} | {f"single_blocks_1_{p}" for p in SINGLE} | WHOLE.keys()
    assert rules <= names


@pytest.mark.parametrize(
    ("a", "b", "spell"),
    [("lora_down", "lora_up", kohya), ("lora_A", "lora_B", lambda name: f"diffusion_model.{name}")],
)
def test_rules_for_fluxs_own_names_equal_diffusers_conversion_of_its_weights(flux, a, b, spell):
    """diffusers cuts and turns FLUX's matrices by rows only, so it may be given B in their place."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    given = made(flux_names(), a, b, spell)
    rows = {f"{name}.weight": given[f"{spell(name)}.{b}.weight"].clone() for name in flux_names()}
    norms = {
        f"{kind}_blocks.{i}.{part}.{side}_norm.scale": torch.zeros(1)
        for kind, parts in (("double", ("img_attn.norm", "txt_attn.norm")), ("single", ("norm",)))
        for part in parts
        for i in range(2)
        for side in ("query", "key")
    }
    biases = {name.replace(".weight", ".bias"): x[:, 0] for name, x in rows.items()}
    expected = convert_flux_transformer_checkpoint_to_diffusers(rows | norms | biases)
    expected = {n.removesuffix(".weight"): x for n, x in expected.items() if n.endswith(".weight") and x.ndim == 2}
    found = published(given)
    assert {n for n in found if n.endswith("lora_B.weight")} == {f"transformer.{n}.lora_B.weight" for n in expected}
    for path, x in expected.items():
        assert torch.equal(found[f"transformer.{path}.lora_B.weight"], x), path
    lora = LoRA.from_tensors(found)
    lora.check_fits(flux, "a file", "flux")  # A as wide as each of the layers expects
    assert len(lora.keys) == len(expected) == 2 * 14 + 2 * 6 + 10  # double blocks, single blocks, the rest


def test_kohyas_underscores_for_diffusers_names_are_read():
    given = made({"single_transformer_blocks.3.attn.to_q": (4, 4)}, "lora_down", "lora_up", kohya)
    given |= made({"transformer_blocks.0.ff.net.0.proj": (16, 4)}, "lora_down", "lora_up", kohya)
    found = published(given)
    assert "transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight" in found
    assert "transformer.transformer_blocks.0.ff.net.0.proj.lora_B.weight" in found


def test_alpha_of_a_fused_matrix_is_that_of_all_its_parts():
    given = {f"{kohya('double_blocks.0.img_attn.qkv')}.alpha": torch.tensor(8.0)}
    given |= {
        f"{kohya('double_blocks.0.img_attn.qkv')}.lora_down.weight": torch.ones(2, 4),
        f"{kohya('double_blocks.0.img_attn.qkv')}.lora_up.weight": torch.ones(12, 2),
        f"{kohya('double_blocks.0.img_mlp.0')}.lora_down.weight": torch.ones(3, 4),  # rank 3, no alpha
        f"{kohya('double_blocks.0.img_mlp.0')}.lora_up.weight": torch.ones(16, 3),
    }
    lora = LoRA.from_tensors(published(given))
    assert lora.scales["transformer_blocks.0.attn.to_k"] == 4 and lora.scales["transformer_blocks.0.ff.net.0.proj"] == 1
    assert len(lora.keys) == 4 and lora.rank == 3


# peft


def peft_model():
    """A small model with two linears and its peft twin, with a pattern of ranks and alphas."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    inner = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 6), "to_k": torch.nn.Linear(4, 6)})
    base = torch.nn.ModuleDict({"attn": inner})
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 3}, alpha_pattern={"to_k": 12}
    )
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def test_a_folder_of_peft_is_read_with_its_ranks_and_alphas(tmp_path):
    model = peft_model()
    model.save_pretrained(tmp_path)
    lora = LoRA.from_tensors(read_adapter(tmp_path, "OminiControl").tensors)
    assert {path: len(lora.a[key]) for path, key in lora.keys.items()} == {"attn.to_q": 2, "attn.to_k": 3}
    x = torch.randn(5, 4)
    for name in ("to_q", "to_k"):
        layer: Any = model.base_model.get_submodule(f"model.attn.{name}")
        ours = Linear(4, 6)
        ours.load_state_dict(layer.base_layer.state_dict())
        ours.path = f"attn.{name}"
        torch.testing.assert_close(ours(x, lora), layer(x), rtol=0, atol=1e-6)


def test_a_state_dict_of_peft_names_its_adapter_and_is_read(tmp_path):
    given = {n: p for n, p in peft_model().state_dict().items() if "lora_" in n}
    assert any(".lora_A.default.weight" in name for name in given)
    assert set(LoRA.from_tensors(published(given)).keys) == {"attn.to_q", "attn.to_k"}


def test_alpha_as_diffusers_keeps_it_in_the_file_is_read(tmp_path):
    tensors = {
        "transformer.a.to_q.lora_A.weight": torch.ones(2, 4),
        "transformer.a.to_q.lora_B.weight": torch.ones(6, 2),
    }
    kept = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})}
    file = save_tensors(tmp_path / "a.safetensors", tensors, kept)
    assert LoRA.from_tensors(read_adapter(file, "OminiControl").tensors).scales == {"a.to_q": 4}


def test_alpha_of_each_part_of_a_model_is_that_of_its_own_name(tmp_path):
    """diffusers' metadata has an alpha for the network and for every text encoder."""
    names = ("unet.x", "text_encoder.text_model.x", "text_encoder_2.text_model.x")
    tensors = {f"{n}.lora_A.weight": torch.ones(2, 4) for n in names}
    tensors |= {f"{n}.lora_B.weight": torch.ones(6, 2) for n in names}
    kept = {f"{n.split('.')[0]}.lora_alpha": alpha for n, alpha in zip(names, (8, 6, 2), strict=True)}
    file = save_tensors(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(kept)})
    adapter = read_adapter(file, "OminiControl", partial(published, ignore_text=True))
    assert [alpha.item() for name, alpha in adapter.tensors.items() if name.endswith(".alpha")] == [8]
    assert [b[0, 0].item() for _, b in adapter.text_pairs().values()] == [3, 1]


PAIR = {"base_model.model.a.lora_A.weight": torch.ones(4, 6), "base_model.model.a.lora_B.weight": torch.ones(6, 4)}


def test_rslora_divides_by_the_root_of_the_rank():
    assert LoRA.from_tensors(published(PAIR, {"use_rslora": True, "lora_alpha": 6})).scales == {"a": 3}


def test_a_dora_needs_its_magnitudes_and_the_model():
    with pytest.raises(ValueError, match="use_dora is set, and the file has no lora_magnitude_vector"):
        published(PAIR, {"use_dora": True})
    tensors = published(PAIR | {"base_model.model.a.lora_magnitude_vector": torch.ones(6)}, {"use_dora": True})
    with pytest.raises(ValueError, match="a: a DoRA scales the rows of the layer's own weight"):
        LoRA.from_tensors(tensors)
    layer = Linear(6, 6)
    model = torch.nn.ModuleDict({"a": layer})
    lora, x = LoRA.from_tensors(tensors, model=model), torch.randn(3, 6)
    updated = layer.weight + torch.full((6, 6), 4.0)
    rows = updated / updated.norm(dim=1, keepdim=True)
    delta = lora.delta("a", x)
    assert delta is not None
    torch.testing.assert_close(layer(x) + delta, x @ rows.mT + layer.bias)
    quantised = layer.weight.detach().to(torch.int8)  # as a quantised layer keeps it
    layer.weight = torch.nn.Parameter(quantised, requires_grad=False)
    with pytest.raises(ValueError, match="without quantised"):
        LoRA.from_tensors(tensors, model=model)


def test_our_files_with_an_alpha_load_into_diffusers_flux_and_do_there_what_they_do_here(make_pipe, tmp_path):
    """diffusers puts the LoRA on every token; here that is a LoRA on text and image, as no condition takes part."""
    from dataclasses import asdict

    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    from condit.controls.omini_tasks import omini_targets
    from condit.nn.streams import Stream, grid_ids

    backbone = make_pipe(canvas=False, guidance_embeds=True).backbone
    theirs = FluxTransformer2DModel(**asdict(backbone.config)).eval()
    theirs.load_state_dict(backbone.state_dict(), strict=True)
    torch.manual_seed(0)
    lora = LoRA(omini_targets(backbone), 3, alpha=6.0)
    for b in lora.b.values():
        torch.nn.init.normal_(b, std=0.1)
    file = save_tensors(tmp_path / "ours.safetensors", lora.tensors())
    theirs.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="transformer")
    x, text, pooled = torch.randn(2, 24, 16), torch.randn(2, 5, 12), torch.randn(2, 10)
    t, guidance, ids = torch.tensor([0.3, 0.9]), torch.tensor([3.5, 1.0]), torch.zeros(5, 3)
    with torch.no_grad():
        expected = theirs(x, text, pooled, t, grid_ids(4, 6), ids, guidance).sample
        found = backbone(Stream(x, grid_ids(4, 6), t, pooled, guidance, lora), text, ids)
        plain = backbone(Stream(x, grid_ids(4, 6), t, pooled, guidance), text, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # a scale in B rounds otherwise than one behind it
    assert (found - plain).abs().max() > 1e-2


# What is refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "also adapts a text encoder"),
        (["text_encoder.text_model.q_proj.lora_A.weight"], "also adapts a text encoder"),
        (["lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a"], "in no LoRA layout that condit reads.*It is of LoHa"),
        (["double_blocks.0.processor.qkv_lora1.down.weight"], "has only its A matrix"),
        (["transformer.x.lora_A.weight"], "'transformer.x' has only its A matrix"),
        (["lora_unet_single_blocks_0_linear3.lora_down.weight"] * 2, "FLUX's single blocks have no 'linear3'"),
    ],
)
def test_what_cannot_be_read_whole_is_refused(names, message):
    given = {name: torch.ones(2, 2) for name in names}
    if len(names) == 2:
        given[names[0].replace("down", "up")] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=message):
        published(given)


def test_a_fused_matrix_of_too_few_rows_is_refused():
    given = {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(1, 8)}
    given["double_blocks.0.img_attn.qkv.lora_B.weight"] = torch.ones(12, 1)
    with pytest.raises(ValueError, match="12 rows, too few for 3 parts of 8"):
        published(given)
