"""Training of ViT (arXiv:2010.11929) as an image classifier: cross entropy, label smoothing, shifts and zooms."""

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
from condit.training.fields import Data, NotNegative, Probability, Sizes
from condit.training.labelled import Images, Label, Size, build, height_width, id2label, open_labelled, with_sizes
from condit.training.loop import Task
from condit.weights.files import load_strict
from condit.weights.vit import for_finetuning, read_vit, save_vit

# Styles and groups are validated on unseen concepts, concepts on unseen combinations of concept and style.
HELD_OUT = {"style": "concept", "group": "concept", "base": "combo"}
READ_BATCH = 64


@dataclass
class Classified:
    images: Tensor  # (B, 3, H, W) in [-1, 1]
    labels: Tensor  # (B,) int64


class ClassifyData(Data):
    """Images come from `icons` (their class: `label`) or from `folder` (one subfolder for each class).

    backbone: a preset, or "ViT" with `sizes`, the fields of `ViTConfig`. init: the weights of another ViT, whose head
    is replaced (section 3.2). size: a side or (height, width) in pixels. smoothing: of labels. shift: the largest, as a
    share of a side. zoom: the largest enlargement or reduction. flip: mirror half of the images. checkpointing saves
    memory and computes each block twice.
    """

    backbone: str = "ViT"
    sizes: Sizes = {}
    init: str | None = None
    icons: str | None = None
    folder: str | None = None
    label: Label = "style"
    size: Size = 128
    smoothing: Probability = 0.1
    shift: Probability = 0.08
    zoom: NotNegative = 0.15
    flip: bool = False
    checkpointing: bool = False


class ClassifyTask(Task):
    """Task "classify" of a recipe. All images are kept in memory in 8 bits."""

    data_type = ClassifyData

    def __init__(self, data: ClassifyData):
        super().__init__()
        self.checkpointing = data.checkpointing
        self.smoothing, self.shift, self.zoom, self.flip = data.smoothing, data.shift, data.zoom, data.flip
        sides = height_width(data.size)
        held_out = HELD_OUT.get(data.label, "concept")
        labelled = open_labelled(data.icons, data.folder, label=data.label, size=sides, held_out=held_out)
        self.classes = labelled.classes
        if len(self.classes) < 2:
            raise ValueError(
                f"A classifier needs at least 2 classes; found {len(self.classes)} in {data.folder or data.icons}. "
                "Put the images into one subfolder for each class."
            )
        self.network = make_vit(data.backbone, data.sizes, data.init, sides, len(self.classes))
        self.images, self.labels = in_memory(labelled.train)
        self.held_images, self.held_labels = in_memory(labelled.held_out)

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
            # Dropout samples on the device. The step gives its seed, so a resumed run samples the same.
            seed = int(torch.randint(2**62, (), generator=generator))
            dropout = torch.Generator(batch.images.device).manual_seed(seed)
        logits = self.network(batch.images, generator=dropout, checkpointing=self.checkpointing).float()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing)
        return loss, {"accuracy": float((logits.argmax(1) == batch.labels).float().mean())}

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """8-bit images (N, 3, H, W) -> (N, classes) on the CPU."""
        return torch.cat([self.network(to_float(part).to(self.device)).float().cpu() for part in images.split(128)])

    def validate(self) -> dict[str, float]:
        """Accuracy and top5 in %, cross entropy in nats without smoothing, on the n held-out images."""
        n = len(self.held_images)
        if n == 0:
            return {}
        logits, labels = self.logits(self.held_images), self.held_labels
        ranked = logits.argsort(1, descending=True) == labels[:, None]
        figures = {
            "accuracy": 100 * float(ranked[:, 0].float().mean()),
            "top5": 100 * float(ranked[:, :5].any(1).float().mean()),
            "cross_entropy": float(F.cross_entropy(logits, labels)),
        }
        return {**{name: round(value, 3) for name, value in figures.items()}, "n": n}

    def sheet(self) -> Image.Image:
        """Two rows of held-out images (of training images without any) with their predicted classes; wrong predictions
        have a frame."""
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
    sizes: Mapping[str, object],
    init: str | None,
    image_size: tuple[int, int],
    classes: int,
) -> ViT:
    """A new ViT, or one with the weights of `init`; its position embeddings are created or resized for `image_size`."""
    presets = {"ViT": ViTConfig(), **PRESETS}
    if backbone not in presets:
        raise ValueError(f"No backbone {backbone!r}. Known: {', '.join(presets)}.")
    derived = [name for name in ("image_size", "classes", "flavour") if name in sizes]
    if derived:
        raise ValueError(f"sizes.{derived[0]} follows from the data; leave it out.")
    config = with_sizes(presets[backbone], sizes)
    config = replace(config, classes=classes, image_size=image_size)
    if config.classifier == "unpooled":
        raise ValueError("A classifier returns one vector for each image: sizes.classifier must be 'token' or 'gap'.")
    if init is None:
        return build(ViT, config)
    if backbone != "ViT" or set(sizes) - {"dropout"}:
        raise ValueError(f"{init} determines the sizes: with `init`, only sizes.dropout may be set.")
    config_of_init, state = read_vit(init)
    new, state = for_finetuning(config_of_init, state, classes=classes, image_size=image_size)
    network = ViT(replace(new, dropout=config.dropout))
    load_strict(network, {name: value.float() for name, value in state.items()}, source=init)
    return network


def in_memory(images: Images) -> tuple[Tensor, Tensor]:
    """(images (N, 3, H, W) uint8, labels (N,))."""
    parts = [
        images.read(range(begin, min(begin + READ_BATCH, len(images)))) for begin in range(0, len(images), READ_BATCH)
    ]
    pixels = torch.cat([((x + 1) * 127.5).round().byte() for x in parts]) if parts else torch.empty(0, 3, 1, 1)
    return pixels.byte(), torch.tensor(images.labels, dtype=torch.long)


def to_float(images: Tensor) -> Tensor:
    """8 bits to [-1, 1]."""
    return images.float() / 127.5 - 1


def augment(images: Tensor, rng: random.Random, *, shift: float, zoom: float, flip: bool) -> Tensor:
    """Shifts, zooms and mirrors each image of (B, 3, H, W) at random; the margin repeats the edge."""
    rows = []
    for _ in images:
        scale = math.exp(rng.uniform(-1, 1) * math.log1p(zoom))
        mirror = -1 if flip and rng.random() < 0.5 else 1
        # Coordinates run from -1 to 1, so a shift of a whole side is 2.
        dx, dy = (2 * rng.uniform(-shift, shift) for _ in range(2))
        rows.append([[mirror * scale, 0.0, dx], [0.0, scale, dy]])
    grid = F.affine_grid(torch.tensor(rows), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
