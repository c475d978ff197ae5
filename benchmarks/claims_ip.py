"""Claims of IP-Adapter (arXiv:2308.06721) and DEADiff (arXiv:2403.06951) in small: fresh adapters on the frozen
embedded UNet, trained from equal seeds for equal steps, and measured on the same held-out icons.

    python benchmarks/claims_ip.py --icons data/icons [--steps 300] [--only decoupled,beside] [--out benchmarks/results]

Error is the squared error of v at 0.9 of the timesteps, where the reference must say what is drawn; beside it the rise
with another icon's reference (1 = the reference is not read). Pictures are of held-out concepts, shown an icon of the
wanted style that no training has seen. 95 % intervals by bootstrap over concepts. Runs and pictures are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import trials
from ip_variants import LEVEL, Bench, BesideTask, Scene, draw, fine_layers, pair_errors, start_readers
from timing import machine
from torch import Tensor
from trials import Found, Question, cell, table

from condit.cli.memory import keep_memory
from condit.data.grouped import PAIR_KINDS, PairKind
from condit.rulers.statistics import Interval, bootstrap
from condit.training.deadiff import DEADiffData, DEADiffTask
from condit.training.ip_adapter import IPAdapterData, IPAdapterTask
from condit.training.loop import LoopConfig
from condit.weights.catalog import MODELS, describe_hash
from condit_lab.icons.world import IconWorld
from condit_lab.suites import sets
from condit_lab.suites.claims import Measured, write
from condit_lab.suites.style_rulers import ALIGNMENT, LEAKAGE, LIKENESS, OWN, SCORE

Shares = tuple[float, float, float]
PAIRS, OWN_PICTURE, ALL = (1, 0, 0), (0, 0, 1), (1, 1, 1)  # of style pairs, content pairs, reconstruction
QFORMER = {"layers": 1, "queries": 8, "hidden": 192}  # of lab/recipes/small-unet-adapters.toml


@dataclass(frozen=True)
class Trial:
    """One adapter. how: attention of its own; beside the text's tokens, with K', V' that learn or the text's frozen
    ones; or DEADiff, with content in the coarse layers or, swapped, in the fine ones."""

    how: Literal["decoupled", "beside, own maps", "beside", "deadiff", "deadiff, swapped"]
    shares: Shares

    @property
    def trained(self) -> tuple[PairKind, ...]:
        return tuple(kind for kind, share in zip(PAIR_KINDS, self.shares, strict=True) if share)

    @property
    def measured(self) -> tuple[PairKind, ...]:
        """Kinds of held-out pairs. DEADiff's reconstruction shows both sets, which says nothing of either."""
        return ("style", "content") if self.how.startswith("deadiff") else ("style", "reconstruction")


TRIALS = {
    "decoupled": Trial("decoupled", PAIRS),
    "beside": Trial("beside", PAIRS),
    "beside-maps": Trial("beside, own maps", PAIRS),
    "decoupled-own": Trial("decoupled", OWN_PICTURE),
    "beside-own": Trial("beside", OWN_PICTURE),
    "deadiff": Trial("deadiff", ALL),
    "deadiff-swapped": Trial("deadiff, swapped", ALL),
}


@dataclass(frozen=True)
class Compared:
    """A question with what answers it: errors on kinds of pairs (None: on those that a trial was trained on), measures
    of drawn pictures, and trials that are subtracted, icon by icon."""

    question: Question
    kinds: tuple[PairKind, ...] | None
    drawn: tuple[str, ...]
    less: tuple[tuple[str, str], ...]
    note: str = ""

    def kinds_of(self, name: str) -> tuple[PairKind, ...]:
        return TRIALS[name].trained if self.kinds is None else self.kinds


COMPARED = (
    Compared(
        Question(
            "ip-decoupled",
            "Attention of its own against tokens beside the text's",
            ("decoupled", "beside", "beside-maps", "decoupled-own", "beside-own"),
            "IP-Adapter (arXiv:2308.06721, ablation study; pictures, no figures): a simple adapter, whose image tokens "
            "stand beside the text's in the frozen attention, draws worse and follows the reference less than one with "
            "attention of its own.",
        ),
        None,
        (SCORE, ALIGNMENT),
        (("beside", "decoupled"), ("beside-maps", "decoupled"), ("beside-own", "decoupled-own")),
        "beside: the projector alone learns; beside-maps: K', V' of their own, in the text's softmax; -own: in "
        "training and in the reconstruction pairs the reference is the picture itself, else another icon of the style.",
    ),
    Compared(
        Question(
            "ip-pairs",
            "Training on pairs against reconstruction",
            ("decoupled", "decoupled-own"),
            "DEADiff (arXiv:2403.06951, section 3.3): an adapter that learns to rebuild its own reference brings the "
            "subject along; one that learns from pairs that share the style alone does not.",
        ),
        ("style",),
        (SCORE, LEAKAGE, OWN, LIKENESS, ALIGNMENT),
        (("decoupled-own", "decoupled"),),
        "decoupled: trained on style pairs; decoupled-own: on each picture as its own reference, as IP-Adapter is. "
        "Leakage: cosine with the label of the reference's concept, in the concept half of our CLIP.",
    ),
    Compared(
        Question(
            "deadiff-layers",
            "Style in the fine and content in the coarse layers, against swapped",
            ("deadiff", "deadiff-swapped"),
            "DEADiff (arXiv:2403.06951, section 3): the coarse layers of a UNet are about what is drawn, the fine "
            "ones about how, so content goes to the former and style to the latter.",
        ),
        ("style", "content"),
        (),
        (("deadiff-swapped", "deadiff"),),
    ),
)
_COMMAND = "python benchmarks/claims_ip.py --icons data/icons --claims docs/claims.md"


@dataclass
class Result:
    """Of a trial, icon by icon: errors with the right reference, another's, and none; measures of its pictures."""

    errors: dict[PairKind, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    drawn: dict[str, Tensor] = field(default_factory=dict)


def build(trial: Trial, given: argparse.Namespace) -> IPAdapterTask | DEADiffTask:
    shares = tuple(trial.shares)
    pairs = IPAdapterData(model=given.model, icons=given.icons, shares=shares)
    layers = fine_layers(given.model) if trial.how == "deadiff, swapped" else None
    torch.manual_seed(given.seed)  # behind what may have drawn
    if trial.how.startswith("deadiff"):
        data = DEADiffData(model=given.model, icons=given.icons, shares=shares, qformer=QFORMER, content_layers=layers)
        task: IPAdapterTask | DEADiffTask = DEADiffTask(data)
    elif trial.how == "decoupled":
        task = IPAdapterTask(pairs)
    else:
        task = BesideTask(pairs, maps=trial.how == "beside, own maps")
    if given.readers is not None:
        start_readers(task, given.readers)
    return task


def hashes(task: IPAdapterTask | DEADiffTask) -> list[str]:
    """Of the UNet, and of the model whose text, CLIP and autoencoder it has."""
    return [task.parts.hash, describe_hash(MODELS["tiny"].path)]


def found_of(result: Result, clusters: Sequence[str]) -> dict[PairKind, Found]:
    return {kind: Found.of(*parts, clusters) for kind, parts in result.errors.items()}


def figures(compared: Compared, results: Mapping[str, Result], scene: Scene) -> list[Measured]:
    """The rows of a claim: every trial, then the differences."""
    rows = []
    for name in compared.question.trials:
        found = found_of(results[name], scene.clusters)
        for kind in compared.kinds_of(name):
            f, rise = found[kind], f"its rise with another's reference, times, {kind} pairs, {name}"
            rows.append(Measured.of(f"error on {kind} pairs, {name}", f.error, 4))
            rows += [Measured.of(rise, f.wrong, 3)] if f.wrong else []
        rows += [
            Measured.of(f"{m}, {name}", drawn_mean(results[name].drawn[m], scene))
            for m in measures_of(compared, results)
        ]
    for one, other in compared.less:
        for kind in compared.kinds_of(one):
            less = results[one].errors[kind][0] - results[other].errors[kind][0]
            what = f"error on {kind} pairs, {one} minus {other}, the same icons"
            rows.append(Measured.of(what, bootstrap(less, scene.clusters), 4))
        for measure in measures_of(compared, results):
            less = results[one].drawn[measure] - results[other].drawn[measure]
            rows.append(Measured.of(f"{measure}, {one} minus {other}, the same noise", drawn_mean(less, scene)))
    return rows


def measures_of(compared: Compared, results: Mapping[str, Result]) -> list[str]:
    """Of drawn pictures; none where none were drawn."""
    return [m for m in compared.drawn if all(m in results[name].drawn for name in compared.question.trials)]


def drawn_mean(values: Tensor, scene: Scene) -> Interval:
    return bootstrap(values, scene.clusters[: len(values)])


def page(results: Mapping[str, Result], scene: Scene, command: str, given: argparse.Namespace) -> str:
    """Markdown: a table for each kind of pair, one of pictures, and the command."""
    parts = [f"`{command}`, {given.steps} steps of {given.batch}, seed {given.seed}, on {machine()}."]
    found = {name: found_of(result, scene.clusters) for name, result in results.items()}
    for kind in PAIR_KINDS:
        rows = {name: f[kind] for name, f in found.items() if kind in f}
        parts += [f"**Held-out pairs: {kind}**", table(rows, "reference")] if rows else []
    drawn = {name: result.drawn for name, result in results.items() if result.drawn}
    if drawn:
        names = next(iter(drawn.values())).keys()
        lines = [f"| variant | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for name, values in drawn.items():
            lines.append(f"| {name} | {' | '.join(cell(drawn_mean(values[m], scene)) for m in names)} |")
        parts += ["**Pictures**", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def claims(results: Mapping[str, Result], scene: Scene, command: str, note: str) -> dict[str, str]:
    """Place in docs/claims.md -> text, for each question whose trials have all been run."""
    return {
        c.question.name: c.question.text(
            figures(c, results, scene), _COMMAND, note=f"{note} {c.note}".rstrip(), command=command
        )
        for c in COMPARED
        if all(name in results for name in c.question.trials)
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = trials.parser(__doc__, model="tiny-unet", steps=300, out="benchmarks/results/claims-ip")
    asked.add_argument("--readers", type=Path, help="finished adapters whose projector and Q-Formers all start from")
    asked.add_argument("--draw", type=int, default=64, help="pictures of an IP-Adapter's trial; 0 = none")
    return trials.parse(asked, tuple(TRIALS), arguments)


class Study:
    """The held-out icons, and what measures pictures, made when the first are drawn."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.world = given, IconWorld.open(given.icons)
        self.scene = Scene.open(self.world, given.count, given.seed)
        self.few = self.scene.first(given.draw)
        self.bench: Bench | None = None

    def run(self, name: str, trial: Trial) -> Result:
        given = self.given
        task, folder = build(trial, given), given.out / "runs" / name
        how = {"lr": 1e-3, "muon_lr": 0.01, "ema": 0.98, "warmup": 20}
        config = LoopConfig(steps=given.steps, batch=given.batch, seed=given.seed, **how)
        readers = None if given.readers is None else describe_hash(given.readers)
        task = trials.train(task, config, folder, [asdict(trial), *hashes(task), readers])
        result = Result({kind: pair_errors(task, self.scene, kind) for kind in trial.measured})
        if given.draw and isinstance(task, IPAdapterTask):
            mark = (folder / "mark.txt").read_text()
            images = draw(
                task, self.few, given.out / "images" / f"{name}.safetensors", mark, shown=True, seed=given.seed
            )
            result.drawn = self.measuring(task).values(images)
        return result

    def measuring(self, task: IPAdapterTask) -> Bench:
        if self.bench is None:
            file = self.given.out / "images" / "none.safetensors"
            blank = draw(task, self.few, file, sets.mark_of(hashes(task)), shown=False, seed=self.given.seed)
            self.bench = Bench.of(self.world, task, self.few, blank)
        return self.bench


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    keep_memory()
    if given.threads:
        torch.set_num_threads(given.threads)
    command, study = trials.command_of("claims_ip", arguments), Study(given)
    results: dict[str, Result] = {}
    note = f"{given.steps} steps of {given.batch} for each, from equal seeds, on the frozen embedded UNet."
    note += "" if given.readers is None else " What reads the reference starts as the shipped adapters', equally."
    for name in given.names:
        results[name] = study.run(name, TRIALS[name])
        # After each trial, so that a run that is stopped has said what it knows.
        said = {"command": command, "level": LEVEL, "steps": given.steps, "batch": given.batch}
        told = {n: {k: asdict(f) for k, f in found_of(r, study.scene.clusters).items()} for n, r in results.items()}
        drawn = {n: {m: asdict(drawn_mean(v, study.scene)) for m, v in r.drawn.items()} for n, r in results.items()}
        trials.keep(given.out, {**said, "trials": told, "drawn": drawn}, page(results, study.scene, command, given))
        if given.claims is not None:
            write(given.claims, claims(results, study.scene, command, note))
    print((given.out / "claims.md").read_text())


if __name__ == "__main__":
    main()
