"""Small class models side by side: DiT, DiffiT and ViT trained on the icon world by style, ViT also by concept.

All models see the same held-out icons with the same noise, and draw the same classes from the same seeds, so that
differences are paired: they carry an interval of their own, far narrower than that of each model.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from condit.backbones.dit import DiTConfig
from condit.backbones.vit import ViTConfig
from condit.data.files import atomic_write
from condit.data.sheets import SheetCell, contact_sheet
from condit.diffusion.gaussian import gaussian, training_loss
from condit.drawing.classes import ClassModel
from condit.drawing.classifier import ViTPipeline
from condit.drawing.loading import load
from condit.drawing.pipeline import Pipeline
from condit.encoders.clip import CONCEPT as CLIP_CONCEPT
from condit.encoders.clip import embed_image, embed_text, token_ids
from condit.encoders.vae import scale_shift
from condit.rulers.distributions import kernel_distance
from condit.rulers.judge import JUDGE as JUDGE_FOLDER
from condit.rulers.judge import load_judge
from condit.rulers.statistics import Interval, bootstrap
from condit.weights.catalog import MODELS
from condit_lab.icons.world import GROUPS, TRAIN_LICENCES, Icon, IconWorld, concept_names, on_white
from condit_lab.suites.measures import concept_ranks
from condit_lab.suites.sets import pictures

log = logging.getLogger(__name__)

ERROR, AGREEMENT, DISTANCE = "error on held-out icons", "style agreement", "kernel distance to real icons, x 1000"
ACCURACY = "accuracy on unseen concepts, %"
CONCEPT, CONCEPT5 = "concept of another hand's icons, %", "concept among the first five, %"
JUDGE, CLIP = "the judge, a CNN", "the embedded CLIP, by words"
BATCH, STEPS, GUIDANCE = 64, 50, 2.0


@dataclass(frozen=True)
class Figure:
    """One measure of one model. `less` is its difference to the first model that has the measure."""

    model: str
    measure: str
    interval: Interval
    less: Interval | None = None


def evaluate_classes(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    data: str | Path,
    vae: str | Path = "tiny",
    judge: str | Path | None = None,
    count: int = 512,
    seed: int = 0,
    tell: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Measure exported runs by their folders, embedded models by name; returns what stands in `out/classes.json`,
    beside a sheet.

    vae: the autoencoder that DiT and DiffiT were trained on. judge: the folder of another than the committed one.
    count: held-out icons, and pictures drawn, of each model.
    ValueError for a folder that holds no class model, or one whose classes are no styles of `data`.
    """
    began, out = time.perf_counter(), Path(out)
    world, style_judge = IconWorld.open(data, groups=GROUPS, licences=TRAIN_LICENCES), load_judge(judge or JUDGE_FOLDER)
    names = [Path(folder).parent.name if Path(folder).name == "export" else Path(folder).name for folder in folders]
    models = [open_model(folder, vae) for folder in folders]
    concepts = {n: m for n, m in zip(names, models, strict=True) if tells_concepts(m, world)}
    by_style = {n: m for n, m in zip(names, models, strict=True) if n not in concepts}
    styles = styles_of(next(iter(by_style.values())), world) if by_style else []
    for name, model in by_style.items():
        if styles_of(model, world) != styles:
            raise ValueError(
                f"{name} was trained on other styles than {next(iter(by_style))}; compare models of the same styles."
            )
    figures: list[Figure] = []
    first: dict[str, Tensor] = {}

    def add(name: str, measure: str, values: Tensor, icons: Sequence[Icon] | None = None) -> None:
        clusters = None if icons is None else [icon.base for icon in icons]
        less = bootstrap(values - first[measure], clusters) if measure in first else None
        first.setdefault(measure, values)
        figures.append(Figure(name, measure, bootstrap(values, clusters), less))
        tell(f"{name}: {measure} {values.mean():.4f}")

    classified_rows = [i for i, icon in enumerate(world.icons) if icon.split == "concept" and icon.style in styles]
    labels = torch.arange(count) % max(len(styles), 1)
    clip, sheet, speed, held, real = load("tiny").image.clip, [], {}, [], torch.empty(0)
    if any(isinstance(model, Pipeline) for model in by_style.values()):
        held = pick([i for i, icon in enumerate(world.icons) if icon.split == "combo" and icon.style in styles], count)
        real = embed(clip, pictures(world, held))
    for name, model in by_style.items():
        if isinstance(model, ViTPipeline):
            right = classified(model, world, classified_rows) * 100
            add(name, ACCURACY, right, [world.icons[i] for i in classified_rows])
            continue
        add(name, ERROR, errors(model, world, held, seed), [world.icons[i] for i in held])
        started = time.perf_counter()
        images = drawn(model, labels, seed)
        speed[name] = round((time.perf_counter() - started) / len(images), 3)
        said = style_judge.probabilities(images, styles).argmax(1)
        wanted = torch.tensor([style_judge.styles.index(styles[i]) for i in labels])
        add(name, AGREEMENT, (said == wanted).float())
        value, low, high = kernel_distance(embed(clip, images), real)
        figures.append(Figure(name, DISTANCE, Interval(1000 * value, 1000 * low, 1000 * high, len(images))))
        tell(f"{name}: {DISTANCE} {1000 * value:.2f}")
        sheet.append([SheetCell(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images[: len(styles)]])
    for name, model in concepts.items():
        figures += concept_figures(name, model, world, tell)
    if classified_rows:
        said = style_judge.probabilities(pictures(world, classified_rows), styles).argmax(1)
        wanted = torch.tensor([style_judge.styles.index(world.icons[i].style) for i in classified_rows])
        add(JUDGE, ACCURACY, 100.0 * (said == wanted).float(), [world.icons[i] for i in classified_rows])
    result = {
        "command": f"condit evaluate classes {' '.join(map(str, folders))} --data ICONS --count {count} --seed {seed}"
        + (f" --judge {judge}" if judge else ""),
        "count": count,
        "seed": seed,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "classes": styles,
        "first": {f.measure: f.model for f in reversed(figures)},
        "models": {n: described(m, f) for n, m, f in zip(names, models, folders, strict=True)},
        "seconds_per_picture": speed,
        "seconds": round(time.perf_counter() - began, 1),
        "figures": [asdict(figure) for figure in figures],
    }
    text = json.dumps(result, indent=1, allow_nan=False)
    atomic_write(out / "classes.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    if sheet:
        drawing = contact_sheet(sheet, [n for n, m in zip(names, models, strict=True) if isinstance(m, Pipeline)])
        atomic_write(out / "classes.png", lambda path: drawing.save(path, format="PNG"))
    return result


def open_model(folder: str | Path, vae: str | Path) -> Pipeline | ViTPipeline:
    """An exported run; ValueError if it draws or tells no classes."""
    try:
        model = load(folder, vae=vae)
    except ValueError:
        model = load(folder)  # a ViT takes no autoencoder
    if not isinstance(model, Pipeline | ViTPipeline) or model.labels is None:
        raise ValueError(f"{folder} holds no class model with names; expected the export of a small-*.toml recipe.")
    return model


def class_names(model: Pipeline | ViTPipeline) -> list[str]:
    """The names of all classes, in the order of their numbers."""
    if isinstance(model, ViTPipeline):
        return [model.label(i) for i in range(model.model.config.classes)]
    classes = cast("ClassModel", model.model)
    return [classes.label(i) for i in range(classes.classes)]


def styles_of(model: Pipeline | ViTPipeline, world: IconWorld) -> list[str]:
    """The classes in the order of the model's numbers; ValueError if they are no styles."""
    names, known = class_names(model), {icon.style for icon in world.icons}
    if strange := [name for name in names if name not in known]:
        raise ValueError(
            f"{model.name}: class {strange[0]!r} is not a style of the icon world; train with label='style'."
        )
    return names


def tells_concepts(model: Pipeline | ViTPipeline, world: IconWorld) -> bool:
    """Whether a ViT's classes are the concepts of the world, in the order of training."""
    if isinstance(model, Pipeline):
        return False
    names = class_names(model)
    return names == [name for _, name in sorted(trained_concepts(world).items())]


def trained_concepts(world: IconWorld) -> dict[str, str]:
    return concept_names(icon for icon in world.icons if icon.split == "train")


def concept_figures(name: str, model: Any, world: IconWorld, tell: Callable[[str], None]) -> list[Figure]:
    """First guesses and five guesses of a ViT on held-out drawings of its concepts, beside the embedded CLIP, which
    ranks the same class names by their words."""
    by_base = trained_concepts(world)
    numbers = {base: i for i, base in enumerate(sorted(by_base))}
    rows = [i for i, icon in enumerate(world.icons) if icon.split == "combo" and icon.base in numbers]
    if not rows:
        raise ValueError(f"The icon world holds no held-out drawings of {name}'s concepts. Give the whole one.")
    truth = torch.tensor([numbers[world.icons[i].base] for i in rows])
    tiny, ranked, near = load("tiny"), [], []
    ids = token_ids(tiny.parts.text.tokenizer, [by_base[base] for base in numbers])
    with torch.no_grad():
        words = torch.cat([embed_text(tiny.image.clip, part)[1][:, CLIP_CONCEPT] for part in ids.split(256)])
    for begin in range(0, len(rows), BATCH):
        part, wanted = rows[begin : begin + BATCH], truth[begin : begin + BATCH]
        images = pictures(world, part)
        with torch.no_grad():
            shown = model.preprocess([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images])
            scores = model.model(shown).float().cpu()
        # A tie counts against the picture, as among words.
        ranked.append((scores >= scores.gather(1, wanted[:, None])).sum(1) - 1)
        near.append(concept_ranks(embed(tiny.image.clip, images)[:, CLIP_CONCEPT], words, wanted))
    icons, figures = [world.icons[i].base for i in rows], []
    for who, ranks in ((name, torch.cat(ranked)), (CLIP, torch.cat(near))):
        for measure, within in ((CONCEPT, 1), (CONCEPT5, 5)):
            figure = Figure(who, measure, bootstrap(100.0 * (ranks < within).float(), icons))
            tell(f"{who}: {measure} {figure.interval.value:.1f}")
            figures.append(figure)
    return figures


def pick(indices: list[int], count: int) -> list[int]:
    """Spread evenly over the world's order, the same for every model."""
    if not indices:
        raise ValueError(
            "The icon world holds no held-out icons of these styles. Give the whole one: condit data icons."
        )
    return [indices[i * len(indices) // min(count, len(indices))] for i in range(min(count, len(indices)))]


@torch.no_grad()
def errors(model: Pipeline, world: IconWorld, held: Sequence[int], seed: int) -> Tensor:
    """Squared error of the prediction for each icon (N,): evenly spread timesteps, the icon's own class."""
    variance = "learned" if model.backbone.config.learn_sigma else "large"
    process = gaussian(predicts=model.parts.predicts, variance=variance)
    scale, shift = scale_shift(model.parts.vae)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for begin in range(0, len(held), BATCH):
        rows = held[begin : begin + BATCH]
        x = pictures(world, rows).float() / 127.5 - 1
        x0 = (model.parts.vae.encode(x).latent_dist.mode() - shift) * scale
        # A large odd stride visits all noise levels in any run of icons.
        i = torch.tensor([(begin + n) * 617 % len(process) for n in range(len(rows))])
        noise = torch.randn(x0.shape, generator=generator)
        labels = torch.tensor([cast("ClassModel", model.model).index(world.icons[row].style) for row in rows])

        def denoise(x: Tensor, t: Tensor, y: Tensor = labels) -> Tensor:
            return model.backbone(x, t, y)

        mse = training_loss(denoise, process, x0, i, noise).mse
        assert mse is not None
        parts.append(mse)
    return torch.cat(parts)


def drawn(model: Pipeline, labels: Tensor, seed: int) -> Tensor:
    """One picture a label, uint8 (N, 3, H, W)."""
    parts = []
    for begin in range(0, len(labels), BATCH):
        given = labels[begin : begin + BATCH].tolist()
        images = model(
            given,
            seed=seed + begin,
            num_inference_steps=STEPS,
            sampler="ddim",
            guidance_scale=GUIDANCE,
            guidance_power=0.0,
            guidance_channels="all",
            output_type="pt",
        ).images
        parts.append(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def classified(model: ViTPipeline, world: IconWorld, indices: Sequence[int]) -> Tensor:
    """1 where the model finds the icon's style, (N,)."""
    correct = []
    for begin in range(0, len(indices), BATCH):
        rows = indices[begin : begin + BATCH]
        said = model.classify([Image.fromarray(on_white(world.rgba(i))) for i in rows], top_k=1)
        correct += [float(answer[0].label == world.icons[i].style) for answer, i in zip(said, rows, strict=True)]
    return torch.tensor(correct)


@torch.no_grad()
def embed(clip: Any, images: Tensor) -> Tensor:
    """Embeddings (N, 256) of uint8 pictures by the embedded CLIP, concept and style."""
    return torch.cat([embed_image(clip, part.float() / 127.5 - 1)[1] for part in images.split(BATCH)])


def card_of(folder: str) -> dict[str, Any]:
    """The card of an export, or of an embedded model by name; empty without one."""
    if folder in MODELS:
        part = MODELS[folder].path
        return json.loads((part.parent / "cards.json").read_text(encoding="utf-8"))[part.name]
    card = Path(folder) / "card.json"
    return json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}


def described(model: Pipeline | ViTPipeline, folder: str | Path) -> dict[str, Any]:
    """Parameters, and what the card beside the weights says of the training."""
    network = model.backbone if isinstance(model, Pipeline) else model.model
    card = card_of(str(folder))
    kept = {key: card[key] for key in ("steps", "images_seen", "seconds") if key in card}
    c = network.config
    plain = isinstance(c, DiTConfig) and not c.gates
    return {
        "backbone": type(network).__name__,
        "adaln": ("plain" if plain else "zero") if isinstance(c, DiTConfig) else None,
        "depth": c.depth,
        "width": c.dim if isinstance(c, ViTConfig) else c.hidden_size,
        "parameters": sum(p.numel() for p in network.parameters()),
        **kept,
    }
