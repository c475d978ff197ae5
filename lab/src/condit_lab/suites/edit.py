"""The suite of `condit evaluate edit`: icons give the truth of an edit, since vendors draw the same concepts.

Two tasks: another concept by the same vendor ("a cat, noto style" -> "a dog, noto style"), and the same concept by
another vendor. What is measured and with which result: docs/papers/dit4edit.md. PIE-Bench's axes (Ju et al. 2023,
arXiv:2310.01506): structure distance, background, CLIP.
"""

from __future__ import annotations

import html
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from condit.controls.control import Control
from condit.controls.dit4edit import DiT4Edit
from condit.controls.token_merging import TokenMerging
from condit.data.files import atomic_write
from condit.data.images import save_image, to_images
from condit.data.sheets import SheetCell, contact_sheet
from condit.encoders.clip import CONCEPT, embed_image, embed_text, token_ids
from condit.encoders.clip_model import Clip
from condit.encoders.image import TinyImage
from condit.rulers.judge import Judge, frame, load_judge, to_input
from condit.rulers.pixels import edge_similarity
from condit_lab.icons.world import GROUPS, TRAIN_LICENCES, Icon, IconWorld, hash_fraction, plain_caption, sample_path
from condit_lab.suites.edit_rows import EditRow, differences, interval
from condit_lab.suites.edit_trips import merging_time, photographs, round_trips, show_trips
from condit_lab.suites.measures import concept_ranks
from condit_lab.suites.sets import pictures

if TYPE_CHECKING:
    from condit.drawing.pipeline import Pipeline

log = logging.getLogger(__name__)

TASKS = ("concept", "vendor", "icons", "photographs", "speed")
BATCH = 8
LEAST_BACKGROUND = 0.05  # of the picture; with less, its figures are noise
CROSS = DiT4Edit(self_form=None)
# kind -> what the target is drawn with, and whether it takes the source's correction.
METHODS: dict[str, tuple[tuple[Control, ...], bool]] = {
    "words alone": ((), False),
    "words, anchored": ((), True),
    "cross-attention": ((CROSS,), True),
    "unified": ((DiT4Edit(),), True),
    "unified, merging 50 %": ((DiT4Edit(), TokenMerging(0.5, minimum=0)), True),
}
# Of the same pictures, the first minus the second.
PAIRS = (("unified", "cross-attention"), ("unified, merging 50 %", "unified"))
DIRECTION, NEAR, STRUCTURE = "CLIP direction", "concept among the five nearest", "structure distance"
KEPT, KEPT_SSIM = "background PSNR, dB", "background SSIM"


@dataclass(frozen=True)
class EditJob:
    """One edit: numbers of the world's icons, source and truth, and their prompts."""

    source: int
    truth: int
    source_prompt: str
    target_prompt: str
    label: str


def choose_jobs(world: IconWorld, task: str, count: int, seed: int = 0) -> list[EditJob]:
    """Up to `count` edits with a held-out source where the world has enough of them; told by names and seed alone."""
    icons = world.icons
    usable = [i for i, x in enumerate(icons) if x.group in GROUPS and x.licence in TRAIN_LICENCES]
    held_out = [i for i in usable if icons[i].split != "train"]
    start = held_out if len(held_out) >= count else usable
    start = sorted(start, key=lambda i: hash_fraction(f"edit/{task}/{seed}/{icons[i].style}/{icons[i].hex}"))
    jobs = []
    for i in start:
        icon, rng = icons[i], random.Random(f"{task}/{seed}/{icons[i].style}/{icons[i].hex}")
        if task == "concept":
            others = [j for j in usable if icons[j].style == icon.style and icons[j].label != icon.label]
        else:
            others = [j for j in usable if icons[j].base == icon.base and icons[j].style != icon.style]
        if others:
            j = rng.choice(others)
            jobs.append(EditJob(i, j, plain_caption(icon), plain_caption(icons[j]), icons[j].label))
        if len(jobs) == count:
            break
    return jobs


def evaluate_edit(
    out: str | Path,
    *,
    data: str | Path | None = None,
    count: int = 32,
    seed: int = 0,
    model: str = "tiny",
    steps: int = 20,
    trip_steps: Sequence[int] = (10, 20, 50),
    tasks: Sequence[str] = TASKS,
    methods: Mapping[str, tuple[tuple[Control, ...], bool]] = METHODS,
    pipe: Pipeline | None = None,
    judge: Judge | None = None,
    tell: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Measure edits of `count` pictures a task, round trips of as many icons and windows of photographs, and the time
    of merged steps; returns what stands in `out/edit.json`, beside a page `out/edit.html`. data: an icon world, None:
    the packed sample."""
    if count < 1:
        raise ValueError(f"count is the number of edits of each task and must be at least 1; found {count}.")
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise ValueError(f"There is no task {unknown[0]!r} of edits. Choose from: {', '.join(TASKS)}.")
    from condit.drawing.loading import load

    began, folder = time.perf_counter(), Path(out)
    world = IconWorld.open(data or sample_path())
    pipe = load(model) if pipe is None else pipe
    judge = judge or load_judge()
    assert pipe is not None  # load tells its own errors
    rows, sheets, seconds = [], {}, {}
    for task in tasks:
        if task == "photographs":
            given, prompts = photographs(count)
        elif task != "speed":
            jobs = choose_jobs(world, "vendor" if task == "vendor" else "concept", count, seed)
            if not jobs:
                raise ValueError(f"{data or 'the sample'} holds no two icons for the task {task!r}.")
            given, prompts = to_pil(pictures(world, [j.source for j in jobs])), [j.source_prompt for j in jobs]
        if task == "speed":
            rows += merging_time(pipe, min(count, 24), tell)
        elif task in ("icons", "photographs"):
            rows += round_trips(pipe, task, given, prompts, trip_steps, tell)
            sheets[task] = show_trips(pipe, given, prompts, trip_steps[0])
        else:
            task_rows, drawn, seconds[task] = run_task(world, pipe, judge, task, jobs, steps, methods, tell)
            rows += task_rows
            sheets[task] = show(world, jobs, drawn)
    result = {
        "model": model,
        "hash": pipe.parts.hash,
        "command": command(model, data is not None, count, seed, steps, trip_steps, tasks),
        "count": count,
        "steps": steps,
        "seconds_an_edit": seconds,
        "seconds": round(time.perf_counter() - began, 1),
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(result, indent=1, allow_nan=False)
    atomic_write(folder / "edit.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    for task, sheet in sheets.items():
        save_image(sheet, folder / "sheets" / f"{task}.png")
    page = write_page(result, list(sheets))
    atomic_write(folder / "edit.html", lambda path: path.write_text(page, encoding="utf-8"))
    tell(f"{folder / 'edit.html'}: {result['seconds']:.0f} s")
    return result


def command(
    model: str, data: bool, count: int, seed: int, steps: int, trip_steps: Sequence[int], tasks: Sequence[str]
) -> str:
    """What measures this again."""
    given = f" --model {model}" * (model != "tiny") + " --data ICONS" * data
    trips = ",".join(map(str, trip_steps))
    some = f" --tasks {','.join(tasks)}" * (tuple(tasks) != TASKS)
    return f"condit evaluate edit{given} --count {count} --seed {seed} --steps {steps} --trips {trips}{some}"


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 (N, 3, H, W)."""
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]


def run_task(
    world: IconWorld,
    pipe: Pipeline,
    judge: Judge,
    task: str,
    jobs: Sequence[EditJob],
    steps: int,
    methods: Mapping[str, tuple[tuple[Control, ...], bool]],
    tell: Callable[[str], None],
) -> tuple[list[EditRow], dict[str, Tensor], dict[str, float]]:
    """Rows, pictures (N, 3, H, W) uint8 of every method and the seconds that an edit took, inversion apart."""
    sources, truths = (pictures(world, [getattr(j, name) for j in jobs]) for name in ("source", "truth"))
    drawn: dict[str, list[Tensor]] = {name: [] for name in ("latent", *methods)}
    seconds = dict.fromkeys(("inversion", *methods), 0.0)
    for at in range(0, len(jobs), BATCH):
        part = jobs[at : at + BATCH]
        given = to_pil(sources[at : at + BATCH])
        clock = time.perf_counter()
        inversion = pipe.invert(given, [j.source_prompt for j in part], num_inference_steps=steps)
        seconds["inversion"] += time.perf_counter() - clock
        for name, (controls, anchored) in methods.items():
            clock = time.perf_counter()
            targets = [j.target_prompt for j in part]
            edit = pipe.edit(inversion, None, targets, controls=controls, anchored=anchored, output_type="pt")
            seconds[name] += time.perf_counter() - clock
            drawn[name].append(to_bytes(edit.images))
        drawn["latent"].append(to_bytes(edit.sources))  # type: ignore[possibly-undefined]
        tell(f"{task}: {at + len(part)} of {len(jobs)}")
    together = {name: torch.cat(parts) for name, parts in drawn.items()}
    cases = {"source, unchanged": together["latent"], **{n: together[n] for n in methods}, "true icon": truths}
    measured = measure(world, pipe, judge, task, jobs, together["latent"], truths, cases)
    return measured, together, {name: round(value / len(jobs), 3) for name, value in seconds.items()}


def measure(
    world: IconWorld,
    pipe: Pipeline,
    judge: Judge,
    task: str,
    jobs: Sequence[EditJob],
    sources: Tensor,
    truths: Tensor,
    cases: Mapping[str, Tensor],
) -> list[EditRow]:
    """Every measure of every case: the source as its latent decodes and the true icon stand beside the methods."""
    clusters = [j.label for j in jobs]
    labels = sorted({icon.label for icon in world.icons if icon.group in GROUPS} | set(clusters))
    wanted = torch.tensor([labels.index(name) for name in clusters])
    texts = embed_texts(pipe, labels)[:, CONCEPT]
    before, after = (embed_texts(pipe, [getattr(j, n) for j in jobs]) for n in ("source_prompt", "target_prompt"))
    old, hidden = embed_pictures(pipe, sources)
    background = 1 - ink(sources, truths).float()
    enough = background.flatten(1).mean(1) >= LEAST_BACKGROUND
    rows, kept, every = [], [c for c, ok in zip(clusters, enough.tolist(), strict=True) if ok], {}
    for case, images in cases.items():
        new, patches = embed_pictures(pipe, images)
        change = F.cosine_similarity(new - old, after - before, dim=1)
        values = {
            DIRECTION: change,
            NEAR: (concept_ranks(new[:, CONCEPT], texts, wanted) < 5).float(),
            STRUCTURE: (similarities(patches) - similarities(hidden)).square().flatten(1).mean(1),
            "lines like the true icon's": edge_similarity(images, truths),
            "style as wanted": styles_agree(judge, images, [world.icons[j.truth] for j in jobs]),
        }
        if case == "source, unchanged":
            values.pop(DIRECTION)  # of no change there is no direction
        rows += [interval(task, measure, case, value, clusters) for measure, value in values.items()]
        if case != "source, unchanged" and bool(enough.any()):
            psnr, ssim = background_figures(images[enough], sources[enough], background[enough])
            rows += [interval(task, KEPT, case, psnr, kept), interval(task, KEPT_SSIM, case, ssim, kept)]
            values |= {KEPT: psnr, KEPT_SSIM: ssim}
        every[case] = values
    for measured in (DIRECTION, NEAR, STRUCTURE, KEPT, KEPT_SSIM):
        of = {case: values[measured] for case, values in every.items() if measured in values}
        rows += differences(task, measured, of, kept if measured in (KEPT, KEPT_SSIM) else clusters, PAIRS)
    return rows


def to_bytes(images: Tensor) -> Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def ink(sources: Tensor, truths: Tensor) -> Tensor:
    """Where source or truth are not white, grown by 4 pixels: (N, H, W) bool. Elsewhere nothing has to change."""
    drawn = ((255 - torch.minimum(sources, truths).amin(1)) > 24).float()[:, None]
    return F.max_pool2d(drawn, 9, 1, 4)[:, 0] > 0


def background_figures(images: Tensor, sources: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR (at most 60 dB) and mean SSIM of the edit to the source over the background, (N,) each."""
    from skimage.metrics import structural_similarity

    error = ((images.float() - sources.float()) / 255).square().mean(1)
    area = background.flatten(1).sum(1)
    psnr = -10 * ((error * background).flatten(1).sum(1) / area).clamp(min=1e-6).log10()
    ssim = []
    for image, source, mask in zip(images, sources, background, strict=True):
        pair = (x.permute(1, 2, 0).numpy() for x in (image, source))
        values = structural_similarity(*pair, channel_axis=2, full=True)[1]
        ssim.append(float((torch.from_numpy(np.asarray(values)).mean(-1) * mask).sum() / mask.sum()))
    return psnr, torch.tensor(ssim)


def clip_of(pipe: Pipeline) -> Clip:
    """The embedded CLIP of a pipeline."""
    return cast("TinyImage", pipe.image).clip


@torch.no_grad()
def embed_texts(pipe: Pipeline, texts: list[str]) -> Tensor:
    ids = token_ids(pipe.parts.text.tokenizer, texts)
    return torch.cat([embed_text(clip_of(pipe), part)[1] for part in ids.split(256)]).float()


@torch.no_grad()
def embed_pictures(pipe: Pipeline, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (N, 256), and the patches of the fourth layer (N, 64, 192) of the embedded CLIP."""
    embeddings = [embed_image(clip_of(pipe), part.float() / 127.5 - 1) for part in images.split(64)]
    return torch.cat([e for _, e in embeddings]).float(), torch.cat([h[4, :, 1:] for h, _ in embeddings]).float()


def similarities(patches: Tensor) -> Tensor:
    """Cosines between all patches of a picture, (N, P, P): its structure (Tumanyan et al. 2022, arXiv:2201.00424)."""
    unit = F.normalize(patches, dim=-1)
    return unit @ unit.mT


@torch.no_grad()
def styles_agree(judge: Judge, images: Tensor, truths: Sequence[Icon]) -> Tensor:
    framed = torch.stack([torch.from_numpy(frame(x.permute(1, 2, 0).numpy())) for x in images])
    said = judge(to_input(framed)).argmax(1).tolist()
    return torch.tensor([float(judge.styles[s] == icon.style) for s, icon in zip(said, truths, strict=True)])


# The page


def show(world: IconWorld, jobs: Sequence[EditJob], drawn: Mapping[str, Tensor], most: int = 12) -> Image.Image:
    rows = []
    for i, job in enumerate(jobs[:most]):
        pictures_of = {name: to_images(x[i : i + 1].float() / 127.5 - 1)[0] for name, x in drawn.items()}
        truth = to_images(pictures(world, [job.truth]).float() / 127.5 - 1)[0]
        rows.append(
            [
                SheetCell(pictures_of["latent"], "source", is_input=True),
                *(SheetCell(image, name) for name, image in pictures_of.items() if name != "latent"),
                SheetCell(truth, "true icon", is_input=True),
            ]
        )
    return contact_sheet(rows, [f"{j.source_prompt} -> {j.target_prompt}" for j in jobs[:most]])


def write_page(result: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """Tables and sheets as one HTML text; the sheets lie beside it."""
    parts = [
        f"<h1>condit: edits with {html.escape(result['model'])}</h1>",
        f"<p><code>{html.escape(result['command'])}</code>, {result['seconds']:.0f} s. Intervals: 95 %, bootstrap over "
        "concepts.</p>",
    ]
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        kinds.setdefault((row["task"], row["measure"]), []).append(row)
    for (task, measure), rows in kinds.items():
        cells = "".join(
            f"<tr><td>{html.escape(r['case'])}</td><td>{r['value']:.3f}</td><td>{r['low']:.3f} to {r['high']:.3f}</td>"
            f"<td>{r['n']}</td></tr>"
            for r in rows
        )
        parts.append(f"<h2>{html.escape(measure)}, {html.escape(task)}</h2><table>{cells}</table>")
    for task in tasks:
        spent = result["seconds_an_edit"].get(task, {})
        times = ", ".join(f"{html.escape(n)} {s:.2f} s" for n, s in spent.items())
        an_edit = f"<p>An edit: {times}.</p>" if times else ""
        parts.append(f'<h2>{html.escape(task)}</h2>{an_edit}<img src="sheets/{task}.png" alt="">')
    style = "body{font:15px/1.5 system-ui;max-width:1180px;margin:2em auto}td{padding:.2em .8em}img{max-width:100%}"
    head = f'<meta charset="utf-8"><title>condit edits</title><style>{style}</style>'
    return f'<!doctype html><html lang="en">{head}<body>\n' + "\n".join(parts) + "\n</body></html>\n"
