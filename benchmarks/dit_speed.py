"""DiT: sampling in images/s and training in steps/s against the settings of the official recipe, in one run.

    python benchmarks/dit_speed.py --device cuda [--preset DiT-XL/2] [--batch 32] [--out benchmarks/results]

"official" is what sample.py and train.py of facebookresearch/DiT set: float32 with TF32 products, no compilation, the
doubled batch of the guidance at every step, AdamW and an average of the weights parameter by parameter. "condit" is
bfloat16 (autocast in training) and compiled, with the fused optimiser. Both run condit's network, so that the ratio is
that of the settings. A sampling step costs the same at every noise level: a few are timed, and images/s are those of
250. "share of peak" is the arithmetic of the matrix products (2 per multiply-accumulate, three forwards a training
step) over the rate that one large bfloat16 product reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from backbones import randomise
from timing import Timing, machine, measure, synchronise
from torch.utils.flop_counter import FlopCounterMode

from condit.backbones.dit import PRESETS, DiT, DiTConfig
from condit.diffusion.gaussian import gaussian, training_loss
from condit.diffusion.gaussian_samplers import ancestral
from condit.diffusion.guidance import class_guidance
from condit.diffusion.steps import by_timestep
from condit.training.optim import Average

SAMPLING_STEPS = 250
DECAY = 0.9999


@dataclass(frozen=True)
class Row:
    """per_s: images or steps. times: as fast as the official settings."""

    what: str
    settings: str
    per_s: float
    times: float
    share_of_peak: float | None
    timing: Timing


@contextmanager
def tf32() -> Iterator[None]:
    """Float32 products in TensorFloat-32, as the official scripts set them."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def forward_flops(config: DiTConfig, batch: int) -> float:
    """Of the matrix products of one forward, attention included."""
    with torch.device("meta"):
        model = DiT(config).eval()
        given = torch.empty(batch, config.in_channels, *config.latent), torch.zeros(batch), torch.zeros(batch).long()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*given)
    return float(counter.get_total_flops())


def matmul_peak(device: str, side: int) -> float:
    """Flops a second of one large bfloat16 product: the best of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        synchronise()
        began = time.perf_counter()
        _ = a @ b
        synchronise()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def sampling(config: DiTConfig, batch: int, steps: int, device: str) -> dict[str, Callable[[], object]]:
    """Guided ancestral sampling of so many steps."""
    model = DiT(config)
    randomise(model).to(device)
    small = deepcopy(model).to(torch.bfloat16)
    compiled = torch.compile(small, dynamic=False)
    x = torch.randn(batch, config.in_channels, *config.latent, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(batch, device=device) % (config.num_classes or 1)
    process = gaussian(respacing=str(steps))

    def run(network: Callable) -> torch.Tensor:
        g = torch.Generator(device).manual_seed(0)

        def noise(x: torch.Tensor) -> torch.Tensor:
            return torch.randn(x.shape, generator=g, device=device)

        with torch.inference_mode():
            return ancestral(
                by_timestep(class_guidance(network, labels, model.null_label, 4.0)), x, process, noise=noise
            )

    def official() -> torch.Tensor:
        with tf32():
            return run(model)

    def half(network: Callable) -> Callable:
        return lambda x, t, y: network(x.to(torch.bfloat16), t, y).float()

    return {
        "official: float32, TF32": official,
        "bfloat16": lambda: run(half(small)),
        "condit: bfloat16, compiled": lambda: run(half(compiled)),
    }


def training(config: DiTConfig, batch: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """One step: loss, gradients, AdamW, the average of the weights; every variant trains a network of its own."""
    model = randomise(DiT(config)).train().requires_grad_(True)
    model.pos_embed.requires_grad_(False)
    process, g = gaussian(), torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(batch, config.in_channels, *config.latent, generator=g).to(device) for _ in range(2))
    i = torch.randint(len(process), (batch,), generator=g)
    labels = (torch.arange(batch) % (config.num_classes or 1)).to(device)

    def variant(*, official: bool, compile: bool) -> Callable[[], torch.Tensor]:
        own = deepcopy(model).to(device)
        weights = {name: p for name, p in own.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(weights.values(), lr=1e-4, weight_decay=0, fused=not official)
        average, copy = Average(weights, DECAY), {name: p.detach().clone() for name, p in weights.items()}
        network = torch.compile(own, dynamic=False) if compile else own

        def step() -> torch.Tensor:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=not official):
                loss = training_loss(lambda x, t: network(x, t, labels), process, x0, i, noise).loss.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if official:
                with torch.no_grad():
                    for name, p in weights.items():
                        copy[name].mul_(DECAY).add_(p, alpha=1 - DECAY)
            else:
                average.update(weights)
            return loss.detach()

        def with_tf32() -> torch.Tensor:
            with tf32():
                return step()

        return with_tf32 if official else step

    return {
        "official: float32, TF32": variant(official=True, compile=False),
        "bfloat16 autocast": variant(official=False, compile=False),
        "condit: bfloat16 autocast, compiled": variant(official=False, compile=True),
    }


def rows(what: str, found: dict[str, Timing], amount: float, flops: float, peak: float | None) -> list[Row]:
    """amount: images or steps that one timed call stands for; flops of it."""
    base = next(iter(found.values())).seconds
    return [
        Row(what, name, amount / t.seconds, base / t.seconds, None if peak is None else flops / t.seconds / peak, t)
        for name, t in found.items()
    ]


def run(preset: str, config: DiTConfig, batch: int, *, device: str, steps: int, turns: int, side: int) -> list[Row]:
    """Everything of one preset. The share of the peak is told on accelerators only."""
    peak = matmul_peak(device, side) if device != "cpu" else None
    forward = forward_flops(config, batch)
    drawn = measure(sampling(config, batch, steps, device), turns=turns)
    sampled = f"sampling, {preset}, batch {batch}, images/s of {SAMPLING_STEPS} guided steps"
    found = rows(sampled, drawn, batch * steps / SAMPLING_STEPS, 2 * steps * forward, peak)
    trained = measure(training(config, batch, device), turns=turns)
    return found + rows(f"training, {preset}, batch {batch}, steps/s", trained, 1.0, 3 * forward, peak)


def page(found: list[Row], command: str) -> str:
    lines = [f"`{command}` on {machine()}.", "", "| what | settings | per second | times as fast | share of peak |"]
    lines.append("|---|---|---|---|---|")
    for row in found:
        share = "" if row.share_of_peak is None else f"{100 * row.share_of_peak:.0f} %"
        lines.append(f"| {row.what} | {row.settings} | {row.per_s:.3g} | {row.times:.2f} | {share} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="DiT-XL/2", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="sampling steps that are timed")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--side", type=int, default=8192, help="of the product that measures the peak")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    config = PRESETS[given.preset]
    found = run(
        given.preset, config, given.batch, device=given.device, steps=given.steps, turns=given.turns, side=given.side
    )
    command = f"python benchmarks/dit_speed.py --device {given.device} --preset {given.preset} --batch {given.batch}"
    text = page(found, command)
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "dit_speed.md").write_text(text)
    (given.out / "dit_speed.json").write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
