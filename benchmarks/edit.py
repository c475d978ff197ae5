"""Editing on PixArt: what merging saves and control costs in one step, beside the arithmetic (arXiv:2411.03286).

    python benchmarks/edit.py [--xl] [--device cuda] [--pixels 512] [--out benchmarks/results]

An edit step predicts source and target for both sides of guidance: two calls of two rows, of which the second takes the
first one's match. Ratios are to the plain step in the same run. Per block N tokens of width D and T of text do 8 D^2 N
+ 4 N^2 D operations in self-attention, 4 D^2 (N + T) + 4 N T D in cross-attention, 16 D^2 N in the MLP; merging to M
tokens puts M for N in self-attention, or also in the MLP, and adds a match of 3/8 N^2 D. By default a model for one CPU
core: D = 288, 6 blocks, 60 text tokens, float32. `--xl`: PixArt-XL/2 in bfloat16, 120 text tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import Timing, machine, measure, save
from torch import Tensor

from condit.backbones.pixart import PixArt, PixArtConfig
from condit.cli.memory import keep_memory
from condit.controls.control import Control, PromptPair, Run, Step
from condit.controls.dit4edit import Blend, DiT4Edit
from condit.controls.token_merging import TokenMerging
from condit.encoders.words import Words

SMALL = PixArtConfig(num_attention_heads=4, attention_head_dim=72, num_layers=6, sample_size=64, caption_channels=64)
XL = PixArtConfig(sample_size=64)
PLAIN = "plain"


@dataclass(frozen=True)
class Case:
    """Ratio of merged tokens, whether the MLP runs on them too, and whether attention is controlled."""

    ratio: float = 0.0
    mlp: bool = False
    control: DiT4Edit | None = None


KV = DiT4Edit(self_form="kv", self_steps=(0, 1), self_layers=(0, 1), blend=Blend(layers=(0, 1)))
CASES: dict[str, Case] = {
    PLAIN: Case(),
    "25 %": Case(0.25),
    "50 %": Case(0.5),
    "75 %": Case(0.75),
    "50 % and MLP": Case(0.5, mlp=True),
    "75 % and MLP": Case(0.75, mlp=True),
    "control": Case(control=KV),
    "control, 50 %": Case(0.5, control=KV),
}


def operations(n: int, dim: int, text: int, ratio: float = 0.0, *, mlp: bool = False) -> float:
    """Of one block: multiplications and additions, the match included where tokens are merged."""
    m = n - min(int(n * ratio), n * 3 // 4)
    attention = 8 * dim**2 * m + 4 * m**2 * dim
    cross = 4 * dim**2 * (n + text) + 4 * n * text * dim
    match = 3 / 8 * n**2 * dim if ratio else 0.0
    return attention + cross + 16 * dim**2 * (m if mlp else n) + match


def bound(n: int, dim: int, text: int, ratio: float, *, mlp: bool = False) -> float:
    """The share of a plain block's operations that is left."""
    return operations(n, dim, text, ratio, mlp=mlp) / operations(n, dim, text)


@dataclass(frozen=True)
class Setting:
    """A random network and one step's inputs of two rows, source and target."""

    network: PixArt
    x: Tensor
    text: Tensor
    side: int  # tokens

    @property
    def tokens(self) -> int:
        return self.side**2


def setting(config: PixArtConfig, *, side: int, text: int, device: str, dtype: torch.dtype) -> Setting:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = PixArt(config).to(device, dtype).eval().requires_grad_(False)
    latent = side * config.patch_size
    x = torch.randn(2, config.in_channels, latent, latent, generator=generator).to(device, dtype)
    states = torch.randn(2, text, config.caption_channels, generator=generator).to(device, dtype)
    return Setting(network, x, states, side)


def words(length: int) -> PromptPair:
    """A prompt of two words in which the second changes."""
    both = (Words("a cat", ("a", "cat"), ((0,), (1,)), (5, 6, 1), length),)
    other = (Words("a dog", ("a", "dog"), ((0,), (1,)), (5, 7, 1), length),)
    return PromptPair(both, other)


def edit_step(s: Setting, case: Case) -> Callable[[], list[Tensor]]:
    """Both sides of guidance for source and target."""
    given: list[Control] = [] if case.control is None else [case.control]
    if case.ratio:
        given.append(TokenMerging(case.ratio, mlp=case.mlp, minimum=0))
    t = torch.full((2,), 500, device=s.x.device)

    def side(controls: list[Control], memory: dict) -> Tensor:
        run = Run(
            s.network,  # type: ignore[arg-type]
            2,
            (s.side, s.side),
            s.text[:, 0],
            None,
            s.x.shape[1],
            memory=memory,
            edit=words(s.text.shape[1]),
        )
        acting = [c.prepare(run).at(Step(1, 20, 0.5)) for c in controls]
        return s.network(s.x, t, s.text, controls=[c for c in acting if c is not None])

    def step() -> list[Tensor]:
        memory: dict = {}
        absent = [c for c in (control.negative() for control in given) if c is not None]
        return [side(given, memory), side(absent, memory)]

    return step


def table(s: Setting, found: Mapping[str, Timing], cases: Mapping[str, Case] = CASES) -> str:
    """Milliseconds, the ratio to the plain step, and the arithmetic's ratio (which knows nothing of control)."""
    c = s.network.config
    lines = ["| edit step | ms (quartiles) | ratio | of the operations |", "|---|---|---|---|"]
    for name, t in found.items():
        case = cases[name]
        ms = f"{1000 * t.seconds:.1f} ({1000 * t.low:.1f} to {1000 * t.high:.1f})"
        share = bound(s.tokens, c.dim, s.text.shape[1], case.ratio, mlp=case.mlp)
        lines.append(f"| {name} | {ms} | {t.seconds / found[PLAIN].seconds:.3f} | {share:.3f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xl", action="store_true", help="PixArt-XL/2's size in bfloat16, for an accelerator")
    parser.add_argument("--device", help="default: cuda with --xl, else cpu")
    parser.add_argument("--pixels", type=int, default=512, help="side of the picture; 16 pixels a token")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    keep_memory()
    torch.set_num_threads(given.threads)
    device = given.device or ("cuda" if given.xl else "cpu")
    config, text, dtype = (XL, 120, torch.bfloat16) if given.xl else (SMALL, 60, torch.float32)
    with torch.inference_mode():
        s = setting(config, side=given.pixels // 16, text=text, device=device, dtype=dtype)
        timings = measure({name: edit_step(s, case) for name, case in CASES.items()}, turns=given.turns)
        title = f"D = {config.dim}, {config.num_layers} blocks, {s.tokens} tokens"
        command = f"`python benchmarks/edit.py{' --xl' if given.xl else ''} --pixels {given.pixels}` on {machine()}."
        page = "\n".join([command, f"\n**{title}**\n", table(s, timings)])
    print(page)
    save(given.out / "edit.json", {title: timings})
    (given.out / "edit.md").write_text(page)


if __name__ == "__main__":
    main()
