"""OminiControl and OminiControl2: what a condition costs, beside the arithmetic (arXiv:2411.15098, arXiv:2503.08280).

    python benchmarks/omini.py [--flux] [--device cuda] [--pixels 512] [--out benchmarks/results]

Times are ratios to the plain forward of diffusers' FLUX transformer in the same run, with the same random weights. Per
layer and token FLUX does 24 D^2 operations in its linears, and attention 4 D Lq Lk; so n tokens of text and image cost
n (6D + n) in units of 4 D, and the ratios below follow. By default a model for one CPU core: D = 512, 1 + 2 blocks,
256 + 1024 tokens, float32; attention weighs six times more there than in FLUX.1. `--flux`: FLUX.1-dev's size in
bfloat16, 512 + 1024 tokens at 512 px.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from timing import Timing, machine, measure, save
from torch import Tensor, nn

from condit.backbones.mmdit import PRESETS, MMDiT, MMDiTConfig
from condit.cli.memory import keep_memory
from condit.controls.control import Control, Run, Step, When
from condit.controls.omini import OminiConfig, OminiControl, OminiReference, condition_stream
from condit.nn.cost import STEPS, ConditionMode, average, cache_bytes, operations, ratio
from condit.nn.streams import Stream, grid_ids

SMALL = MMDiTConfig(
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=64,
    num_attention_heads=8,
    joint_attention_dim=512,
    pooled_projection_dim=256,
    axes_dims_rope=(16, 24, 24),
)


@dataclass(frozen=True)
class Case:
    """`count` conditions of the image's token count over `scale` squared; strength gamma."""

    mode: ConditionMode
    count: int = 1
    scale: int = 1
    gamma: float = 1.0


CASES = {
    "no condition": Case("none", 0),
    "joint": Case("joint"),
    "joint, gamma 0.5": Case("joint", gamma=0.5),
    "independent, not cached": Case("independent"),
    "cached, read step": Case("cached"),
    "cached, gamma 0.5": Case("cached", gamma=0.5),
    "compact, joint": Case("joint", scale=2),
    "compact, cached": Case("cached", scale=2),
    "2 joint": Case("joint", 2),
    "2 cached": Case("cached", 2),
    "4 cached": Case("cached", 4),
    "4 compact, cached": Case("cached", 4, scale=2),
    "filling the cache of one, once a picture": Case("prefill"),
}
BASE = "diffusers, no condition"


# What is timed


@dataclass(frozen=True)
class Setting:
    """One model, condit's and diffusers' over the same weights, and the inputs of one step of batch 1."""

    ours: MMDiT
    theirs: nn.Module
    image: Stream
    text: Tensor
    side: int

    @property
    def tokens(self) -> int:
        """Of text and image."""
        return self.text.shape[1] + self.side**2

    @property
    def layers(self) -> int:
        return self.ours.config.num_layers + self.ours.config.num_single_layers


def setting(config: MMDiTConfig, *, text: int, side: int, device: str, dtype: torch.dtype) -> Setting:
    """Random weights: time does not depend on them. `side`: rows and columns of the image's tokens."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    generator = torch.Generator(device).manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 12 billion weights in float32 would not fit beside themselves
    try:
        with torch.device(device):
            ours = MMDiT(config)
    finally:
        torch.set_default_dtype(before)
    for p in ours.requires_grad_(False).parameters():
        p.normal_(0, 0.02, generator=generator)
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**asdict(config))
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    image = Stream(
        draw(1, side * side, config.in_channels),
        grid_ids(side, side).to(device),
        torch.full((1,), 0.7, device=device, dtype=dtype),
        draw(1, config.pooled_projection_dim),
        torch.full((1,), 3.5, device=device, dtype=dtype) if config.guidance_embeds else None,
    )
    return Setting(ours.eval(), theirs.eval(), image, draw(1, text, config.joint_attention_dim), side)


def adapter_of(s: Setting, case: Case) -> OminiControl:
    """The official targets at rank 4, with weights that do something."""
    independent = case.mode != "joint"
    adapter = OminiControl.new(s.ours, OminiConfig(scale=case.scale, independent=independent))
    generator = torch.Generator().manual_seed(1)
    for p in adapter.requires_grad_(False).parameters():
        p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return adapter.to(s.text.device, s.text.dtype)


def run_of(s: Setting) -> Run:
    return Run(s.ours, 1, (s.side, s.side), s.image.pooled, s.image.guidance, s.ours.config.in_channels)


def references(s: Setting, case: Case) -> list[OminiReference]:
    """Conditions side by side, to the left of the picture."""
    adapter, small = adapter_of(s, case), s.side // case.scale
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(case.count):
        tokens = torch.randn(1, small * small, s.ours.config.in_channels, generator=generator).to(s.text)
        ids = grid_ids(small, small, delta=(0, -s.side * (number + 1)), scale=case.scale)
        found.append(OminiReference(tokens, tokens, ids, adapter, case.gamma, When()))
    return found


def prepared(s: Setting, case: Case) -> list[OminiReference]:
    """The conditions of one picture: with their streams, or their caches."""
    given, run = references(s, case), run_of(s)
    if case.mode == "independent":
        return [replace(r, stream=condition_stream(r.adapter, r.tokens, r.ids, run)) for r in given]
    return fill(s, given)


def found_bytes(references: list[OminiReference]) -> int:
    """Memory that caches really hold: of each storage, not of the views into it."""
    kept = [tensor for r in references for pair in (r.memory or {}).values() for tensor in pair]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


def fill(s: Setting, given: list[OminiReference]) -> list[OminiReference]:
    return [r.prepare(run_of(s)) for r in given]


def predict(s: Setting, given: list[OminiReference]) -> Callable[[], Tensor]:
    acting = [c for c in (r.at(Step(1, STEPS, 0.7)) for r in given) if c is not None]
    streams = [stream for control in acting for stream in control.streams()]
    controls: list[Control] = [*acting]
    text_ids = torch.zeros(s.text.shape[1], 3, device=s.text.device)
    return lambda: s.ours(s.image, s.text, text_ids, conditions=streams, controls=controls)


def variants(s: Setting, cases: Mapping[str, Case] = CASES) -> dict[str, Callable[[], object]]:
    """Every case as a call without arguments, diffusers' plain forward first."""
    x, text_ids = s.image, torch.zeros(s.text.shape[1], 3, device=s.text.device)

    def plain() -> Tensor:
        given = x.tokens, s.text, x.pooled, x.timestep, x.ids, text_ids, x.guidance
        return s.theirs(*given, return_dict=False)[0]

    found: dict[str, Callable[[], object]] = {BASE: plain}
    for name, case in cases.items():
        if case.mode == "prefill":
            found[name] = partial(fill, s, references(s, case))
        else:
            found[name] = predict(s, prepared(s, case))
    return found


# What is written


def expected(s: Setting, case: Case) -> float:
    c = (s.side // case.scale) ** 2
    return ratio(case.mode, s.ours.config.dim, s.tokens, c, case.count)


def table(s: Setting, found: Mapping[str, Timing], cases: Mapping[str, Case] = CASES) -> str:
    """Milliseconds, the ratio to diffusers' plain forward, and the closed form of that ratio."""
    base = found[BASE].seconds
    lines = ["| variant | ms (quartiles) | ratio | closed form |", "|---|---|---|---|"]
    for name, t in found.items():
        form = f"{expected(s, cases[name]):.3f}" if name in cases else "1"
        ms = f"{1000 * t.seconds:.1f} ({1000 * t.low:.1f} to {1000 * t.high:.1f})"
        lines.append(f"| {name} | {ms} | {t.seconds / base:.3f} | {form} |")
    read, fill = found["cached, read step"].seconds, found["filling the cache of one, once a picture"].seconds
    mean = average(s.ours.config.dim, s.tokens, s.side**2)
    lines.append(f"| cached, mean of {STEPS} steps | - | {(read + fill / STEPS) / base:.3f} | {mean:.3f} |")
    return "\n".join([*lines, ""])


def memory(s: Setting, cases: Mapping[str, Case] = CASES) -> str:
    """Of every cache: what the arithmetic says and what its tensors hold."""
    lines = ["| cache | computed, bytes | found, bytes |", "|---|---|---|"]
    for name, case in cases.items():
        if case.mode != "cached" or case.gamma != 1:
            continue
        tokens, size = case.count * (s.side // case.scale) ** 2, s.text.element_size()
        computed = cache_bytes(s.ours.config.dim, s.layers, tokens, size)
        lines.append(f"| {name}, {tokens} tokens | {computed:,} | {found_bytes(prepared(s, case)):,} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--flux", action="store_true", help="FLUX.1-dev's size, bfloat16: about 35 GB on an accelerator"
    )
    parser.add_argument("--device", help="default: cuda with --flux, else cpu")
    parser.add_argument("--pixels", type=int, default=512, help="side of picture and condition; 16 pixels a token")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    keep_memory()
    torch.set_num_threads(given.threads)
    device = given.device or ("cuda" if given.flux else "cpu")
    config, text, dtype = (PRESETS["flux-dev"], 512, torch.bfloat16) if given.flux else (SMALL, 256, torch.float32)
    title = f"D = {config.dim}, {config.num_layers} + {config.num_single_layers} blocks, {given.pixels} px"
    with torch.inference_mode():
        s = setting(config, text=text, side=given.pixels // 16, device=device, dtype=dtype)
        timings = measure(variants(s), turns=given.turns)
        work = operations(config.dim, s.layers, s.tokens)
        pages = [
            f"`python benchmarks/omini.py{' --flux' if given.flux else ''} --pixels {given.pixels}` on {machine()}.",
            f"\n**{title}**: {s.tokens} tokens, {work / 1e12:.3f} TFLOP a plain prediction\n",
            table(s, timings),
            memory(s),
        ]
    print("\n".join(pages))
    save(given.out / "omini.json", {title: timings})
    (given.out / "omini.md").write_text("\n".join(pages))


if __name__ == "__main__":
    main()
