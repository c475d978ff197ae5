"""OminiControl's claims in small (arXiv:2411.15098): short variants of one adapter on the embedded model, trained from
equal seeds for equal steps, and measured on the same held-out icons.

    python benchmarks/claims_omini.py --icons data/icons [--steps 260] [--only gray,gray-add] [--out benchmarks/results]

Error is the squared error of the velocity at noise level 0.9, where the condition must say what is drawn; beside it the
rise in % with another icon's condition (0 = the condition is not read). 95 % intervals by bootstrap over icons.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import trials
from timing import machine
from torch import Tensor
from trials import Found, Question, table

from condit.cli.memory import keep_memory
from condit.diffusion.objectives import add_noise, flow_loss
from condit.encoders.vae import encode_tokens
from condit.training.loop import LoopConfig, to_device
from condit.weights.catalog import TINY, describe_hash
from condit_lab.suites.claims import Claim, Measured, block, write
from condit_lab.training.adapters import TokenTask
from condit_lab.training.referenced import Referenced

LEVEL = 0.9
STRENGTHS = 0.0, 0.25, 0.5, 1.0, 1.5, 2.0


@dataclass(frozen=True)
class Trial:
    """One adapter: the task, its rank, and how the condition enters (fields of token_variants.Variant)."""

    kind: Literal["gray", "subject"]
    rank: int = 8
    variant: Mapping = field(default_factory=dict)


TRIALS = {
    # Positions, for an aligned task and one that is not.
    "gray": Trial("gray"),
    "gray-offset": Trial("gray", variant={"delta": (0, -8)}),
    "subject": Trial("subject"),
    "subject-shared": Trial("subject", variant={"delta": (0, 0)}),
    # Tokens in the sequence, or condition latents added to the noisy ones.
    "gray-add": Trial("gray", variant={"what": "add"}),
    "subject-add": Trial("subject", variant={"what": "add"}),
    # Rank ("gray" has 8).
    "gray-rank-1": Trial("gray", 1),
    "gray-rank-4": Trial("gray", 4),
    "gray-rank-16": Trial("gray", 16),
    # Where, how many tokens, and whether the condition sees the picture.
    "gray-double": Trial("gray", variant={"what": "double"}),
    "gray-compact": Trial("gray", variant={"scale": 2}),
    "gray-joint": Trial("gray", variant={"independent": False}),
}
_COMMAND = "python benchmarks/claims_omini.py --icons data/icons --claims docs/claims.md"


QUESTIONS = (
    Question(
        "omini-positions",
        "Positions: shared for aligned tasks, offset for subjects",
        ("gray", "gray-offset", "subject", "subject-shared"),
        "OminiControl (arXiv:2411.15098): tokens that share the picture's positions suit spatially aligned tasks; for "
        "subjects an offset learns faster.",
    ),
    Question(
        "omini-sequence",
        "Tokens in the sequence against latents added",
        ("gray", "gray-add", "subject", "subject-add"),
        "OminiControl (arXiv:2411.15098): joining the condition's tokens to the sequence has a lower training loss "
        "than adding its latents to the noisy ones, for aligned tasks and, more clearly, for subjects.",
    ),
    Question(
        "omini-rank",
        "Rank",
        ("gray-rank-1", "gray-rank-4", "gray", "gray-rank-16"),
        "OminiControl (arXiv:2411.15098, ablations): canny's F1 is 0.385, 0.380, 0.407 at rank 1, 4, 16: little hangs "
        "on the rank.",
    ),
    Question(
        "omini-blocks",
        "All blocks against double blocks only",
        ("gray", "gray-double"),
        "OminiControl (arXiv:2411.15098, ablations): a condition in the double blocks alone follows canny with F1 "
        "0.23, in all blocks with 0.38.",
    ),
    Question(
        "omini-compact",
        "Compact tokens (a quarter)",
        ("gray", "gray-compact"),
        "OminiControl2 (arXiv:2503.08280): a condition of a quarter of the tokens does nearly as well at a fraction of "
        "the cost.",
    ),
    Question(
        "omini-cached",
        "Cached (independent) against joint",
        ("gray", "gray-joint"),
        "OminiControl2 (arXiv:2503.08280): a condition that does not see the picture, so that it is computed once, "
        "does as well.",
    ),
)
CLAIMS = {question.title: question.trials for question in QUESTIONS}
STRENGTH = Claim(
    "OminiControl (arXiv:2411.15098): a bias of log gamma on the attention between picture and condition scales the "
    "condition; 0 leaves it out, 1 is the trained one.",
    _COMMAND,
)


def train(name: str, trial: Trial, given: argparse.Namespace) -> TokenTask:
    """The trial's adapter after the same steps as all others."""
    torch.manual_seed(given.seed)
    task = TokenTask(given.icons, given.model, kind=trial.kind, rank=trial.rank, variant=dict(trial.variant))
    how = {"lr": 3e-3, "muon_lr": 0.01, "ema": 0.98, "warmup": 20}
    config = LoopConfig(steps=given.steps, batch=given.batch, seed=given.seed, **how)
    return trials.train(task, config, given.out / "runs" / name, [asdict(trial), describe_hash(Path(given.model))])


@torch.no_grad()
def errors(task: TokenTask, count: int, *, chunk: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors (n,) on held-out icons at LEVEL: with the right condition, another icon's, and none."""
    whole = task.examples(task.held_out, count)
    n = len(whole.captions)
    noise = torch.randn(n, 64, 4 * task.vae.config.latent_channels, generator=torch.Generator().manual_seed(0))
    found: list[list[Tensor]] = [[], [], []]
    for begin in range(0, n, chunk):
        rows = torch.arange(begin, min(begin + chunk, n))
        other = (rows + 7) % n
        images, captions = whole.images[rows], [whole.captions[i] for i in rows]
        batch = to_device(Referenced(images, captions, whole.references[rows], whole.counts[rows]), task.device)
        swapped = to_device(Referenced(images, captions, whole.references[other], whole.counts[other]), task.device)
        x0, text, e = encode_tokens(task.vae, batch.images), task.text(captions), noise[rows].to(task.device)
        t = torch.full((len(rows),), LEVEL, device=task.device)
        keep = torch.zeros(len(rows), dtype=torch.bool, device=task.device)
        for into, (given, dropped) in zip(found, ((batch, keep), (swapped, keep), (batch, ~keep)), strict=True):
            out = task.predict(add_noise(x0, e, t), t, text, *task.conditions(given, text, dropped))
            into.append(flow_loss(out, x0, e, t, "x").cpu())
    right, wrong, none = (torch.cat(parts) for parts in found)
    return right, wrong, none


def measured(task: TokenTask, count: int) -> Found:
    return Found.of(*errors(task, count))


def sweep(task: TokenTask, count: int) -> dict[str, Found]:
    """A trained adapter at other strengths than it was trained at."""
    found, variant = {}, task.variant
    for strength in STRENGTHS:
        task.variant = replace(variant, strength=strength)
        found[f"{strength:g}"] = measured(task, count)
    task.variant = variant
    return found


def page(found: Mapping[str, Found], strengths: Mapping[str, Found], command: str, given: argparse.Namespace) -> str:
    """Markdown: a table a claim, and the command."""
    parts = [f"`{command}`, {given.steps} steps of {given.batch}, seed {given.seed}, on {machine()}."]
    for claim, names in CLAIMS.items():
        rows = {name: found[name] for name in names if name in found}
        parts += [f"**{claim}**", table(rows)] if rows else []
    if strengths:
        parts += ["**Strength of `gray`, trained at 1**", table(strengths)]
    return "\n\n".join(parts) + "\n"


def claims(found: Mapping[str, Found], strengths: Mapping[str, Found], command: str, note: str) -> dict[str, str]:
    """Place in docs/claims.md -> text, for each question whose trials have all been run."""

    def rows(name: str, f: Found) -> list[Measured]:
        rise = [Measured.of(f"its rise with another's condition, times, {name}", f.wrong, 3)] if f.wrong else []
        return [Measured.of(f"error at noise level {LEVEL}, {name}", f.error, 4), *rise]

    texts = {}
    for q in QUESTIONS:
        if all(name in found for name in q.trials):
            figures = [row for name in q.trials for row in rows(name, found[name])]
            texts[q.name] = q.text(figures, _COMMAND, note=note, command=command)
    if strengths:
        figures = [row for name, f in strengths.items() for row in rows(f"gray at {name}", f)]
        texts["omini-strength"] = block(STRENGTH, figures, note=note, command=command)
    return texts


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = trials.parser(__doc__, model=str(TINY / "model"), steps=260, out="benchmarks/results/claims-omini")
    return trials.parse(asked, tuple(TRIALS), arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    keep_memory()
    if given.threads:
        torch.set_num_threads(given.threads)
    random.seed(given.seed)
    command = trials.command_of("claims_omini", arguments)
    found: dict[str, Found] = {}
    strengths: dict[str, Found] = {}
    for name in given.names:
        task = train(name, TRIALS[name], given)
        found[name] = measured(task, given.count)
        if name == "gray":
            strengths = sweep(task, given.count)
        # After each trial, so that a run that is stopped has said what it knows.
        rows = {"trials": found, "strengths": strengths}
        figures = {kind: {n: asdict(f) for n, f in values.items()} for kind, values in rows.items()}
        said = {"command": command, "level": LEVEL, "steps": given.steps, "batch": given.batch}
        trials.keep(given.out, {**said, **figures}, page(found, strengths, command, given))
    print((given.out / "claims.md").read_text())
    if given.claims is not None:
        note = f"{given.steps} steps of {given.batch} for each, from equal seeds, on the frozen embedded model."
        write(given.claims, claims(found, strengths, command, note))


if __name__ == "__main__":
    main()
