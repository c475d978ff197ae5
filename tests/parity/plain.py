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
    found: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, channels, size, size),
        "x_embedder.proj.bias": (d,),
    }
    found |= {"y_embedder.embedding_table.weight": (rows, d)} | tables
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


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
    found = {"input.x": x, "input.t": t, "input.y": y, "input.t_fractional": fractional}
    found |= {"output.eps_sigma": acts.pop("out")} | {f"act.{k}": v for k, v in acts.items()}
    found["output.t_embed_fractional"] = embedding(p, fractional, y)[0]
    if c["class_dropout_prob"]:
        dropped = torch.tensor([1, 0, 1])
        found["input.force_drop_ids"] = dropped
        table = p["y_embedder.embedding_table.weight"]
        found["output.y_embed_forced_drop"] = table[torch.where(dropped == 1, c["num_classes"], y)]
        found |= {f"output.cfg_{s}": guided(p, c, dit, x, t, y, lambda _, s=s: s) for s in scales}
    counts = {k: v.numel() for k, v in p.items()}
    facts = {"kind": "dit_forward", "config": c, "num_parameters": sum(counts.values())}
    facts["num_trainable"] = facts["num_parameters"] - counts["pos_embed"]
    write(folder, name, facts, found | {f"state.{k}": v for k, v in p.items()})
    return p


# Gaussian diffusion


def betas_of(schedule: str, steps: int) -> np.ndarray:
    if schedule == "linear":
        return np.array([(1e-4 + i * (2e-2 - 1e-4) / (steps - 1)) * 1000 / steps for i in range(steps)])
    bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(steps)])


def respaced(steps: int, how: str) -> list[int]:
    if how.startswith("ddim"):
        stride = next(s for s in range(1, steps) if math.ceil(steps / s) == int(how[4:]))
        return list(range(0, steps, stride))
    counts, start, kept = [int(part) for part in how.split(",")], 0, []
    for section, count in enumerate(counts):
        size = steps // len(counts) + (1 if section < steps % len(counts) else 0)
        place, stride = 0.0, (size - 1) / (count - 1) if count > 1 else 1
        for _ in range(count):
            kept.append(start + int(np.rint(place)))  # half to even
            place += stride
        start += size
    return kept


class Tables:
    """The coefficients of a process, (N,) float64."""

    def __init__(self, schedule: str = "linear", steps: int = 1000, respacing: str | None = None):
        betas = betas_of(schedule, steps)
        self.timestep_map = np.array(respaced(steps, respacing) if respacing else range(steps))
        bars, last, self.betas = np.cumprod(1 - betas), 1.0, []
        for i in self.timestep_map:
            self.betas.append(1 - bars[i] / last)
            last = bars[i]
        self.betas = np.array(self.betas)
        bar = self.alphas_cumprod = np.cumprod(1 - self.betas)
        before = self.before = np.append(1.0, bar[:-1])
        self.posterior_variance = self.betas * (1 - before) / (1 - bar)
        clipped = np.append(self.posterior_variance[1], self.posterior_variance[1:])
        self.posterior_log_variance_clipped = np.log(clipped)
        self.posterior_mean_coef1 = self.betas * np.sqrt(before) / (1 - bar)
        self.posterior_mean_coef2 = (1 - before) * np.sqrt(1 - self.betas) / (1 - bar)
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / bar), np.sqrt(1 / bar - 1)

    def __call__(self, table: np.ndarray, i: Tensor) -> Tensor:
        return torch.tensor(table[i.numpy()])[:, None, None, None]

    def posterior(self, x0: Tensor, x: Tensor, i: Tensor) -> Tensors:
        mean = self(self.posterior_mean_coef1, i) * x0 + self(self.posterior_mean_coef2, i) * x
        named = {"variance": self.posterior_variance, "log_variance_clipped": self.posterior_log_variance_clipped}
        return {"mean": mean} | {k: self(table, i).expand_as(x) for k, table in named.items()}

    def reverse(self, out: Tensor, x: Tensor, i: Tensor, options: dict, clip: bool = False) -> Tensors:
        noise = out[:, : x.shape[1]]
        low = self(self.posterior_log_variance_clipped, i).expand_as(x)
        if options["learn_sigma"]:
            f = (out[:, x.shape[1] :] + 1) / 2
            log_variance = f * self(np.log(self.betas), i) + (1 - f) * low
        elif options.get("sigma_small"):
            log_variance = low
        else:
            log_variance = self(np.log(np.append(self.posterior_variance[1], self.betas[1:])), i).expand_as(x)
        variance = log_variance.exp()
        if options.get("sigma_small") and not options["learn_sigma"]:
            variance = self(self.posterior_variance, i).expand_as(x)
        x0 = noise
        if not options.get("predict_xstart"):
            x0 = self(self.sqrt_recip_alphas_cumprod, i) * x - self(self.sqrt_recipm1_alphas_cumprod, i) * noise
        x0 = x0.clamp(-1, 1) if clip else x0
        mean = self.posterior(x0, x, i)["mean"]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}

    def noise_in(self, x: Tensor, x0: Tensor, i: Tensor) -> Tensor:
        return (self(self.sqrt_recip_alphas_cumprod, i) * x - x0) / self(self.sqrt_recipm1_alphas_cumprod, i)

    def noised(self, x0: Tensor, noise: Tensor, i: Tensor) -> Tensor:
        return self(np.sqrt(self.alphas_cumprod), i) * x0 + self(np.sqrt(1 - self.alphas_cumprod), i) * noise


def bits(p: Tables, out: Tensor, x0: Tensor, x: Tensor, i: Tensor, options: dict) -> Tensor:
    true, found = p.posterior(x0, x, i), p.reverse(out, x, i, options)
    ratio = found["log_variance"] - true["log_variance_clipped"]
    kl = 0.5 * (-1 + ratio + (-ratio).exp() + (true["mean"] - found["mean"]) ** 2 * (-found["log_variance"]).exp())

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    scaled = [(x0 - found["mean"] + d / 255) * (-0.5 * found["log_variance"]).exp() for d in (1, -1)]
    upper, lower = map(cdf, scaled)
    mass = torch.where(x0 > 0.999, 1 - lower, upper - lower)
    nll = -torch.where(x0 < -0.999, upper, mass).clamp(min=1e-12).log()
    return torch.where(i[:, None, None, None] == 0, nll, kl).flatten(1).mean(1) / math.log(2)


def losses(p: Tables, network, x0: Tensor, noise: Tensor, i: Tensor, options: dict) -> Tensors:
    x = p.noised(x0, noise, i)
    out, channels, n = network(x, i), x.shape[1], len(p.betas)
    if options.get("use_kl"):
        return {"loss": n * bits(p, out, x0, x, i, options)}
    target = x0 if options.get("predict_xstart") else noise
    mse = (out[:, :channels] - target).pow(2).flatten(1).mean(1)
    if not options["learn_sigma"]:
        return {"loss": mse, "mse": mse}
    vb = bits(p, torch.cat([out[:, :channels].detach(), out[:, channels:]], 1), x0, x, i, options)
    vb = vb * n / 1000 if options.get("rescale_learned_sigmas") else vb
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def walk(p: Tables, denoise, x: Tensor, noises: Tensor, options: dict, *, eta: float | None = None, clip: bool = False):
    """x and x0 after every step; eta None: ancestral."""
    seen = []
    for number, step in enumerate(reversed(range(len(p.betas)))):
        i = torch.full((len(x),), step)
        found = p.reverse(denoise(x, torch.tensor(p.timestep_map)[i]), x, i, options, clip)
        if eta is None:
            after, spread = found["mean"], (0.5 * found["log_variance"]).exp()
        else:
            bar, before = p.alphas_cumprod[step], p.before[step]
            sigma = eta * math.sqrt((1 - before) / (1 - bar)) * math.sqrt(1 - bar / before)
            direction = p.noise_in(x, found["pred_xstart"], i)
            after = math.sqrt(before) * found["pred_xstart"] + math.sqrt(1 - before - sigma**2) * direction
            spread = sigma
        x = after + (spread * noises[number] if step else 0)
        seen.append((x, found["pred_xstart"]))
    return torch.stack([x for x, _ in seen]), torch.stack([x0 for _, x0 in seen])


def gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def write_diffusion(
    folder: Path, name: str, model: str, c: dict, p: Tensors, *, variants: dict, respacing: str, scale: float, seed: int
) -> None:
    g, side = torch.Generator().manual_seed(seed), c["input_size"]
    shape = 4, c["in_channels"], side, side
    x0, noise = random(g, *shape, scale=0.7), random(g, *shape)
    i, y = torch.tensor([1, 120, 500, 999]), torch.tensor([0, 1, 2, 0])
    leaves = {k: v.clone().requires_grad_(k != "pos_embed") for k, v in p.items()}
    found: Tensors = {"input.x_start": x0, "input.noise": noise, "input.t": i, "input.y": y}

    def network(x: Tensor, t: Tensor) -> Tensor:
        return dit(leaves, c, x, t, y)["out"]

    for variant, options in variants.items():
        process = Tables(options.get("noise_schedule", "linear"))
        terms = losses(process, network, x0, noise, i, options)
        found |= {f"loss.{variant}.{k}": v for k, v in terms.items()}
        if variant == "default":
            terms["loss"].mean().backward()
    found["grad_norms"] = torch.tensor([-1.0 if v.grad is None else float(v.grad.norm()) for v in leaves.values()])
    found |= {f"grad.{k}": gradient(leaves[k]) for k in ("x_embedder.proj.weight", "final_layer.linear.weight")}
    options, process = variants["default"], Tables()
    x = found["q_sample"] = process.noised(x0, noise, i)
    found |= {f"q_posterior.{k}": v for k, v in process.posterior(x0, x, i).items()}
    for clip in (0, 1):
        step = process.reverse(network(x, i), x, i, options, bool(clip))
        found |= {f"p_mean_variance.clip_{clip}.{k}": v for k, v in step.items()}
    bar = process.alphas_cumprod[-1]
    kl = 0.5 * (-1 - math.log(1 - bar) + (1 - bar) + bar * x0**2)
    found["prior_bpd"] = kl.flatten(1).mean(1) / math.log(2)
    sample(found, c, p, Tables(respacing=respacing), options, scale, g)
    facts = {"kind": "dit_diffusion", "model_fixture": model, "config": c, "variants": variants}
    facts |= {"sampling": {"respacing": respacing, "cfg_scale": scale}, "grad_norm_order": list(leaves)}
    write(folder, name, facts, found)


def sample(
    found: Tensors, c: dict, p: Tensors, process: Tables, options: dict, scale: float, g: torch.Generator
) -> None:
    """Trajectories of every sampler, guided as the official batch of [z; z] is, and one inversion."""
    n, side = 2, c["input_size"]
    z, y = random(g, n, c["in_channels"], side, side), torch.tensor([2, 1])
    noises = random(g, len(process.betas), 2 * n, c["in_channels"], side, side)
    found |= {"sample.z": z, "sample.y": y, "sample.step_noise": noises}
    found["sample.timesteps"] = torch.tensor(process.timestep_map[::-1].copy())

    def both(x: Tensor, t: Tensor) -> Tensor:
        return guided(p, c, dit, x[:n], t[:n], y, lambda _: scale)

    doubled = torch.cat([z, z])
    ways = {"ddpm": {}, "ddpm_clip": {"clip": True}, "ddim_eta0": {"eta": 0.0}, "ddim_eta1": {"eta": 1.0}}
    for name, how in ways.items():
        xs, x0s = walk(process, both, doubled, noises, options, **how)
        found |= {f"sample.{name}.x": xs, f"sample.{name}.pred_xstart": x0s}
    found["sample.ddpm_nocfg.x"] = walk(process, lambda x, t: dit(p, c, x, t, y)["out"], z, noises[:, :n], options)[0]
    i = torch.tensor([1, 2])
    times = torch.tensor(process.timestep_map)[i]
    x0 = process.reverse(dit(p, c, z, times, y)["out"], z, i, options)["pred_xstart"]
    after = np.append(process.alphas_cumprod[1:], 0.0)
    inverted = process(np.sqrt(after), i) * x0 + process(np.sqrt(1 - after), i) * process.noise_in(z, x0, i)
    found |= {"ddim_reverse.t_index": i, "ddim_reverse.x": inverted}


def write_schedules(folder: Path, respacings: tuple[str, ...]) -> None:
    found: Tensors = {}
    for schedule in ("linear", "squaredcos_cap_v2"):
        tables = {k: v for k, v in vars(Tables(schedule)).items() if k not in ("before", "timestep_map")}
        found |= {f"{schedule}.1000.{k}": torch.tensor(v) for k, v in tables.items()}
    for how in respacings:
        process = Tables(respacing=how)
        key = f"linear.respaced_{how.replace(',', '_')}"
        found |= {
            f"{key}.{k}": torch.tensor(getattr(process, k)) for k in ("timestep_map", "betas", "posterior_variance")
        }
    write(folder, "schedules_b", {"respaced_timesteps": dict.fromkeys(respacings, [])}, found)


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


def write_diffit(
    folder: Path, name: str, c: dict, *, seed: int, guidance: str, cases: list[dict], respacing: str
) -> None:
    g, p = torch.Generator().manual_seed(seed + 1), weights(c, seed, diffit=True)
    shape = 3, c["in_channels"], c["input_size"], c["input_size"]
    x, noise, t, y = random(g, *shape), random(g, *shape), torch.tensor([5, 417, 999]), torch.tensor([0, 1, 2])
    options, leaves = {"learn_sigma": c["learn_sigma"]}, {k: v.clone().requires_grad_() for k, v in p.items()}
    acts = diffit(p, c, x, t, y)
    found = {"input.x": x, "input.noise": noise, "input.t": t, "input.y": y, "output.eps_sigma": acts.pop("out")}
    found |= {f"act.{k}": v for k, v in acts.items()}

    def schedule(scale: float, power: float):
        if guidance == "constant":
            return lambda _: scale
        return lambda v: 1 + (scale - 1) * (1 - math.cos(math.pi * (1 - v / 1000) ** power)) / 2

    for case in cases:
        key = f"output.cfg_{case['scale']}_pow_{case['power']}"
        found[key] = guided(p, c, diffit, x, t, y, schedule(case["scale"], case["power"]))
    terms = losses(Tables(), lambda x, t: diffit(leaves, c, x, t, y)["out"], x, noise, t, options)
    terms["loss"].mean().backward()
    found |= {f"loss.{k}": v for k, v in terms.items()}
    tracked = ("blocks.0.attn.qkv_temb.weight", "blocks.0.attn.relative_position_bias_table")
    found |= {f"grad.{k}": gradient(leaves[k]) for k in tracked}
    settings = {"respacing": respacing, "cfg_scale": 1.0, "scale_pow": 4.0, "diffusion_steps": 1000}
    if cases:
        settings |= {"cfg_scale": cases[0]["scale"], "scale_pow": cases[0]["power"]}
        process = Tables(respacing=respacing)
        noises = random(g, len(process.betas), 4, *shape[1:])
        rule = schedule(cases[0]["scale"], cases[0]["power"])

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return guided(p, c, diffit, x[:2], t[:2], y[:2], rule)

        found["sample.ddpm.x"], _ = walk(process, denoise, torch.cat([x[:2], x[:2]]), noises, options)
        found |= {"sample.step_noise": noises, "sample.timesteps": torch.tensor(process.timestep_map[::-1].copy())}
    facts = {"config": c, "guidance": guidance, "guidance_cases": cases, "sampling": settings}
    write(folder, name, facts, found | {f"state.{k}": v for k, v in p.items()})


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
    found = {"Transformer/posembed_input/pos_embedding": random(g, 1, count + token, d, scale=0.3)}
    found |= {"cls": random(g, 1, 1, d)} if token else {}
    for name, (kernel, bias) in dense.items():
        found |= {f"{name}/kernel": random(g, *kernel, scale=0.15), f"{name}/bias": random(g, *bias, scale=0.15)}
    for name in norms:
        found |= {
            f"{name}/scale": 1 + random(g, d, scale=0.1).float().double(),
            f"{name}/bias": random(g, d, scale=0.1),
        }
    return {k: v.float().double() for k, v in found.items()}


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
    found = {"input.image_nhwc": images, "output.logits": acts.pop("out")} | {f"act.{k}": v for k, v in acts.items()}
    write(folder, name, {"kind": "vit_forward", "config": c}, found | {f"npz.{k}": v for k, v in p.items()})
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
    g, found = torch.Generator().manual_seed(seed), {}
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
        found[f"case{i}.input"] = table
        found[f"case{i}.output"] = torch.cat([table[:, :first], torch.stack(rows)[None]], 1)
    write(folder, name, {"cases": cases}, found)


def write_positions(folder: Path, cases: list[dict]) -> None:
    tables = {f"grid{case['grid']}_dim{case['dim']}": sincos(case["grid"], case["dim"]) for case in cases}
    write(folder, "pos_embed_b", {"cases": cases}, tables)
