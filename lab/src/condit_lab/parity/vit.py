"""ViT (arXiv:2010.11929) against fixtures: tensors written by the authors' JAX model, timm 1.0.31, transformers 5.23.

One function a kind of fixture returns every difference; the references sum in another order, up to some 2e-6.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from condit.backbones.vit import ViT, ViTBlock, ViTConfig, ViTContext, resize_positions
from condit.weights.vit import load_vit, read_vit
from condit.weights.vit_layouts import State, to_layout
from condit_lab.parity.check import Check, Differences, difference, layout_differences, part

TOLERANCE = 1e-5  # the fixtures' own; the other GELU is off by 5e-4


def build(config: ViTConfig, state: State) -> ViT:
    model = ViT(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def images(t: dict[str, Tensor]) -> Tensor:
    return t["input.image_nhwc"].permute(0, 3, 1, 2)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for files in a published layout: fixtures go through the loader of such files."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def read_authors(golden: Path, name: str) -> tuple[ViTConfig, State, dict[str, Tensor]]:
    """The fixture's model through the loader of .npz files, and the fixture's tensors."""
    t = load_file(golden / f"{name}.safetensors")
    with scratch() as folder:
        np.savez(folder / "m.npz", **{k: x.numpy() for k, x in part(t, "npz.").items()})  # type: ignore[arg-type]
        config, state = read_vit(folder / "m.npz")
    facts = json.loads((golden / f"{name}.json").read_text())["config"]
    if "unpooled" in facts["classifier"]:  # the arrays of a model without a head do not tell this
        config = replace(config, classifier="unpooled")
    return config, state, t


@torch.no_grad()
def compare_authors(golden: Path, name: str) -> Differences:
    """vit_*: sizes read off the arrays, patches, positions, the halves of block 0, every block, norm, logits."""
    config, state, t = read_authors(golden, name)
    facts = json.loads((golden / f"{name}.json").read_text())["config"]
    sizes = {
        "num_heads": config.heads,
        "num_layers": config.depth,
        "mlp_dim": config.mlp_dim,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": config.classes,
        "representation_size": config.representation_size,
    }
    return {
        "sizes": float(sum(facts[field] != size for field, size in sizes.items())),
        **authors_activations(build(config, state), t),
    }


@torch.no_grad()
def compare_released_numbering(golden: Path, name: str) -> Differences:
    """legacy_names*: the weights of the fixture with a representation layer numbered as in the released archives."""
    model = load_vit(golden / f"{name}.npz")
    weight = "npz.embedding/kernel"
    for file in sorted(golden.glob("vit_*.safetensors")):
        t = load_file(file)
        kernel = t[weight].permute(3, 2, 0, 1)
        if torch.equal(model.patch_embed.proj.weight, kernel):
            return authors_activations(model, t)
    return {"no fixture holds these weights": math.inf}


def authors_activations(model: ViT, t: dict[str, Tensor]) -> Differences:
    def tokens(blocks: int | None, norm: bool = False) -> Tensor:
        f = model.features(images(t), blocks=blocks, norm=norm)
        return f.patches if f.cls is None else torch.cat([f.cls[:, None], f.patches], 1)

    x, context, block = tokens(0), ViTContext(0), model.blocks[0]
    assert isinstance(block, ViTBlock)
    attended = block.attn(block.norm1(x), context)
    activations = {
        "patch_grid_nhwc": model.patch_embed(images(t)).unflatten(1, model.config.grid),
        "tokens_with_pos": x,
        "block.0.attn": attended,
        "block.0.mlp": block.mlp(block.norm2(x + attended), context),
        **{f"block.{i}": tokens(i + 1) for i in range(model.config.depth)},
        "encoder_output": tokens(None, norm=True),
    }
    activations["pre_logits"] = model.represent(activations["encoder_output"])
    expected = t["act.pre_logits_input_or_identity"]  # before the tanh, where there is one
    t = t | {"act.pre_logits": expected.tanh() if model.config.representation_size else expected}
    logits = difference(model(images(t)), t["output.logits"])
    return {name: difference(y, t[f"act.{name}"]) for name, y in activations.items()} | {"logits": logits}


def compare_resizing(golden: Path, name: str) -> Differences:
    """posembed_resize: the authors' rule, larger and smaller, with and without a class token."""
    t = load_file(golden / f"{name}.safetensors")
    out = {}
    for i, case in enumerate(json.loads((golden / f"{name}.json").read_text())["cases"]):
        old, new = (case["old_grid"],) * 2, (case["new_grid"],) * 2
        resized = resize_positions(t[f"case{i}.input"], old, new, "linear_aligned")
        out[f"grid {old[0]} to {new[0]}"] = difference(resized, t[f"case{i}.output"])
    return out


@torch.no_grad()
def compare_timm(golden: Path, name: str) -> Differences:
    """timm_layout: features, logits, and the position table at another size."""
    t = load_file(golden / f"{name}.safetensors")
    facts = json.loads((golden / f"{name}.json").read_text())
    with scratch() as folder:
        save_file(part(t, "state."), folder / "model.safetensors")
        model = load_vit(folder / "model.safetensors", heads=facts["config"]["num_heads"])
    new = (facts["resized_image_size"] // model.config.patch_size,) * 2
    table = resize_positions(model.pos_embed, model.config.grid, new, model.config.flavour.resize)
    x = t["input.image_nchw"]
    return {
        "features": difference(with_class_token(model, x), t["act.features"]),
        "logits": difference(model(x), t["output.logits"]),
        "positions": difference(table, t["output.pos_embed_bicubic_antialias"]),
    }


def with_class_token(model: ViT, x: Tensor, blocks: int | None = None) -> Tensor:
    f = model.features(x, blocks=blocks, norm=blocks is None)
    assert f.cls is not None
    return torch.cat([f.cls[:, None], f.patches], 1)


@torch.no_grad()
def compare_transformers(golden: Path, case: str) -> Differences:
    """hf_*layout, under the names of files or of transformers 5 in memory: classifier with hidden states and at a
    larger size; backbone with pooler."""
    name, _, names = case.partition(", ")
    t = load_file(golden / f"{name}.safetensors")
    facts = json.loads((golden / f"{name}.json").read_text())["config"] | {"model_type": "vit"}
    models = {}
    with scratch() as folder:
        for kind in ("classifier", "backbone"):
            state = part(t, f"{kind}.state.")
            (folder / kind).mkdir()
            (folder / kind / "config.json").write_text(json.dumps(facts))
            state = to_hub_names(state) if names == "names of files" else state
            save_file(state, folder / kind / "model.safetensors")
            models[kind] = load_vit(folder / kind)
    model, backbone = models["classifier"], models["backbone"]
    x, large = t["input.pixel_values"], t["input.pixel_values_large"]
    hidden = {
        f"hidden {i}": difference(with_class_token(model, x, i), t[f"classifier.act.hidden.{i}"])
        for i in range(model.config.depth + 1)
    }
    return hidden | {
        "logits": difference(model(x), t["classifier.output.logits"]),
        "logits, larger images": difference(model(large), t["classifier.output.logits_large"]),
        "last hidden state": difference(with_class_token(backbone, x), t["backbone.output.last_hidden_state"]),
        "pooler": difference(backbone(x), t["backbone.output.pooler"]),
    }


# transformers 5 in memory -> its files.
_IN_FILES = {
    "layers.": "encoder.layer.",
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


def to_hub_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, x in state.items():
        for theirs, in_file in _IN_FILES.items():
            name = name.replace(theirs, in_file)
        out[name] = x
    return out


# Which of our layouts, and what ViT-B/16 has there beside its defaults.
_LAYOUTS = {
    "layout_npz_vit_b_16_imagenet21k": ("npz", {"classes": 21843, "representation_size": 768}),
    "layout_timm_vit_b_16": ("timm", {}),
    "layout_hf_vit_b_16": ("transformers", {}),
}


def compare_layout(golden: Path, name: str) -> Differences:
    """layout_*: names and shapes of ViT-B/16 are those that we write."""
    facts = json.loads((golden / f"{name}.json").read_text())
    if "keys" in facts:
        facts = {row["hub"].removeprefix("vit."): row["shape"] for row in facts["keys"].values()}
    layout, extra = _LAYOUTS[name]
    config = replace(ViTConfig(), **extra)
    with torch.device("meta"):
        written = to_layout(ViT(config).state_dict(), layout, config.heads)
    return layout_differences(written, facts)


_AUTHORS = "the authors' JAX code"
CHECKS = (
    Check(
        "every activation and the logits",
        _AUTHORS,
        TOLERANCE,
        "vit_*.safetensors",
        compare_authors,
    ),
    Check("the same, numbered as released", _AUTHORS, TOLERANCE, "legacy_names*.npz", compare_released_numbering),
    Check("positions at another size", _AUTHORS, TOLERANCE, "posembed_resize*.safetensors", compare_resizing),
    Check(
        "features, logits, positions at another size",
        "timm 1.0.31",
        TOLERANCE,
        "timm_*layout.safetensors",
        compare_timm,
    ),
    Check(
        "hidden states, pooler, logits, also at another size",
        "transformers 5.23",
        TOLERANCE,
        "hf_*layout.safetensors",
        compare_transformers,
        ("names of files", "names in memory"),
    ),
    Check("names and shapes of ViT-B/16", "JAX, timm, transformers", 0, "layout_*.json", compare_layout),
)
INPUTS: tuple[str, ...] = ()
