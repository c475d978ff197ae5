"""Training of ViT (arXiv:2010.11929) as a classifier of pictures: cross entropy, label smoothing, shifts and zooms."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from condit.backbones.vit import PRESETS, ViT, ViTConfig
from condit.data.images import to_images
from condit.data.sheets import SheetCell, contact_sheet
from condit.training.labelled import Label, Pictures, check_sizes, height_width, id2label, open_labelled
from condit.training.loop import Task
from condit.weights.files import load_strict
from condit.weights.vit import for_finetuning, read_vit, save_vit

# Styles and groups are judged on concepts never seen, concepts on drawings by another hand.
HELD_OUT = {"style": "concept", "group": "concept", "base": "combo"}
READ_BATCH = 64


@dataclass
class Classified:
    images: Tensor  # (B, 3, H, W) in [-1, 1]
    labels: Tensor  # (B,) int64


class ClassifyTask(Task):
    """Pictures from `icons` (their class: `label`) or `folder` (one subfolder a class), all held in memory in 8 bits.

    backbone: a preset, or "ViT" with `sizes`, the fields of `ViTConfig`; or `init`, the weights of another ViT whose
    head is replaced (section 3.2). smoothing: of labels; shift: at most so much of a side; zoom: at most so much more
    or less; flip: mirror every other picture. checkpointing: less memory, each block computed twice.
    """

    def __init__(
        self,
        *,
        backbone: str = "ViT",
        sizes: Mapping[str, int | float | str | bool] | None = None,
        init: str | None = None,
        icons: str | None = None,
        folder: str | None = None,
        label: Label = "style",
        size: int | Sequence[int] = 128,
        smoothing: float = 0.1,
        shift: float = 0.08,
        zoom: float = 0.15,
        flip: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__()
        for name, value, least, most in (
            ("smoothing", smoothing, 0, 1),
            ("shift", shift, 0, 1),
            ("zoom", zoom, 0, math.inf),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in {least} to {most}; found {value!r}.")
        self.checkpointing = checkpointing
        self.smoothing, self.shift, self.zoom, self.flip = smoothing, shift, zoom, flip
        sides = height_width(size)
        data = open_labelled(icons, folder, label=label, size=sides, held_out=HELD_OUT.get(label, "concept"))
        self.classes = data.classes
        if len(self.classes) < 2:
            raise ValueError(
                f"A classifier needs at least 2 classes; found {len(self.classes)} in {folder or icons}. "
                "Put the pictures into one subfolder for each class."
            )
        self.network = make_vit(backbone, sizes or {}, init, sides, len(self.classes))
        self.images, self.labels = in_memory(data.train)
        self.held_images, self.held_labels = in_memory(data.held_out)

    def compiled(self) -> list[nn.Module]:
        return [self.network]

    def shards(self) -> tuple[str, Sequence[nn.Module]]:
        return "network", [*self.network.blocks]

    def batch(self, rng: random.Random, size: int) -> Classified:
        chosen = [rng.randrange(len(self.images)) for _ in range(size)]
        images = augment(to_float(self.images[chosen]), rng, shift=self.shift, zoom=self.zoom, flip=self.flip)
        return Classified(images, self.labels[chosen])

    def forward(self, batch: Classified, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        dropout = None
        if self.network.config.dropout:
            # Dropout draws on the device; its seed is the step's, so a resumed run draws the same.
            seed = int(torch.randint(2**62, (), generator=generator))
            dropout = torch.Generator(batch.images.device).manual_seed(seed)
        logits = self.network(batch.images, generator=dropout, checkpointing=self.checkpointing).float()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing)
        return loss, {"accuracy": float((logits.argmax(1) == batch.labels).float().mean())}

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """8-bit pictures (N, 3, H, W) -> (N, classes) on the CPU."""
        found = [self.network(to_float(part).to(self.device)).float().cpu() for part in images.split(128)]
        return torch.cat(found)

    def validate(self) -> dict[str, float]:
        """Held-out pictures: accuracy and top5 in %, cross entropy in nats without smoothing, their number n."""
        n = len(self.held_images)
        if n == 0:
            return {}
        logits, labels = self.logits(self.held_images), self.held_labels
        ranked = logits.argsort(1, descending=True) == labels[:, None]
        found = {
            "accuracy": 100 * float(ranked[:, 0].float().mean()),
            "top5": 100 * float(ranked[:, :5].any(1).float().mean()),
            "cross_entropy": float(F.cross_entropy(logits, labels)),
        }
        return {**{name: round(value, 3) for name, value in found.items()}, "n": n}

    def sheet(self) -> Image.Image:
        """Two rows of held-out pictures (training ones where there are none) with what they are taken for; mistakes are
        framed."""
        held = len(self.held_images) > 0
        images, labels = (self.held_images, self.held_labels) if held else (self.images, self.labels)
        chosen = random.Random(0).sample(range(len(images)), min(16, len(images)))
        guesses = self.logits(images[chosen]).argmax(1).tolist()
        cells: list[SheetCell | Image.Image | None] = [
            SheetCell(image, self.classes[guess], is_input=guess != int(labels[i]))
            for image, guess, i in zip(to_images(to_float(images[chosen])), guesses, chosen, strict=True)
        ]
        rows = [cells[:8], cells[8:]] if len(cells) > 8 else [cells]
        return contact_sheet(rows, labels=["held out" if held else "training"] * len(rows))

    def export(self, folder: Path, card: dict) -> None:
        """model.safetensors with timm's names, config.json with the classes' names (`id2label`), card.json."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.network.config
        save_vit(folder / "model.safetensors", config, self.network.state_dict(), layout="timm")
        fields = {"_class_name": "ViT", "image_size": config.image_size, "id2label": id2label(self.classes)}
        (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def make_vit(
    backbone: str,
    sizes: Mapping[str, int | float | str | bool],
    init: str | None,
    image_size: tuple[int, int],
    classes: int,
) -> ViT:
    """A new ViT, or one that starts from a file; its position table is made, or resized, for `image_size`."""
    presets = {"ViT": ViTConfig(), **PRESETS}
    if backbone not in presets:
        raise ValueError(f"No backbone {backbone!r}. Known: {', '.join(presets)}.")
    given = [name for name in ("image_size", "classes", "flavour") if name in sizes]
    if given:
        raise ValueError(f"sizes.{given[0]} follows from the data; leave it out.")
    check_sizes(presets[backbone], sizes)
    config = replace(presets[backbone], **sizes)  # type: ignore[arg-type]  # a wrong name or value fails here
    config = replace(config, classes=classes, image_size=image_size)
    if config.classifier == "unpooled":
        raise ValueError("A classifier gives one answer a picture: sizes.classifier is 'token' or 'gap'.")
    if init is None:
        return ViT(config)
    if backbone != "ViT" or set(sizes) - {"dropout"}:
        raise ValueError(f"The sizes of {init} are its own; beside `init` only sizes.dropout may be given.")
    known, state = read_vit(init)
    new, state = for_finetuning(known, state, classes=classes, image_size=image_size)
    network = ViT(replace(new, dropout=config.dropout))
    load_strict(network, {name: value.float() for name, value in state.items()}, source=init)
    return network


def in_memory(pictures: Pictures) -> tuple[Tensor, Tensor]:
    """(images (N, 3, H, W) uint8, labels (N,))."""
    parts = [
        pictures.read(range(begin, min(begin + READ_BATCH, len(pictures))))
        for begin in range(0, len(pictures), READ_BATCH)
    ]
    images = torch.cat([((x + 1) * 127.5).round().byte() for x in parts]) if parts else torch.empty(0, 3, 1, 1)
    return images.byte(), torch.tensor(pictures.labels, dtype=torch.long)


def to_float(images: Tensor) -> Tensor:
    """8 bits to [-1, 1]."""
    return images.float() / 127.5 - 1


def augment(images: Tensor, rng: random.Random, *, shift: float, zoom: float, flip: bool) -> Tensor:
    """Every picture (B, 3, H, W) shifted, zoomed and mirrored by its own chance; the margin repeats the edge."""
    rows = []
    for _ in images:
        scale = math.exp(rng.uniform(-1, 1) * math.log1p(zoom))
        mirror = -1 if flip and rng.random() < 0.5 else 1
        # Coordinates run from -1 to 1, so a shift of a whole side is 2.
        dx, dy = (2 * rng.uniform(-shift, shift) for _ in range(2))
        rows.append([[mirror * scale, 0.0, dx], [0.0, scale, dy]])
    grid = F.affine_grid(torch.tensor(rows), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
