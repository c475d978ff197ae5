"""Gaussian diffusion (Nichol & Dhariwal 2021) written out a second time from the papers, for `plain.py`."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plain import Tensors, diffit, dit, guided, random, weights, write


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
    true, predicted = p.posterior(x0, x, i), p.reverse(out, x, i, options)
    ratio = predicted["log_variance"] - true["log_variance_clipped"]
    kl = 0.5 * (
        -1 + ratio + (-ratio).exp() + (true["mean"] - predicted["mean"]) ** 2 * (-predicted["log_variance"]).exp()
    )

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    scaled = [(x0 - predicted["mean"] + d / 255) * (-0.5 * predicted["log_variance"]).exp() for d in (1, -1)]
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
        predicted = p.reverse(denoise(x, torch.tensor(p.timestep_map)[i]), x, i, options, clip)
        if eta is None:
            after, spread = predicted["mean"], (0.5 * predicted["log_variance"]).exp()
        else:
            bar, before = p.alphas_cumprod[step], p.before[step]
            sigma = eta * math.sqrt((1 - before) / (1 - bar)) * math.sqrt(1 - bar / before)
            direction = p.noise_in(x, predicted["pred_xstart"], i)
            after = math.sqrt(before) * predicted["pred_xstart"] + math.sqrt(1 - before - sigma**2) * direction
            spread = sigma
        x = after + (spread * noises[number] if step else 0)
        seen.append((x, predicted["pred_xstart"]))
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
    values: Tensors = {"input.x_start": x0, "input.noise": noise, "input.t": i, "input.y": y}

    def network(x: Tensor, t: Tensor) -> Tensor:
        return dit(leaves, c, x, t, y)["out"]

    for variant, options in variants.items():
        process = Tables(options.get("noise_schedule", "linear"))
        terms = losses(process, network, x0, noise, i, options)
        values |= {f"loss.{variant}.{k}": v for k, v in terms.items()}
        if variant == "default":
            terms["loss"].mean().backward()
    values["grad_norms"] = torch.tensor([-1.0 if v.grad is None else float(v.grad.norm()) for v in leaves.values()])
    values |= {f"grad.{k}": gradient(leaves[k]) for k in ("x_embedder.proj.weight", "final_layer.linear.weight")}
    options, process = variants["default"], Tables()
    x = values["q_sample"] = process.noised(x0, noise, i)
    values |= {f"q_posterior.{k}": v for k, v in process.posterior(x0, x, i).items()}
    for clip in (0, 1):
        step = process.reverse(network(x, i), x, i, options, bool(clip))
        values |= {f"p_mean_variance.clip_{clip}.{k}": v for k, v in step.items()}
    bar = process.alphas_cumprod[-1]
    kl = 0.5 * (-1 - math.log(1 - bar) + (1 - bar) + bar * x0**2)
    values["prior_bpd"] = kl.flatten(1).mean(1) / math.log(2)
    sample(values, c, p, Tables(respacing=respacing), options, scale, g)
    facts = {"kind": "dit_diffusion", "model_fixture": model, "config": c, "variants": variants}
    facts |= {"sampling": {"respacing": respacing, "cfg_scale": scale}, "grad_norm_order": list(leaves)}
    write(folder, name, facts, values)


def sample(
    tensors: Tensors, c: dict, p: Tensors, process: Tables, options: dict, scale: float, g: torch.Generator
) -> None:
    """Trajectories of every sampler, guided as the official batch of [z; z] is, and one inversion."""
    n, side = 2, c["input_size"]
    z, y = random(g, n, c["in_channels"], side, side), torch.tensor([2, 1])
    noises = random(g, len(process.betas), 2 * n, c["in_channels"], side, side)
    tensors |= {"sample.z": z, "sample.y": y, "sample.step_noise": noises}
    tensors["sample.timesteps"] = torch.tensor(process.timestep_map[::-1].copy())

    def both(x: Tensor, t: Tensor) -> Tensor:
        return guided(p, c, dit, x[:n], t[:n], y, lambda _: scale)

    doubled = torch.cat([z, z])
    ways = {"ddpm": {}, "ddpm_clip": {"clip": True}, "ddim_eta0": {"eta": 0.0}, "ddim_eta1": {"eta": 1.0}}
    for name, how in ways.items():
        xs, x0s = walk(process, both, doubled, noises, options, **how)
        tensors |= {f"sample.{name}.x": xs, f"sample.{name}.pred_xstart": x0s}
    tensors["sample.ddpm_nocfg.x"] = walk(process, lambda x, t: dit(p, c, x, t, y)["out"], z, noises[:, :n], options)[0]
    i = torch.tensor([1, 2])
    times = torch.tensor(process.timestep_map)[i]
    x0 = process.reverse(dit(p, c, z, times, y)["out"], z, i, options)["pred_xstart"]
    after = np.append(process.alphas_cumprod[1:], 0.0)
    inverted = process(np.sqrt(after), i) * x0 + process(np.sqrt(1 - after), i) * process.noise_in(z, x0, i)
    tensors |= {"ddim_reverse.t_index": i, "ddim_reverse.x": inverted}


def write_schedules(folder: Path, respacings: tuple[str, ...]) -> None:
    values: Tensors = {}
    for schedule in ("linear", "squaredcos_cap_v2"):
        tables = {k: v for k, v in vars(Tables(schedule)).items() if k not in ("before", "timestep_map")}
        values |= {f"{schedule}.1000.{k}": torch.tensor(v) for k, v in tables.items()}
    for how in respacings:
        process = Tables(respacing=how)
        key = f"linear.respaced_{how.replace(',', '_')}"
        values |= {
            f"{key}.{k}": torch.tensor(getattr(process, k)) for k in ("timestep_map", "betas", "posterior_variance")
        }
    write(folder, "schedules_b", {"respaced_timesteps": dict.fromkeys(respacings, [])}, values)


def write_diffit(
    folder: Path, name: str, c: dict, *, seed: int, guidance: str, cases: list[dict], respacing: str
) -> None:
    g, p = torch.Generator().manual_seed(seed + 1), weights(c, seed, diffit=True)
    shape = 3, c["in_channels"], c["input_size"], c["input_size"]
    x, noise, t, y = random(g, *shape), random(g, *shape), torch.tensor([5, 417, 999]), torch.tensor([0, 1, 2])
    options, leaves = {"learn_sigma": c["learn_sigma"]}, {k: v.clone().requires_grad_() for k, v in p.items()}
    acts = diffit(p, c, x, t, y)
    values = {"input.x": x, "input.noise": noise, "input.t": t, "input.y": y, "output.eps_sigma": acts.pop("out")}
    values |= {f"act.{k}": v for k, v in acts.items()}

    def schedule(scale: float, power: float):
        if guidance == "constant":
            return lambda _: scale
        return lambda v: 1 + (scale - 1) * (1 - math.cos(math.pi * (1 - v / 1000) ** power)) / 2

    for case in cases:
        key = f"output.cfg_{case['scale']}_pow_{case['power']}"
        values[key] = guided(p, c, diffit, x, t, y, schedule(case["scale"], case["power"]))
    terms = losses(Tables(), lambda x, t: diffit(leaves, c, x, t, y)["out"], x, noise, t, options)
    terms["loss"].mean().backward()
    values |= {f"loss.{k}": v for k, v in terms.items()}
    tracked = ("blocks.0.attn.qkv_temb.weight", "blocks.0.attn.relative_position_bias_table")
    values |= {f"grad.{k}": gradient(leaves[k]) for k in tracked}
    settings = {"respacing": respacing, "cfg_scale": 1.0, "scale_pow": 4.0, "diffusion_steps": 1000}
    if cases:
        settings |= {"cfg_scale": cases[0]["scale"], "scale_pow": cases[0]["power"]}
        process = Tables(respacing=respacing)
        noises = random(g, len(process.betas), 4, *shape[1:])
        rule = schedule(cases[0]["scale"], cases[0]["power"])

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return guided(p, c, diffit, x[:2], t[:2], y[:2], rule)

        values["sample.ddpm.x"], _ = walk(process, denoise, torch.cat([x[:2], x[:2]]), noises, options)
        values |= {"sample.step_noise": noises, "sample.timesteps": torch.tensor(process.timestep_map[::-1].copy())}
    facts = {"config": c, "guidance": guidance, "guidance_cases": cases, "sampling": settings}
    write(folder, name, facts, values | {f"state.{k}": v for k, v in p.items()})
