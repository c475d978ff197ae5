"""Training of the embedded CLIP: contrast on concept and on style, two languages, tags and procedural styles; and a
look-loss: the text has to foretell the thumbnail, so that what conditions the backbone carries what a thing looks
like."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.encoders.clip import CONCEPT, STYLE, embed_image, embed_text, token_ids
from condit.training.loop import Task
from condit.weights.files import load_strict, read_tensors
from condit.weights.folders import floats
from condit_lab.icons.procedural import Procedural
from condit_lab.icons.styles import STYLES, UI_STYLES
from condit_lab.icons.world import GROUPS, TRAIN_LICENCES
from condit_lab.training.clip_files import make_clip, make_tokenizer, save_clip, save_tokenizer
from condit_lab.training.icon_batches import IconSet, other, procedural

NO_STYLE = -1
LOOK = 128  # principal components of the thumbnails


@dataclass
class ClipBatch:
    """Images (B, 3, H, W), token ids (B, L); concept and style numbers (B,), in texts NO_STYLE where none is told.
    Then captions alone: token ids (E, L) and the thumbnails of their icons (E, 768)."""

    images: Tensor
    ids: Tensor
    concept: Tensor
    style: Tensor
    style_in_text: Tensor
    more_ids: Tensor
    more_thumbnails: Tensor


def corpus(icons: IconSet, ui: IconSet | None) -> Iterator[str]:
    """Every word that captions may hold."""
    for entry in icons.concepts.values():
        for language in ("en", "zh"):
            for _ in range(4):
                yield entry.get(f"label_{language}") or ""
            yield " ".join(entry.get(f"tags_{language}") or [])
    for style in (*STYLES.values(), *UI_STYLES.values()):
        for _ in range(30):
            yield f"{style.name_en} {style.name_zh} " + " ".join(" ".join(d) for d in style.descriptions)
    rng = random.Random(0)
    for _ in range(2000):
        style = Procedural.sample(rng)
        yield f"{style.words_en} {style.words_zh}"
    for source in (icons, *([ui] if ui else [])):
        for i in range(len(source)):
            yield source.caption(rng, i, p_empty=0.0)


def procedural_caption(icons: IconSet, rng: random.Random, i: int, style: Procedural) -> str:
    """A caption of the concept with the procedural style's words instead of the vendor's."""
    language = "zh" if rng.random() < 0.3 else "en"
    text = icons.caption(rng, i, language=language, p_empty=0.0, p_no_style=1.0)
    return f"{text}，{style.words_zh}" if language == "zh" else f"{text}, {style.words_en}"


class ClipTask(Task):
    """Image-text and image-image contrast with several positives, on the concept part and on the style part; the
    look-loss on every text. `init`: a folder of an earlier export whose image tower training starts from."""

    def __init__(
        self,
        icons: str,
        ui: str | None = None,
        *,
        init: str | None = None,
        ui_share: float = 0.15,
        procedural_share: float = 0.25,
        look_weight: float = 3.0,
        more_captions: int = 256,
    ):
        super().__init__()
        core = {"groups": GROUPS, "licences": TRAIN_LICENCES}
        self.icons = IconSet.open(icons, splits=("train",), **core)
        self.held_out = IconSet.open(icons, splits=("combo",), **core)
        self.ui = IconSet.open(ui, splits=("train",)) if ui else None
        self.ui_share, self.procedural_share = (ui_share if ui else 0.0), procedural_share
        self.tokenizer = make_tokenizer(corpus(self.icons, self.ui))
        self.clip = make_clip(len(self.tokenizer))
        self.clip.logit_scale.data.fill_(2.7)
        self.bases = [b for b, members in self.icons.by_base.items() if len(members) >= 2]
        names = [i.style for i in self.icons.icons] + ([i.style for i in self.ui.icons] if self.ui else [])
        self.style_number = {s: n for n, s in enumerate(sorted(set(names)))}
        self.look_weight, self.more_captions = look_weight, more_captions
        self.thumbnails = torch.cat([thumbnails(self.icons.images([i])) for i in range(len(self.icons))])
        components, mean = principal(self.thumbnails, LOOK)
        self.components: Tensor
        self.mean: Tensor
        self.register_buffer("components", components)
        self.register_buffer("mean", mean)
        self.look = nn.Linear(self.clip.text_projection.out_features, LOOK)
        nn.init.zeros_(self.look.weight)
        if init is not None:
            # The text tower belongs to a tokenizer of its own, so only the image side is taken.
            tensors = floats(read_tensors(Path(init) / "model.safetensors"))
            for name in ("vision_model", "visual_projection"):
                part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                load_strict(getattr(self.clip, name), part, source=init)

    def compiled(self) -> list[nn.Module]:
        return [self.clip.text_model, self.clip.vision_model]

    def batch(self, rng: random.Random, size: int) -> ClipBatch:
        images, texts, concepts, styles, thumbnails = [], [], [], [], []
        numbers: dict[str, int] = {}

        def number(key: str) -> int:
            return numbers.setdefault(key, 1000 + len(numbers))

        def add(image: Tensor, text: str, concept: str, style: int, style_in_text: int) -> None:
            images.append(image)
            texts.append(text)
            concepts.append(number(concept))
            styles.append(style)
            thumbnails.append(style_in_text)

        def add_icon(source: IconSet, i: int) -> None:
            icon, style = source.icons[i], rng.random() < 0.6
            text = source.caption(rng, i, p_empty=0.0, p_no_style=0.0 if style else 1.0)
            n = self.style_number[icon.style]
            add(source.images([i])[0], text, icon.base, n, n if style else NO_STYLE)

        for _ in range(int(size * self.ui_share / 2)):
            assert self.ui is not None
            i = rng.randrange(len(self.ui))
            add_icon(self.ui, i)
            add_icon(self.ui, self.ui.other_drawing(rng, i))
        group = 6
        for _ in range(int(size * self.procedural_share / group)):
            style = Procedural.sample(rng)
            chosen = [rng.randrange(len(self.icons)) for _ in range(group)]
            drawn = procedural(style, self.icons.rgba[chosen])
            # Two draws with the same words are different pictures but one text, so the text side goes by the words.
            for image, i in zip(drawn, chosen, strict=True):
                text = procedural_caption(self.icons, rng, i, style)
                add(image, text, self.icons.icons[i].base, number(style.words_en), number(style.words_en))
        while len(images) < size:
            base = rng.choice(self.bases)
            first = rng.choice(self.icons.by_base[base])
            for i in (first, other(rng, self.icons.by_base[base], lambda j, f=first: j != f, first)):
                add_icon(self.icons, i)
        concept, style_of_image, style_of_text = (torch.tensor(x[:size]) for x in (concepts, styles, thumbnails))
        more = [rng.randrange(len(self.icons)) for _ in range(self.more_captions)]
        more_texts = [self.icons.caption(rng, i, p_empty=0.0, p_no_style=0.3, p_tags=0.2) for i in more]
        return ClipBatch(
            torch.stack(images[:size]),
            token_ids(self.tokenizer, texts[:size]),
            concept,
            style_of_image,
            style_of_text,
            token_ids(self.tokenizer, more_texts),
            self.thumbnails[more],
        )

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        # A little shift and colour of background, so that padding and white are not what tells a set.
        images = jitter(batch.images, generator)
        image = embed_image(self.clip, images)[1].float()
        every_text = embed_text(self.clip, torch.cat([batch.ids, batch.more_ids]))[1].float()
        text = every_text[: len(batch.ids)]
        looks = torch.cat([thumbnails(batch.images), batch.more_thumbnails]) - self.mean
        foretold = self.look(every_text * (every_text.shape[-1] / 2) ** 0.5)
        look = (foretold - looks @ self.components).square().sum(-1).mean()
        scale = self.clip.logit_scale.exp().clamp(max=50)
        c, s = batch.concept, batch.style
        known = batch.style_in_text != NO_STYLE
        concept = contrast(scale * image[:, CONCEPT] @ text[:, CONCEPT].T, c[:, None] == c)
        style = contrast(
            scale * image[:, STYLE] @ text[known][:, STYLE].T, s[:, None] == batch.style_in_text[known], rows=False
        )
        among = among_images(scale * image[:, CONCEPT] @ image[:, CONCEPT].T, c)
        among_style = among_images(scale * image[:, STYLE] @ image[:, STYLE].T, s)
        loss = concept + 0.5 * style + 0.3 * among + 0.5 * among_style + self.look_weight * look
        parts = {"concept": concept, "style": style, "look": look, "among": among, "among_style": among_style}
        return loss, {name: round(float(value.detach()), 4) for name, value in parts.items()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out drawings: top-1 / top-5 among all labels, and the style by the nearest style name."""
        everyone = (*self.icons.icons, *self.held_out.icons)
        bases = sorted({i.base for i in everyone})
        label = {i.base: i.label for i in everyone}
        styles = sorted({i.style for i in self.icons.icons})
        texts = self.embed_texts([label[b] for b in bases])[:, CONCEPT]
        names = self.embed_texts([f"{STYLES[s].name_en} style" for s in styles])[:, STYLE]
        image = torch.cat(
            [
                embed_image(
                    self.clip, self.held_out.images(list(range(i, i + 64))[: len(self.held_out) - i]).to(self.device)
                )[1].cpu()
                for i in range(0, len(self.held_out), 64)
            ]
        )
        best = (image[:, CONCEPT] @ texts.T).topk(5).indices
        truth = torch.tensor([bases.index(i.base) for i in self.held_out.icons])
        style = torch.tensor([styles.index(i.style) for i in self.held_out.icons])
        hit = best == truth[:, None]
        return {
            "top1": round(float(hit[:, 0].float().mean()), 4),
            "top5": round(float(hit.any(1).float().mean()), 4),
            "style": round(float(((image[:, STYLE] @ names.T).argmax(1) == style).float().mean()), 4),
        }

    def embed_texts(self, texts: list[str]) -> Tensor:
        ids = token_ids(self.tokenizer, texts).to(self.device)
        return torch.cat([embed_text(self.clip, part)[1] for part in ids.split(128)]).cpu()

    def export(self, folder: Path, card: dict) -> None:
        save_clip(self.clip.half(), folder)
        self.clip.float()
        save_tokenizer(self.tokenizer, folder)
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def thumbnails(images: Tensor) -> Tensor:
    """(B, 3, 128, 128) -> (B, 768): the mean colour of 16 x 16 squares."""
    return F.adaptive_avg_pool2d(images, 16).flatten(1)


@torch.no_grad()
def principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading components (D, count) of rows (N, D), scaled to a total variance of 1, and the mean (D,)."""
    mean = rows.mean(0)
    variance, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    leading = variance[-count:].flip(0)
    return vectors[:, -count:].flip(1) / leading.sum() ** 0.5, mean


def jitter(images: Tensor, generator: torch.Generator, most: int = 6) -> Tensor:
    """Each image moved by up to `most` pixels."""
    padded = F.pad(images, (most,) * 4, value=1.0)
    moves = torch.randint(0, 2 * most + 1, (len(images), 2), generator=generator).tolist()
    h, w = images.shape[-2:]
    return torch.stack([x[:, dy : dy + h, dx : dx + w] for x, (dy, dx) in zip(padded, moves, strict=True)])


def contrast(logits: Tensor, positive: Tensor, *, rows: bool = True) -> Tensor:
    """Cross-entropy with several positives, both ways; `rows=False` skips rows without any positive."""
    losses = []
    for scores, target in ((logits, positive), (logits.T, positive.T)):
        has = target.any(1)
        weight = target.float() / target.sum(1, keepdim=True).clamp(min=1)
        loss = -(weight * scores.log_softmax(1)).sum(1)
        losses.append(loss.mean() if rows else loss[has].sum() / has.sum().clamp(min=1))
    return (losses[0] + losses[1]) / 2


def among_images(logits: Tensor, number: Tensor) -> Tensor:
    """Supervised contrast of images with one another (Khosla et al. 2020, arXiv:2004.11362), without the diagonal."""
    itself = torch.eye(len(number), dtype=torch.bool, device=logits.device)
    positive = (number[:, None] == number) & ~itself
    has = positive.any(1)
    scores = logits.masked_fill(itself, -1e4).log_softmax(1)
    loss = -(scores * positive).sum(1) / positive.sum(1).clamp(min=1)
    return loss[has].sum() / has.sum().clamp(min=1)
