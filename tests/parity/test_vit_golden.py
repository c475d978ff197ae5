"""ViT (arXiv:2010.11929) against golden/vit: tensors written by the authors' JAX model, timm 1.0.31, transformers 5.23;
and against transformers on random models.

One function a fixture file gives (what, largest difference); the references sum in another order, up to some 2e-6.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from condit.backbones.vit import FLAVOURS, Frame, ViT, ViTConfig, resize_positions
from condit.weights.vit import load_vit, read_vit, save_vit, to_layout

GOLDEN = Path(__file__).parent / "golden" / "vit"
ATOL = 1e-5  # the fixtures' own tolerance; the other GELU is off by 5e-4
Differences = list[tuple[str, float]]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def build(config: ViTConfig, state: dict[str, Tensor]) -> ViT:
    model = ViT(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def compare_authors(name: str, folder: Path) -> Differences:
    """vit_*.safetensors: patches, positions, the halves of block 0, every block, norm, representation, logits."""
    t = load_file(GOLDEN / f"{name}.safetensors")
    npz = folder / "model.npz"
    np.savez(npz, **{k: x.numpy() for k, x in part(t, "npz.").items()})  # type: ignore[arg-type]
    config, state = read_vit(npz)
    told = json.loads((GOLDEN / f"{name}.json").read_text())["config"]
    if "unpooled" in told["classifier"]:  # the arrays of a model without a head do not tell this
        config = replace(config, classifier="unpooled")
    model = build(config, state)
    assert (config.heads, config.depth, config.mlp_dim) == (told["num_heads"], told["num_layers"], told["mlp_dim"])
    assert (config.image_size, config.patch_size) == (told["image_size"], told["patch_size"])
    assert (config.classes, config.representation_size) == (told["num_classes"], told["representation_size"])
    return authors_activations(model, t) + [("logits", difference(model(images(t)), t["output.logits"]))]


def images(t: dict[str, Tensor]) -> Tensor:
    return t["input.image_nhwc"].permute(0, 3, 1, 2)


def authors_activations(model: ViT, t: dict[str, Tensor]) -> Differences:
    def tokens(blocks: int | None, norm: bool = False) -> Tensor:
        f = model.features(images(t), blocks=blocks, norm=norm)
        return f.patches if f.cls is None else torch.cat([f.cls[:, None], f.patches], 1)

    x, frame, block = tokens(0), Frame(0), model.blocks[0]
    attended = block.attn(block.norm1(x), frame)
    found = {
        "patch_grid_nhwc": model.patch_embed(images(t)).unflatten(1, model.config.grid),
        "tokens_with_pos": x,
        "block.0.attn": attended,
        "block.0.mlp": block.mlp(block.norm2(x + attended), frame),
        **{f"block.{i}": tokens(i + 1) for i in range(model.config.depth)},
        "encoder_output": tokens(None, norm=True),
    }
    represented = model.represent(found["encoder_output"])
    expected = t["act.pre_logits_input_or_identity"]  # before the tanh, where there is one
    found["pre_logits"] = represented
    t = t | {"act.pre_logits": expected.tanh() if model.config.representation_size else expected}
    return [(name, difference(y, t[f"act.{name}"])) for name, y in found.items()]


@torch.no_grad()
def compare_legacy_names() -> Differences:
    """legacy_names.npz: the numbering of the released archives."""
    t = load_file(GOLDEN / "vit_token_prelogits.safetensors")
    model = load_vit(GOLDEN / "legacy_names.npz")
    return authors_activations(model, t) + [("logits", difference(model(images(t)), t["output.logits"]))]


def compare_resizing() -> Differences:
    """posembed_resize.safetensors: the authors' rule, larger and smaller, with and without a class token."""
    t = load_file(GOLDEN / "posembed_resize.safetensors")
    out = []
    for i, case in enumerate(json.loads((GOLDEN / "posembed_resize.json").read_text())["cases"]):
        old, new = (case["old_grid"],) * 2, (case["new_grid"],) * 2
        found = resize_positions(t[f"case{i}.input"], old, new, "linear_aligned")
        out.append((f"case {i}", difference(found, t[f"case{i}.output"])))
    return out


@torch.no_grad()
def compare_timm(folder: Path) -> Differences:
    """timm_layout.safetensors: features, logits, and the position table at another size."""
    t = load_file(GOLDEN / "timm_layout.safetensors")
    told = json.loads((GOLDEN / "timm_layout.json").read_text())
    file = folder / "model.safetensors"
    save_file(part(t, "state."), file)
    model = load_vit(file, heads=told["config"]["num_heads"])
    x, f = t["input.image_nchw"], model.features(t["input.image_nchw"])
    assert f.cls is not None
    new = (told["resized_image_size"] // model.config.patch_size,) * 2
    table = resize_positions(model.pos_embed, model.config.grid, new, model.config.flavour.resize)
    return [
        ("features", difference(torch.cat([f.cls[:, None], f.patches], 1), t["act.features"])),
        ("logits", difference(model(x), t["output.logits"])),
        ("positions", difference(table, t["output.pos_embed_bicubic_antialias"])),
    ]


@torch.no_grad()
def compare_transformers(folder: Path, *, hub_names: bool) -> Differences:
    """hf_layout.safetensors: classifier with hidden states and at a larger size; backbone with pooler."""
    t = load_file(GOLDEN / "hf_layout.safetensors")
    told = json.loads((GOLDEN / "hf_layout.json").read_text())["config"] | {"model_type": "vit"}
    for kind in ("classifier", "backbone"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps(told))
        state = part(t, f"{kind}.state.")
        save_file(to_hub_names(state) if hub_names else state, folder / kind / "model.safetensors")
    model, backbone = load_vit(folder / "classifier"), load_vit(folder / "backbone")
    x, large = t["input.pixel_values"], t["input.pixel_values_large"]
    out = []
    for i in range(model.config.depth + 1):
        f = model.features(x, blocks=i, norm=False)
        assert f.cls is not None
        found = torch.cat([f.cls[:, None], f.patches], 1)
        out.append((f"hidden {i}", difference(found, t[f"classifier.act.hidden.{i}"])))
    f = backbone.features(x)
    assert f.cls is not None
    last = torch.cat([f.cls[:, None], f.patches], 1)
    return out + [
        ("logits", difference(model(x), t["classifier.output.logits"])),
        ("logits, larger images", difference(model(large), t["classifier.output.logits_large"])),
        ("last hidden state", difference(last, t["backbone.output.last_hidden_state"])),
        ("pooler", difference(backbone(x), t["backbone.output.pooler"])),
    ]


def to_hub_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the fixture's own table, whose block 0 stands for every block."""
    table = json.loads((GOLDEN / "layout_hf_vit_b_16.json").read_text())["keys"]
    hub = {name: row["hub"] for name, row in table.items()}
    hub |= {name.removeprefix("vit."): theirs.removeprefix("vit.") for name, theirs in hub.items()}
    return {hub.get(name, name): x for name, x in state.items()}


def check(differences: Differences) -> None:
    assert differences
    assert [(what, d) for what, d in differences if not d <= ATOL] == []


@pytest.mark.parametrize("name", ["vit_token", "vit_token_prelogits", "vit_gap", "vit_unpooled"])
def test_every_activation_equals_the_authors_jax_model(name, tmp_path):
    check(compare_authors(name, tmp_path))


def test_the_numbering_of_the_released_archives_gives_the_same_outputs():
    check(compare_legacy_names())


def test_the_position_table_is_resized_as_the_authors_do():
    check(compare_resizing())


def test_features_logits_and_resized_positions_equal_timm(tmp_path):
    check(compare_timm(tmp_path))


@pytest.mark.parametrize("hub_names", [True, False])
def test_hidden_states_logits_and_pooler_equal_transformers(hub_names, tmp_path):
    check(compare_transformers(tmp_path, hub_names=hub_names))


def test_the_fixtures_tell_the_flavours_apart(tmp_path):
    t = load_file(GOLDEN / "vit_token.safetensors")
    np.savez(tmp_path / "m.npz", **{k: x.numpy() for k, x in part(t, "npz.").items()})  # type: ignore[arg-type]
    config, state = read_vit(tmp_path / "m.npz")
    with torch.no_grad():
        exact = build(replace(config, flavour=FLAVOURS["timm"]), state)(images(t))
    assert difference(exact, t["output.logits"]) > 10 * ATOL


@pytest.mark.parametrize(
    ("file", "layout", "extra"),
    [
        ("layout_npz_vit_b_16_imagenet21k", "npz", {"classes": 21843, "representation_size": 768}),
        ("layout_timm_vit_b_16", "timm", {}),
        ("layout_hf_vit_b_16", "transformers", {}),
    ],
)
def test_names_and_shapes_of_the_published_vit_b_16_are_those_that_we_write(file, layout, extra):
    told = json.loads((GOLDEN / f"{file}.json").read_text())
    if "keys" in told:
        told = {row["hub"].removeprefix("vit."): row["shape"] for row in told["keys"].values()}
    config = replace(ViTConfig(), **extra)
    with torch.device("meta"):
        written = to_layout(ViT(config).state_dict(), layout, config.heads)
    assert {name: list(x.shape) for name, x in written.items()} == told


def transformers_vit(*, classes: int, image_size: int | tuple[int, int], act: str):
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification, ViTModel

    torch.manual_seed(0)
    config = TheirConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=image_size,  # type: ignore[arg-type]
        patch_size=4,
        num_labels=classes,
        hidden_act=act,
        pooler_output_size=24,
    )
    model = (ViTForImageClassification if classes else ViTModel)(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms of weight one and biases of zero would hide a mistake
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("image_size", [16, (12, 20)])
def test_a_folder_saved_by_transformers_gives_its_logits_at_every_size(image_size, act, tmp_path):
    theirs = transformers_vit(classes=5, image_size=image_size, act=act)
    theirs.save_pretrained(tmp_path)
    ours = load_vit(tmp_path)
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        assert difference(ours(x), theirs(x).logits) <= ATOL
        if height == width:  # transformers resizes square tables only
            for size in ((24, 24), (8, 20), (8, 32)):  # the last has as many patches as the table
                x = torch.randn(2, 3, *size)
                assert difference(ours(x), theirs(x, interpolate_pos_encoding=True).logits) <= ATOL


@pytest.mark.parametrize("classes", [0, 5])
def test_a_folder_that_we_save_is_read_by_transformers_without_a_missing_or_unexpected_name(classes, tmp_path):
    theirs = transformers_vit(classes=classes, image_size=16, act="gelu_pytorch_tanh")
    theirs.save_pretrained(tmp_path / "a")
    config, state = read_vit(tmp_path / "a")
    save_vit(tmp_path / "b", config, state, layout="transformers")
    again, report = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for found, expected in zip(again(x).to_tuple(), theirs(x).to_tuple(), strict=True):
            assert torch.equal(found, expected)
