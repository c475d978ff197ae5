"""How image prompts may enter the frozen UNet, and what each way is measured on: held-out pairs and drawn pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.backbones.unet import UNet
from condit.controls.control import Control, Run
from condit.controls.deadiff_layers import coarse_layers, cross_shapes
from condit.controls.ip_reference import IPReference
from condit.data.grouped import PairKind
from condit.drawing.pipeline import Pipeline
from condit.nn.attention import Attend, Call
from condit.training.deadiff import DEADiffTask
from condit.training.denoising import errors, latents_of, load_base, run_of
from condit.training.export import ADAPTER
from condit.training.ip_adapter import IPAdapterData, IPAdapterTask
from condit.training.loop import to_device
from condit.training.paired import Paired, resized
from condit.weights.files import load_strict, read_tensors
from condit.weights.folders import floats
from condit_lab.icons.captions import plain_caption
from condit_lab.icons.world import Icon, IconWorld
from condit_lab.suites import sets
from condit_lab.suites import style_rulers as rulers
from condit_lab.suites.style_methods import reference_icons, true_icons
from condit_lab.suites.style_rows import less_blank
from condit_lab.training.referenced import NAMELESS

LEVEL = 0.9  # share of the timesteps
DRAW_STEPS = 20


@dataclass(frozen=True)
class Beside(Control):
    """Image tokens beside the text's, in one softmax: softmax(q [K; K']^T / sqrt(d)) [V; V']."""

    inner: IPReference

    def prepare(self, run: Run) -> Beside:
        return replace(self, inner=self.inner.prepare(run))

    def around(self, call: Call, attend: Attend) -> Tensor:
        if call.site.path not in self.inner.kv:
            return attend(call)
        k, v = (x.to(call.k) for x in self.inner.kv[call.site.path])
        return attend(call.append_kv(k, v))

    def negative(self) -> Beside:
        return replace(self, inner=self.inner.negative())


class BesideTask(IPAdapterTask):
    """maps: whether K', V' learn. Else they stay what they start as, the text's own: then the frozen layers read the
    image tokens and the projector alone learns, which is the paper's simple adapter."""

    def __init__(self, data: IPAdapterData, *, maps: bool):
        super().__init__(data)
        self.ip.ip_adapter.requires_grad_(maps)

    def acting(self, features: Tensor, *, empty: Tensor | None = None) -> Control:
        return Beside(self.ip.reference(features, empty=empty))


def fine_layers(model: str) -> tuple[int, ...]:
    """The layers of a UNet that DEADiff gives style: content and style change places."""
    backbone = load_base(model, "DEADiff").backbone
    assert isinstance(backbone, UNet)
    count = len(cross_shapes(backbone))
    return tuple(i for i in range(count) if i not in coarse_layers(count))


def start_readers(task: IPAdapterTask | DEADiffTask, folder: Path) -> None:
    """What reads the reference (projector, Q-Formers) from finished adapters under `folder` (style, deadiff), equal in
    all variants; K', V' stay as they start, the text's."""
    if isinstance(task, DEADiffTask):
        file, readers = folder / "deadiff" / ADAPTER, {"style.": task.adapter.style, "content.": task.adapter.content}
    else:
        file, readers = folder / "style" / ADAPTER, {"image_proj.": task.ip.image_proj}
    tensors = floats(read_tensors(file))
    for start, reader in readers.items():
        load_strict(reader, {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}, source=file)


@dataclass(frozen=True)
class Scene:
    """Held-out icons with what is shown for each. Pictures are uint8 (N, 3, 128, 128)."""

    wanted: Sequence[Icon]
    shown: Sequence[Icon]  # the icons of the style references
    names: list[list[str]]
    images: Tensor
    references: Mapping[PairKind, Tensor]
    elsewhere: Tensor  # for each row another one whose references are wrong for it

    @classmethod
    def open(cls, world: IconWorld, count: int, seed: int) -> Scene:
        """A style pair is another concept of the style that no training has seen, a content pair the same concept by
        another vendor."""
        cells = sets.choose_cells(world, "combo", count, seed)
        if len(cells) < 2:
            raise ValueError(f"this world has {len(cells)} held-out icons; build it whole: condit data icons")
        wanted, shown = (
            [world.icons[i] for i in rows] for rows in ([c.icon for c in cells], [c.unseen for c in cells])
        )
        images = true_icons(world, cells)
        references: dict[PairKind, Tensor] = {
            "style": reference_icons(world, cells, "style"),
            "content": reference_icons(world, cells, "subject"),
            "reconstruction": images,
        }
        names = sets.cell_names(world, cells)
        return cls(wanted, shown, names, images, references, torch.tensor(elsewhere(wanted)))

    @property
    def clusters(self) -> list[str]:
        return [icon.base for icon in self.wanted]

    def first(self, count: int) -> Scene:
        some: dict[PairKind, Tensor] = {kind: x[:count] for kind, x in self.references.items()}
        wanted = self.wanted[:count]
        other = torch.tensor(elsewhere(wanted), dtype=torch.long)
        return Scene(wanted, self.shown[:count], self.names[:count], self.images[:count], some, other)

    def batch(self, kind: PairKind, rows: Tensor, references: Tensor | None = None) -> Paired:
        """Pairs of some rows, with the references of others if these are given. The caption leaves to the reference
        what it has: the style, or the concept."""
        icons = [self.wanted[i] for i in rows.tolist()]
        nameless = [plain_caption(icon).replace(icon.label, NAMELESS[0], 1) for icon in icons]
        captions = nameless if kind == "content" else [icon.label for icon in icons]
        found = self.references[kind][rows if references is None else references]
        return Paired(kind, signed(self.images[rows]), signed(found), captions)


def elsewhere(icons: Sequence[Icon]) -> list[int]:
    """For each icon the next one of another style and another concept; the next one of all where there is none."""
    n = len(icons)

    def wrong(i: int, j: int) -> bool:
        return icons[j].style != icons[i].style and icons[j].base != icons[i].base

    return [next((j % n for j in range(i + 1, i + n) if wrong(i, j % n)), (i + 1) % n) for i in range(n)]


def signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def controls(task: IPAdapterTask | DEADiffTask, batch: Paired, kept: Tensor, x0: Tensor) -> list[Control]:
    """What a batch of pairs shows; rows that are not `kept` (B,) see no reference."""
    if isinstance(task, DEADiffTask):
        side = task.tower.size
        tokens = task.shown(batch.kind, task.tower(resized(batch.references, (side, side))), kept)
        return [task.adapter.reference(tokens).prepare(run_of(task.parts, x0))]
    return [task.acting(task.features(batch.references, kept))]


@torch.no_grad()
def pair_errors(
    task: IPAdapterTask | DEADiffTask, scene: Scene, kind: PairKind, *, chunk: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors (N,) at LEVEL: with the right reference, another row's, and none."""
    generator, found = torch.Generator().manual_seed(0), ([], [], [])
    for rows in torch.arange(len(scene.wanted)).split(chunk):
        right, wrong = (to_device(scene.batch(kind, rows, r), task.device) for r in (None, scene.elsewhere[rows]))
        x0, text = latents_of(task.vae, right.images, None), task.text(right.captions)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        t = torch.full((len(x0),), int(LEVEL * task.parts.process.num_train_timesteps))
        ones = torch.ones(len(x0), device=x0.device)
        for into, batch, kept in zip(found, (right, wrong, right), (ones, ones, 0 * ones), strict=True):
            into.append(errors(task.parts, x0, noise, t, text, controls(task, batch, kept, x0)).float().cpu())
    one, two, three = (torch.cat(parts) for parts in found)
    return one, two, three


def draw(task: IPAdapterTask, scene: Scene, file: Path, mark: str, *, shown: bool, seed: int) -> Tensor:
    """Pictures of the scene's labels (N, 3, 128, 128) uint8, shown their style references or nothing; kept in `file`.
    Picture i starts from the noise of seed + i in every trial."""
    pipe = Pipeline(task.parts)

    def part(start: int) -> list:
        rows = torch.arange(start, min(start + sets.BATCH, len(scene.wanted)))
        batch = to_device(scene.batch("style", rows), task.device)
        acting = [task.control(batch, torch.ones(len(rows), device=task.device))] if shown else []
        return pipe(batch.captions, controls=acting, seed=seed + start, num_inference_steps=DRAW_STEPS).images

    images, _ = sets.draw_kept(
        file, sets.mark_of([mark, scene.names, seed, DRAW_STEPS]), len(scene.wanted), part, tell=print
    )
    return images


@dataclass(frozen=True)
class Bench:
    """What measures drawn pictures: of a scene, above those that the same noise gives without a reference."""

    ruler: rulers.Ruler
    given: rulers.Given
    blank: Mapping[str, Tensor]

    @classmethod
    def of(cls, world: IconWorld, task: IPAdapterTask, scene: Scene, blank: Tensor) -> Bench:
        ruler = rulers.make_ruler(world, Pipeline(task.parts))
        references = scene.references["style"]
        features = F.normalize(ruler.drawn(references)[0], dim=-1)
        given = rulers.Given(scene.wanted, scene.shown, references, scene.images, features)
        return cls(ruler, given, rulers.values(ruler, blank, given))

    def values(self, images: Tensor) -> dict[str, Tensor]:
        """Every measure of `style_rulers` (N,); increases are above the blank's."""
        return less_blank(rulers.values(self.ruler, images, self.given), self.blank)
