"""ViT, DiT, DiffiT and Gaussian diffusion written out a second time from the papers, in float64 and without any part of
condit; and fixtures made of them, of the kinds in golden/{vit,dit,diffit} (their README tells the keys).
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def random(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    # Rounded to what float32 holds, so that both sides begin with the same numbers.
    return (scale * torch.randn(shape, generator=generator)).double()


def write(folder: Path, name: str, facts: dict, tensors: Tensors) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(facts))
    wide = name.startswith(("pos_embed", "schedules"))  # those stay in float64
    narrow = {
        k: x.detach().float() if x.dtype == torch.float64 and not wide else x.detach() for k, x in tensors.items()
    }
    save_file({k: x.contiguous().clone() for k, x in narrow.items()}, folder / f"{name}.safetensors")


# Parts of all three


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def affine(p: Tensors, name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, p[f"{name}.weight"]) + p[f"{name}.bias"]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(B, N, H, d) each; bias (H, N, N)."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1]) + bias
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)


def sincos(side: int, dim: int) -> Tensor:
    rows = []
    for row in range(side):
        for column in range(side):
            angles = [(place, k) for place in (column, row) for k in range(dim // 4)]
            values = [[f(place / 10000 ** (k / (dim // 4))) for place, k in angles] for f in (math.sin, math.cos)]
            half = dim // 4
            rows.append(values[0][:half] + values[1][:half] + values[0][half:] + values[1][half:])
    return torch.tensor(rows, dtype=torch.float64)


def clock(t: Tensor) -> Tensor:
    """In float32, as the official code has it: at t = 999 the angles would differ by 6e-5 otherwise."""
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    return torch.cat([angles.cos(), angles.sin()], 1).double()


def tokens_of(p: Tensors, c: dict, x: Tensor) -> Tensor:
    size = c["patch_size"]
    patches = [
        x[:, :, i : i + size, j : j + size].flatten(1)
        for i in range(0, x.shape[2], size)
        for j in range(0, x.shape[3], size)
    ]
    weight = p["x_embedder.proj.weight"].flatten(1)
    return torch.einsum("bni,oi->bno", torch.stack(patches, 1), weight) + p["x_embedder.proj.bias"]


def picture_of(c: dict, tokens: Tensor, side: int) -> Tensor:
    size, channels = c["patch_size"], tokens.shape[-1] // c["patch_size"] ** 2
    out = tokens.new_zeros(len(tokens), channels, side, side)
    for n in range(tokens.shape[1]):
        row, column = divmod(n, side // size)
        patch = tokens[:, n].reshape(-1, size, size, channels).permute(0, 3, 1, 2)
        out[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size] = patch
    return out


def embedding(p: Tensors, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    time = affine(p, "t_embedder.mlp.2", silu(affine(p, "t_embedder.mlp.0", clock(t))))
    return time, p["y_embedder.embedding_table.weight"][y]


# DiT


def shapes(c: dict, diffit: bool) -> dict[str, tuple[int, ...]]:
    """The official names."""
    d, size, channels, hidden = (
        c["hidden_size"],
        c["patch_size"],
        c["in_channels"],
        int(c["hidden_size"] * c["mlp_ratio"]),
    )
    rows, side = c["num_classes"] + (c["class_dropout_prob"] > 0), c["input_size"] // size
    linears = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    tables = {}
    for i in range(c["depth"]):
        b = f"blocks.{i}"
        if diffit:
            tables[f"{b}.attn.relative_position_bias_table"] = ((2 * side - 1) ** 2, c["num_heads"])
            linears[f"{b}.attn.qkv_temb"] = (3 * d, d)
        linears |= {f"{b}.attn.qkv": (3 * d, d), f"{b}.attn.proj": (d, d)}
        linears |= {f"{b}.mlp.fc1": (hidden, d), f"{b}.mlp.fc2": (d, hidden)}
        if not diffit:
            linears[f"{b}.adaLN_modulation.1"] = (6 * d, d)
    linears["final_layer.linear"] = (size**2 * channels * (1 + c["learn_sigma"]), d)
    if not diffit:
        linears["final_layer.adaLN_modulation.1"] = (2 * d, d)
    values: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, channels, size, size),
        "x_embedder.proj.bias": (d,),
    }
    values |= {"y_embedder.embedding_table.weight": (rows, d)} | tables
    for name, shape in linears.items():
        values |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return values


def weights(c: dict, seed: int, diffit: bool = False) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    side = c["input_size"] // c["patch_size"]
    drawn = {name: random(g, *shape, scale=0.15) for name, shape in shapes(c, diffit).items()}
    return {"pos_embed": sincos(side, c["hidden_size"])[None].float().double(), **drawn}


def dit(p: Tensors, c: dict, x: Tensor, t: Tensor, y: Tensor) -> Tensors:
    """Every activation that the fixtures record, and `out`."""
    time, label = embedding(p, t, y)
    acts = {"patch_tokens": tokens_of(p, c, x), "t_sinusoid": clock(t), "t_embed": time, "y_embed": label}
    tokens, signal = acts["patch_tokens"] + p["pos_embed"], silu(time + label)
    for i in range(c["depth"]):
        b = f"blocks.{i}"
        s1, g1, a1, s2, g2, a2 = affine(p, f"{b}.adaLN_modulation.1", signal)[:, None].chunk(6, -1)
        q, k, v = (
            affine(p, f"{b}.attn.qkv", norm(tokens) * (1 + g1) + s1).unflatten(-1, (3, c["num_heads"], -1)).unbind(2)
        )
        attended = affine(p, f"{b}.attn.proj", attention(q, k, v))
        tokens = tokens + a1 * attended
        mlp = affine(p, f"{b}.mlp.fc2", gelu(affine(p, f"{b}.mlp.fc1", norm(tokens) * (1 + g2) + s2)))
        tokens = tokens + a2 * mlp
        acts |= {f"block.{i}": tokens} | ({} if i else {"block.0.attn": attended, "block.0.mlp": mlp})
    shift, scale = affine(p, "final_layer.adaLN_modulation.1", signal)[:, None].chunk(2, -1)
    acts["final_tokens"] = affine(p, "final_layer.linear", norm(tokens) * (1 + scale) + shift)
    return acts | {"out": picture_of(c, acts["final_tokens"], x.shape[-1])}


def guided(p: Tensors, c: dict, network, x: Tensor, t: Tensor, y: Tensor, scale) -> Tensor:
    """[guided; second half]: three channels of the noise, everything else of each branch. scale may depend on t."""
    with_class, without = (network(p, c, x, t, labels)["out"] for labels in (y, torch.full_like(y, c["num_classes"])))
    s = torch.tensor([scale(float(v)) for v in t]).double()[:, None, None, None]
    noise = without[:, :3] + s * (with_class[:, :3] - without[:, :3])
    return torch.cat([torch.cat([noise, half[:, 3:]], 1) for half in (with_class, without)])


def write_dit(folder: Path, name: str, c: dict, *, seed: int, scales: tuple[float, ...] = (1.0, 4.0)) -> Tensors:
    g, p = torch.Generator().manual_seed(seed + 1), weights(c, seed)
    x = random(g, 3, c["in_channels"], c["input_size"], c["input_size"])
    t, y, fractional = torch.tensor([0, 417, 999]), torch.tensor([0, 1, 2]), torch.tensor([0.5, 333.25, 998.75])
    acts = dit(p, c, x, t, y)
    values = {"input.x": x, "input.t": t, "input.y": y, "input.t_fractional": fractional}
    values |= {"output.eps_sigma": acts.pop("out")} | {f"act.{k}": v for k, v in acts.items()}
    values["output.t_embed_fractional"] = embedding(p, fractional, y)[0]
    if c["class_dropout_prob"]:
        dropped = torch.tensor([1, 0, 1])
        values["input.force_drop_ids"] = dropped
        table = p["y_embedder.embedding_table.weight"]
        values["output.y_embed_forced_drop"] = table[torch.where(dropped == 1, c["num_classes"], y)]
        values |= {f"output.cfg_{s}": guided(p, c, dit, x, t, y, lambda _, s=s: s) for s in scales}
    counts = {k: v.numel() for k, v in p.items()}
    facts = {"kind": "dit_forward", "config": c, "num_parameters": sum(counts.values())}
    facts["num_trainable"] = facts["num_parameters"] - counts["pos_embed"]
    write(folder, name, facts, values | {f"state.{k}": v for k, v in p.items()})
    return p


# DiffiT


def offset(query: int, key: int, side: int) -> int:
    """The entry of a bias table that belongs to two tokens."""
    (r, c), (row, column) = divmod(query, side), divmod(key, side)
    return (r - row + side - 1) * (2 * side - 1) + c - column + side - 1


def diffit(p: Tensors, c: dict, x: Tensor, t: Tensor, y: Tensor) -> Tensors:
    side, heads = c["input_size"] // c["patch_size"], c["num_heads"]
    acts = {"patch_tokens": tokens_of(p, c, x), "cond": sum(embedding(p, t, y))}
    tokens = acts["patch_tokens"] + p["pos_embed"]
    for i in range(c["depth"]):
        b = f"blocks.{i}"
        table = p[f"{b}.attn.relative_position_bias_table"]
        bias = torch.stack([table[[offset(n, m, side) for m in range(side**2)]] for n in range(side**2)])
        both = affine(p, f"{b}.attn.qkv", norm(tokens)) + affine(p, f"{b}.attn.qkv_temb", acts["cond"])[:, None]
        q, k, v = both.unflatten(-1, (3, heads, -1)).unbind(2)
        attended = affine(p, f"{b}.attn.proj", attention(q, k, v, bias.permute(2, 0, 1)))
        tokens = tokens + attended
        tokens = tokens + affine(p, f"{b}.mlp.fc2", gelu(affine(p, f"{b}.mlp.fc1", norm(tokens))))
        acts |= {f"block.{i}": tokens} | ({} if i else {"block.0.attn": attended})
    acts["final_tokens"] = affine(p, "final_layer.linear", silu(norm(tokens)))
    return acts | {"out": picture_of(c, acts["final_tokens"], x.shape[-1])}


# ViT, with parameters as the authors' arrays hold them


def vit_weights(c: dict, seed: int) -> Tensors:
    g, d, heads, hidden = torch.Generator().manual_seed(seed), c["hidden_size"], c["num_heads"], c["mlp_dim"]
    token, wide = c["classifier"].startswith("token"), c["representation_size"] or c["hidden_size"]
    size, count = c["patch_size"], (c["image_size"] // c["patch_size"]) ** 2
    dense: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"embedding": ((size, size, 3, d), (d,))}
    norms = ["Transformer/encoder_norm"]
    for i in range(c["num_layers"]):
        b = f"Transformer/encoderblock_{i}"
        norms += [f"{b}/LayerNorm_0", f"{b}/LayerNorm_1"]
        for part in ("query", "key", "value"):
            dense[f"{b}/MultiHeadDotProductAttention_0/{part}"] = (d, heads, d // heads), (heads, d // heads)
        dense[f"{b}/MultiHeadDotProductAttention_0/out"] = (heads, d // heads, d), (d,)
        dense[f"{b}/MlpBlock_0/Dense_0"], dense[f"{b}/MlpBlock_0/Dense_1"] = (
            ((d, hidden), (hidden,)),
            ((hidden, d), (d,)),
        )
    if c["representation_size"]:
        dense["pre_logits"] = (d, wide), (wide,)
    if c["num_classes"]:
        dense["head"] = (wide, c["num_classes"]), (c["num_classes"],)
    values = {"Transformer/posembed_input/pos_embedding": random(g, 1, count + token, d, scale=0.3)}
    values |= {"cls": random(g, 1, 1, d)} if token else {}
    for name, (kernel, bias) in dense.items():
        values |= {f"{name}/kernel": random(g, *kernel, scale=0.15), f"{name}/bias": random(g, *bias, scale=0.15)}
    for name in norms:
        values |= {
            f"{name}/scale": 1 + random(g, d, scale=0.1).float().double(),
            f"{name}/bias": random(g, d, scale=0.1),
        }
    return {k: v.float().double() for k, v in values.items()}


def vit(p: Tensors, c: dict, images: Tensor) -> Tensors:
    """images (B, H, W, 3)."""
    size, side = c["patch_size"], images.shape[1] // c["patch_size"]
    cells = images.reshape(len(images), side, size, side, size, 3)
    grid = torch.einsum("niajbc,abcd->nijd", cells, p["embedding/kernel"]) + p["embedding/bias"]
    x = grid.flatten(1, 2)
    x = torch.cat([p["cls"].expand(len(x), -1, -1), x], 1) if "cls" in p else x
    x = x + p["Transformer/posembed_input/pos_embedding"]
    acts = {"patch_grid_nhwc": grid, "tokens_with_pos": x}

    def layer_norm(name: str, x: Tensor) -> Tensor:
        return norm(x) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    for i in range(c["num_layers"]):
        b = f"Transformer/encoderblock_{i}"
        a, h = f"{b}/MultiHeadDotProductAttention_0", layer_norm(f"{b}/LayerNorm_0", x)
        q, k, v = (
            torch.einsum("bnd,dhe->bnhe", h, p[f"{a}/{part}/kernel"]) + p[f"{a}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        joined = attention(q, k, v).unflatten(-1, (c["num_heads"], -1))
        attended = torch.einsum("bnhe,hed->bnd", joined, p[f"{a}/out/kernel"]) + p[f"{a}/out/bias"]
        x = x + attended
        h = gelu(dense(f"{b}/MlpBlock_0/Dense_0", layer_norm(f"{b}/LayerNorm_1", x)))
        mlp = dense(f"{b}/MlpBlock_0/Dense_1", h)
        x = x + mlp
        acts |= {f"block.{i}": x} | ({} if i else {"block.0.attn": attended, "block.0.mlp": mlp})
    x = acts["encoder_output"] = layer_norm("Transformer/encoder_norm", x)
    x = x[:, 0] if c["classifier"] == "token" else x.mean(1) if c["classifier"] == "gap" else x
    if c["representation_size"]:
        x = acts["pre_logits_input_or_identity"] = dense("pre_logits", x)
        x = torch.tanh(x)
    else:
        acts["pre_logits_input_or_identity"] = x
    return acts | {"out": dense("head", x) if c["num_classes"] else x}


def write_vit(folder: Path, name: str, c: dict, *, seed: int) -> Tensors:
    p = vit_weights(c, seed)
    images = random(torch.Generator().manual_seed(seed + 1), 2, c["image_size"], c["image_size"], 3)
    acts = vit(p, c, images)
    tensors = {"input.image_nhwc": images, "output.logits": acts.pop("out")} | {f"act.{k}": v for k, v in acts.items()}
    write(folder, name, {"kind": "vit_forward", "config": c}, tensors | {f"npz.{k}": v for k, v in p.items()})
    return p


def write_legacy(folder: Path, name: str, p: Tensors) -> None:
    """The same arrays numbered as in the released archives."""
    names = {"Attention_0/": "Attention_1/", "LayerNorm_1/": "LayerNorm_2/", "MlpBlock_0/": "MlpBlock_3/"}
    arrays = {}
    for key, x in p.items():
        for now, then in names.items():
            key = key.replace(now, then)
        arrays[key] = x.float().numpy()
    np.savez(folder / f"{name}.npz", **arrays)


def write_resizing(folder: Path, name: str, cases: list[dict], seed: int) -> None:
    """Linear between the nearest rows and columns, corners on corners."""
    g, tensors = torch.Generator().manual_seed(seed), {}
    for i, case in enumerate(cases):
        old, new, first = case["old_grid"], case["new_grid"], int(case["has_class_token"])
        table = random(g, 1, old**2 + first, case["dim"])
        maps, rows = table[0, first:].reshape(old, old, -1), []
        for r in range(new):
            for c in range(new):
                y, x = (v * (old - 1) / (new - 1) for v in (r, c))
                y0, x0 = min(int(y), old - 2), min(int(x), old - 2)
                fy, fx = y - y0, x - x0
                top = maps[y0, x0] * (1 - fx) + maps[y0, x0 + 1] * fx
                rows.append(top * (1 - fy) + (maps[y0 + 1, x0] * (1 - fx) + maps[y0 + 1, x0 + 1] * fx) * fy)
        tensors[f"case{i}.input"] = table
        tensors[f"case{i}.output"] = torch.cat([table[:, :first], torch.stack(rows)[None]], 1)
    write(folder, name, {"cases": cases}, tensors)


def write_positions(folder: Path, cases: list[dict]) -> None:
    tables = {f"grid{case['grid']}_dim{case['dim']}": sincos(case["grid"], case["dim"]) for case in cases}
    write(folder, "pos_embed_b", {"cases": cases}, tables)
