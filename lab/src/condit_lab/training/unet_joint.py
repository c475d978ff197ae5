"""The embedded UNet with its adapters in tow, as `joint.py` trains the MM-DiT: some rows of each batch have a
reference, the others do not pass through an adapter. Without adapters the model is the plain one.

A small network has to learn that something may come from elsewhere than from words; on a frozen one an adapter of
16,000 images was still disregarded (docs/tiny.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from condit.controls.control import Control
from condit.controls.deadiff import DEADiffReference
from condit.controls.deadiff_layers import SETS, Name
from condit.controls.ip_adapter import IPAdapter
from condit.controls.ip_reference import IPReference
from condit.data.grouped import PAIR_KINDS, PairKind
from condit.data.images import to_images
from condit.data.sheets import contact_sheet
from condit.diffusion.objectives import drop
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import TinyImage
from condit.training.deadiff import SHOWN, dropout_from, load_adapter, make_adapter
from condit.training.denoising import errors, latents_of, run_of
from condit.training.export import ADAPTER, export_adapter
from condit.training.ip_adapter import TOKENS, new_adapter, read_features
from condit.training.loop import to_device
from condit.training.paired import Paired
from condit.weights.files import load_strict, read_tensors
from condit.weights.folders import floats
from condit_lab.icons.world import GROUPS
from condit_lab.training.captioned import Captioned
from condit_lab.training.icon_batches import IconSet
from condit_lab.training.referenced import Referenced, style_batch, style_examples
from condit_lab.training.sources import IconSource
from condit_lab.training.unet import PROCESS, Silence, UNetTask

DROPPED = 0.1  # rows of an adapter that are shown no reference
# Rows of "plus" without words, those of content whose words name nothing, so that the reference is needed, and rows of
# content that are shown the target itself.
UNTOLD = NAMELESS = 0.9
OWN = 0.5
PLUS_DEPTH = 2  # published: four layers, for 1280 numbers a token


@dataclass
class JointBatch:
    """Of a batch, in this order: icons without a reference, then those that each adapter in tow is shown one for."""

    plain: Captioned
    style: Referenced
    plus: Paired | None
    deadiff: tuple[Paired, ...]

    def parts(self) -> dict[str, Sequence[Captioned | Referenced | Paired]]:
        plus = [] if self.plus is None else [self.plus]
        return {"plain": [self.plain], "styled": [self.style], "plus": plus, "deadiff": self.deadiff}


class UNetJointTask(UNetTask):
    """`style_share` of the rows have a reference in the target's style, of those `style_procedural` in a procedural
    one; `plus_share` are shown the target itself by the states of the tower; `deadiff_share`, a third of each of
    DEADiff's tasks. A share of 0: no such adapter. qformer: sizes of DEADiff's Q-Formers.

    init: as of the UNet; init_style, init_plus, init_deadiff: the folders of earlier exports of the adapters."""

    def __init__(
        self,
        icons: str,
        model: str,
        ui: str | None = None,
        *,
        init_style: str | None = None,
        init_plus: str | None = None,
        init_deadiff: str | None = None,
        style_share: float = 0.4,
        style_procedural: float = 0.15,
        plus_share: float = 0.0,
        deadiff_share: float = 0.0,
        qformer: dict[str, int] | None = None,
        **rest: Any,
    ):
        super().__init__(icons, model, ui, **rest)
        shares = (style_share, plus_share, deadiff_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"The shares of rows with a reference must be >= 0 and at most 1 together; found {shares}."
            )
        self.icons, self.ui, self.held_out = self.data.icons, self.data.ui, self.data.held_out
        self.unseen = IconSet.open(icons, splits=("style",), groups=GROUPS)
        self.style_share, self.style_procedural = style_share, style_procedural
        self.plus_share, self.deadiff_share = plus_share, deadiff_share
        self.image = TinyImage(self.text.clip)
        self.ip = new_adapter(self.unet, self.image, "global", TOKENS["global"], None)
        self.plus = self.deadiff = None
        if plus_share:
            self.plus = new_adapter(self.unet, self.image, "plus", TOKENS["plus"], None, depth=PLUS_DEPTH)
        for adapter, init in ((self.ip, init_style), (self.plus, init_plus)):
            if adapter is not None and init is not None:
                load_strict(adapter, floats(read_tensors(Path(init) / ADAPTER)), source=init)
        if deadiff_share:
            self.tower = self.image.patches()
            self.deadiff = make_adapter(self.unet, self.tower, qformer or {}, None)
            if init_deadiff is not None:
                load_adapter(self.deadiff, Path(init_deadiff))
            for reader in (self.deadiff.style, self.deadiff.content):
                reader.ln_vision.requires_grad_(False)  # as in the released optimiser
        side = (self.image.size, self.image.size)
        self.pairs, self.held_out_pairs = (
            IconSource(x, side, side[0], nameless=NAMELESS) for x in (self.icons, self.held_out)
        )

    def batch(self, rng: random.Random, size: int) -> JointBatch:
        styled, plus = int(size * self.style_share), int(size * self.plus_share)
        each = int(size * self.deadiff_share / 3)
        style = style_batch(self, rng, styled, self.style_procedural, most=1)
        return JointBatch(
            super().batch(rng, size - styled - plus - 3 * each),
            style,
            self.own(rng, self.pairs, plus) if plus else None,
            tuple(self.shown_pairs(rng, self.pairs, each, learning=True)) if each else (),
        )

    def own(self, rng: random.Random, source: IconSource, size: int) -> Paired:
        """Icons as their own references, some of them without words."""
        rows = source.batch(rng, "reconstruction", size)
        captions = ["" if rng.random() < UNTOLD else caption for caption in rows.captions]
        return Paired("reconstruction", rows.images, rows.references, captions)

    def shown_pairs(self, rng: random.Random, source: IconSource, size: int, *, learning: bool) -> list[Paired]:
        """Of each of DEADiff's tasks; no words in reconstruction."""
        style, content, own = (source.batch(rng, kind, size) for kind in PAIR_KINDS)
        if learning:
            for row in range(size):
                if rng.random() < OWN:
                    content.references[row] = content.images[row]
        return [style, content, Paired(own.kind, own.images, own.references, [""] * size)]

    def forward(self, batch: JointBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        parts = batch.parts()
        sizes = {name: sum(len(x.captions) for x in part) for name, part in parts.items()}
        rows = [x for part in parts.values() for x in part]
        with torch.no_grad():
            x0 = latents_of(self.vae, torch.cat([x.images for x in rows]), generator)
            text = self.text([caption for x in rows for caption in x.captions])
        t = torch.randint(PROCESS.num_train_timesteps, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        taught = slice(0, sizes["plain"])  # the teacher is shown no reference
        x0[taught], noise[taught] = self.teacher(x0[taught], noise[taught], t[taught], batch.plain.captions)
        kept = (~drop(len(x0), DROPPED, generator)).float().to(x0.device)
        first = len(x0) - sizes["deadiff"]
        controls: list[Control] = [self.on_rows(self.ip, batch.style.references[:, 0], kept, sizes["plain"], first)]
        if self.plus is not None and batch.plus is not None:
            controls.append(self.on_rows(self.plus, batch.plus.references, kept, first - sizes["plus"], first))
        silence = Silence.draw(self.unet, len(x0), self.silent, generator)
        passes = [(slice(0, first), controls)]
        if batch.deadiff:
            with dropout_from(generator, x0.device):
                control = self.deadiff_control(batch.deadiff, kept[first:]).prepare(run_of(self.parts, x0[first:]))
            passes.append((slice(first, len(x0)), [control]))
        loss = torch.cat(
            [
                errors(self.parts, x0[s], noise[s], t[s], text.rows(torch.arange(len(x0))[s]), [silence.rows(s), *c])
                for s, c in passes
            ]
        )
        means = [part.detach().mean() for part in loss.split(list(sizes.values()))]
        figures = {name: round(float(m), 4) for (name, n), m in zip(sizes.items(), means, strict=True) if n}
        return loss.mean(), figures

    def on_rows(self, adapter: IPAdapter, references: Tensor, kept: Tensor, start: int, count: int) -> IPReference:
        """References on the rows from `start` on; the other rows of `count` do not pass through the adapter."""
        rows = slice(start, start + len(references))
        features = read_features(self.image, references, kept[rows], adapter.config.feature)
        spread = features.new_zeros(count, *features.shape[1:])
        region = features.new_zeros(count, 1, 1, 1)
        spread[rows], region[rows] = features, 1
        return adapter.reference(spread).within(region)

    def deadiff_control(self, pairs: tuple[Paired, ...], kept: Tensor) -> DEADiffReference:
        """DEADiff's tokens for rows of several tasks: zeros for what a task is not shown, and where not `kept`."""
        assert self.deadiff is not None
        images = self.tower(torch.cat([p.references for p in pairs]))
        tokens: dict[Name, Tensor] = {}
        for name in SETS:
            shown = torch.cat([kept.new_full((len(p.captions),), float(name in SHOWN[p.kind])) for p in pairs])
            tokens[name] = self.deadiff.ask(name, images) * (kept * shown)[:, None, None]
        return self.deadiff.reference(tokens)

    def looks(self, count: int, icons: IconSet, pairs: IconSource | None) -> Mapping[str, tuple[Any, Callable]]:
        """What each adapter is judged by: "" (style), plus, deadiff by its tasks -> rows, and references -> control."""
        style, rng = style_examples(self, icons, count), random.Random(0)
        judged: dict[str, tuple[Any, Callable]] = {
            "": (style, lambda images: self.ip.reference(self.image(images))),
        }
        if self.plus is not None and pairs is not None:
            plus = self.plus
            own = pairs.batch(rng, "reconstruction", count)
            judged["plus_"] = own, lambda images: plus.reference(self.image.hidden(images))
        if self.deadiff is not None and pairs is not None:
            tasks = self.shown_pairs(rng, pairs, count, learning=False)
            judged |= {f"deadiff_{task.kind}_": (task, partial(self.answers, task.kind)) for task in tasks}
        return judged

    def answers(self, kind: PairKind, images: Tensor) -> DEADiffReference:
        assert self.deadiff is not None
        tokens: dict[Name, Tensor] = {name: self.deadiff.ask(name, self.tower(images)) for name in SHOWN[kind]}
        return self.deadiff.reference(tokens).prepare(run_of(self.parts, images.new_zeros(len(images), 0, 16, 16)))

    def validate(self) -> dict[str, float]:
        """The figures of the plain model; of each adapter, how much the error with its reference rises with another
        row's reference, and with none (in %)."""
        figures = super().validate()
        for name, (rows, control) in self.looks(128, self.held_out, self.held_out_pairs).items():
            batch = to_device(rows, self.device)
            x0, text = latents_of(self.vae, batch.images, None), self.text(batch.captions)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
            references = batch.references if batch.references.ndim == 4 else batch.references[:, 0]
            for share in (0.5, 0.75, 0.9):
                t = torch.full((len(x0),), round(share * (PROCESS.num_train_timesteps - 1)))
                right, wrong, none = (
                    float(errors(self.parts, x0, noise, t, text, controls).mean())
                    for controls in ([control(references)], [control(references.roll(7, 0))], [])
                )
                figures[f"{name}wrong_reference_{share}"] = round(100 * (wrong / right - 1), 1)
                figures[f"{name}no_reference_{share}"] = round(100 * (none / right - 1), 1)
        return figures

    def sheet(self) -> Image.Image:
        """References, what is drawn without and with them, and the real icons: held-out combinations by each adapter,
        then the never-trained style."""
        rows, labels, pipe = [], [], Pipeline(self.parts)
        looks = {f"{name}held out": look for name, look in self.looks(8, self.held_out, self.held_out_pairs).items()}
        for name, (shown, control) in {**looks, "new style": self.looks(8, self.unseen, None)[""]}.items():
            batch = to_device(shown, self.device)
            references = batch.references if batch.references.ndim == 4 else batch.references[:, 0]
            controls: list[list[Control]] = [[], [control(references)]]
            drawn = [pipe(batch.captions, controls=c, seed=0).images for c in controls]
            rows += [to_images(references), *drawn, to_images(batch.images)]
            labels += [f"{name}: reference", "no reference", "drawn", "real"]
        return contact_sheet(rows, labels)

    def export(self, folder: Path, card: dict) -> None:
        """The UNet under `model`, as `condit.load` reads it, and the adapters under `style`, `plus`, `deadiff`."""
        super().export(folder / "model", card)
        export_adapter(self.ip, folder / "style", card)
        if self.plus is not None:
            export_adapter(self.plus, folder / "plus", card)
        if self.deadiff is not None:
            export_adapter(self.deadiff, folder / "deadiff", card)
