"""DiT weights (arXiv:2212.09748): the official files, their training files, fast-DiT's, and diffusers' folders.

The tensors give a file's layout and the sizes of its network, except for two: the number of heads, taken from
config.json, from the widths of the published networks or from the caller; and whether the last row of the label table
is the null class, as in every published network, or one more class.

diffusers' `DiTTransformer2DModel` (0.42) has the official weights but computes another function: its timestep features
divide by 127 where the official ones divide by 128, and its second norm has eps 1e-5 unless config.json says 1e-6. A
DiT read from such a folder is the official one; a folder written here sets 1e-6 and keeps diffusers' features."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from condit.backbones.dit import PRESETS, DiT, DiTConfig, sincos_positions
from condit.nn.layers import Uninitialised
from condit.weights.files import Json, atomic_write, load_strict, read_tensors, save_folder, save_tensors
from condit.weights.folders import network_folder, own_config, read_json, weight_files
from condit.weights.guess import guess

Layout = Literal["official", "training", "diffusers"]
State = dict[str, Tensor]

# Our module -> diffusers'. `#`: the number of a block; commas: parts of one fused matrix; `*`: a copy in every block.
_DIFFUSERS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.*.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.*.norm1.emb.class_embedder.embedding_table",
    "blocks.#.attn.qkv": "transformer_blocks.#.attn1.to_q,to_k,to_v",
    "blocks.#.attn.proj": "transformer_blocks.#.attn1.to_out.0",
    "blocks.#.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "blocks.#.mlp.fc2": "transformer_blocks.#.ff.net.2",
    "blocks.#.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_HEADS = {config.hidden_size: config.num_heads for config in PRESETS.values()}


def load_dit(
    source: str | Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    num_heads: int | None = None,
    null_class: bool | None = None,
    input_size: int | tuple[int, int] | None = None,
    device: Literal["cpu", "meta"] = "cpu",
) -> DiT:
    """The network in a file (safetensors or PyTorch) or a diffusers folder, in any layout; in evaluation mode and in
    the file's dtype.

    weights: which of a training file's two networks; "ema" takes "model" where there is no average. num_heads,
    null_class (False: the last label is a class) and input_size (side or height and width of the latent) complete files
    that do not give them. device "meta": without data. ValueError with missing and unexpected names and a guess unless
    all tensors fit.
    """
    tensors, settings = _read(Path(source), device)
    tensors = _unwrap(tensors, weights)
    if any(name.startswith("transformer_blocks.") for name in tensors):
        tensors = from_diffusers(tensors, source)
    settings |= {} if num_heads is None else {"num_heads": num_heads}
    settings |= {} if input_size is None else {"input_size": input_size}
    config = config_of(tensors, settings, source=source, null_class=null_class)
    if "pos_embed" not in tensors and "x_embedder.proj.weight" in tensors:  # a fixed table: some writers leave it out
        table = sincos_positions(config.grid, config.hidden_size)[None]
        tensors = {"pos_embed": table.to(tensors["x_embedder.proj.weight"].dtype), **tensors}
    with torch.device("meta"), Uninitialised():
        model = DiT(config)
    load_strict(model, tensors, source=source, what_is=guess, assign=True)
    return model.eval()


def save_dit(model: DiT, path: str | Path, *, layout: Layout = "official", ema: DiT | None = None) -> Path:
    """Write a network: "official" as the released .pt, or as safetensors with our configuration if `path` ends so;
    "training" as the official trainer's .pt, with `ema` (None: the same weights); "diffusers" as a `transformer`
    folder. ValueError for a network that diffusers' class does not support."""
    path, state = Path(path), _plain(model)
    if layout == "diffusers":
        fields = _diffusers_config(model)
        with save_folder(path) as folder:
            (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
            save_tensors(folder / "diffusion_pytorch_model.safetensors", to_diffusers(state), {"format": "pt"})
        return path
    if layout == "official" and path.suffix == ".safetensors":
        return save_tensors(path, state, {"condit": {"class": "DiT", **asdict(model.config)}})
    # The official trainer keeps its arguments as an argparse.Namespace, which torch.load now refuses. No code reads
    # them, so a dictionary serves.
    content = state
    if layout == "training":
        averaged = state if ema is None else _plain(ema)
        content = {"model": state, "ema": averaged, "opt": {}, "args": asdict(model.config)}
    return atomic_write(path, lambda target: torch.save(content, target))


def _plain(model: DiT) -> State:
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


# Reading


def _read(source: Path, device: Literal["cpu", "meta"]) -> tuple[State, Json]:
    """The tensors, and the fields of DiTConfig that the file or a config.json next to it gives, often none."""
    if not source.is_dir():
        return read_tensors(source, device), own_config(source, "DiT", DiTConfig)
    folder = network_folder(source)
    files = weight_files(folder)
    tensors = {name: value for file in files for name, value in read_tensors(file, device).items()}
    # The metadata of our files give more than a config.json.
    if (own := own_config(files[0], "DiT", DiTConfig)) or not (folder / "config.json").is_file():
        return tensors, own
    fields = read_json(folder / "config.json")
    size = fields.get("sample_size")
    settings = {
        "num_heads": fields.get("num_attention_heads"),
        "input_size": tuple(size) if isinstance(size, list) else size,
    }
    return tensors, {name: value for name, value in settings.items() if value is not None}


def _unwrap(tensors: State, weights: str) -> State:
    """The network's own names: without those of the training file around it and without the prefixes of torch's
    wrappers."""
    for part in ("ema", "model", "state_dict") if weights == "ema" else ("model", "state_dict"):
        inside = {
            name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")
        }
        if inside:
            tensors = inside
            break
    for prefix in ("module.", "_orig_mod.", "module."):  # fast-DiT keeps DDP's; torch.compile inside or around it
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def config_of(
    tensors: Mapping[str, Tensor],
    settings: Json,
    *,
    source: str | Path,
    null_class: bool | None = None,
) -> DiTConfig:
    """The sizes that the shapes of tensors with official names give; `settings` win. XL/2 for tensors that give no
    sizes: `load_strict` then reports the difference to it. ValueError without a number of heads, or if the sizes
    contradict each other."""
    try:
        dim, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        out, gates = tensors["final_layer.linear.weight"].shape[0], tensors["blocks.0.adaLN_modulation.1.bias"].shape[0]
        hidden = tensors["blocks.0.mlp.fc1.bias"].shape[0]
        labels = tensors.get("y_embedder.embedding_table.weight")
        rows = 0 if labels is None else labels.shape[0]
        tokens = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else None
    except (KeyError, IndexError, ValueError):
        return PRESETS["DiT-XL/2"]
    heads = settings.get("num_heads", _HEADS.get(dim))
    if heads is None:
        raise ValueError(
            f"{source} does not give its number of heads, and no published DiT has width {dim}. Give num_heads=."
        )
    has_null = settings.get("class_dropout_prob", 0.1) > 0 if null_class is None else null_class
    numbers = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    config = DiTConfig(
        input_size=32 if tokens is None else math.isqrt(tokens) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=dim,
        depth=min(max(numbers) + 1, len(tensors)),  # a hostile number does not make a long loop
        num_heads=heads,
        mlp_ratio=hidden / dim,
        class_dropout_prob=0.1 if has_null else 0.0,
        num_classes=max(rows - has_null, 0),
        learn_sigma=out == 2 * channels * patch**2,
        gates=gates != 4 * dim,
    )
    config = replace(config, **settings)
    if tokens is not None and math.prod(config.grid) != tokens:
        raise ValueError(
            f"{source} has positions for {tokens} tokens; a latent of {config.latent} in patches of {patch} has "
            f"{math.prod(config.grid)}. Give input_size=(height, width) of the latent."
        )
    return config


# diffusers


def _names(native: str, depth: int) -> list[list[str]]:
    """diffusers' names of one of our tensors: its parts, each with its copies."""
    module, leaf = native.rsplit(".", 1)
    number = re.match(r"blocks\.(\d+)\.", module)
    template = _DIFFUSERS[re.sub(r"^blocks\.\d+\.", "blocks.#.", module)]
    head, _, tail = template.rpartition(".")
    paths = [f"{head}.{part}" if head else part for part in tail.split(",")]
    if number:
        paths = [path.replace("#", number[1]) for path in paths]
    copies = range(depth) if "*" in template else range(1)
    return [[f"{path.replace('*', str(i))}.{leaf}" for i in copies] for path in paths]


def _all_natives(depth: int) -> list[str]:
    """Every tensor of a class-conditional DiT but the position table, in the official order."""
    modules = [m.replace("#", str(i)) for i in range(depth) for m in _DIFFUSERS if "#" in m]
    around = [m for m in _DIFFUSERS if "#" not in m]
    names = [f"{m}.{leaf}" for m in (*around[:4], *modules, *around[4:]) for leaf in ("weight", "bias")]
    return [name for name in names if name != "y_embedder.embedding_table.bias"]


def to_diffusers(state: Mapping[str, Tensor]) -> State:
    """Official names -> those of `DiTTransformer2DModel`, without the position table and with the embedders in every
    block."""
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return {
        name: part
        for native, value in state.items()
        if native != "pos_embed"
        for names in [_names(native, depth)]
        for copies, part in zip(names, value.chunk(len(names)), strict=True)
        for name in copies
    }


def from_diffusers(tensors: Mapping[str, Tensor], source: str | Path) -> State:
    """The inverse of `to_diffusers`. ValueError if names are missing or unexpected, or if the copies differ (trained in
    diffusers)."""
    numbers = [int(match[1]) for name in tensors if (match := re.match(r"transformer_blocks\.(\d+)\.", name))]
    depth = min(max(numbers) + 1, len(tensors))
    places = {native: _names(native, depth) for native in _all_natives(depth)}
    wanted = [name for parts in places.values() for copies in parts for name in copies]
    missing, unexpected = [n for n in wanted if n not in tensors], sorted(tensors.keys() - set(wanted))
    if missing or unexpected:
        counts = {"missing": missing, "unexpected": unexpected}
        text = "; ".join(f"{len(n)} {what} (first: {', '.join(n[:3])})" for what, n in counts.items() if n)
        raise ValueError(
            f"{source} does not fit diffusers' DiTTransformer2DModel ({len(wanted)} tensors wanted, {len(tensors)} "
            f"found); {text}. It looks like {guess(tensors)}"
        )
    for first, *copies in (copies for parts in places.values() for copies in parts):
        for name in copies:
            if not torch.equal(tensors[name], tensors[first]):
                raise ValueError(
                    f"{source}: {name} differs from {first}. diffusers gives every block its own embedders, and they "
                    "were trained separately here; a DiT has one. This file can be used in diffusers only."
                )
    return {native: torch.cat([tensors[copies[0]] for copies in parts]) for native, parts in places.items()}


def _diffusers_config(model: DiT) -> dict[str, object]:
    """config.json of `DiTTransformer2DModel`. ValueError for a network that it cannot describe."""
    c = model.config
    table = sincos_positions(c.grid, c.hidden_size, device=model.pos_embed.device)[None]
    reasons = {
        "an unconditional one": not c.num_classes,
        "one without a null class": not c.class_dropout_prob,
        "one without gates": not c.gates,
        f"mlp_ratio {c.mlp_ratio} (only 4)": c.mlp_ratio != 4,
        f"a latent of {c.latent} (only squares)": c.latent[0] != c.latent[1],
        # Averaging rounds the table of the released networks by some 1e-6; bf16 by 4e-3.
        "a position table of its own": (model.pos_embed - table).abs().max() > 1e-2,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"diffusers' DiTTransformer2DModel has no place for {reason}. Use the layout 'official'.")
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": "0.36.0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": c.hidden_size // c.num_heads,
        "in_channels": c.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": c.num_heads,
        "num_embeds_ada_norm": c.num_classes,
        "num_layers": c.depth,
        "out_channels": c.out_channels,
        "patch_size": c.patch_size,
        "sample_size": c.latent[0],
    }
