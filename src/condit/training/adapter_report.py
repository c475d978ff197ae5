"""Whether an adapter does its task: does it follow its reference, does it keep the prompt, does the reference leak?

Three images for each pair of a set, from equal noise: without a reference, with its own, and with its own under the
next pair's prompt. Similarities are cosines of CLIP embeddings, or of what the adapter's annotator makes of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from condit.controls.control import Control
from condit.controls.instantstyle import interval
from condit.data.images import ImageSource, load_image, to_tensor
from condit.data.pairs import Pairs
from condit.data.progress import progress_bar
from condit.drawing.pipeline import Pipeline
from condit.drawing.references import ANNOTATORS
from condit.encoders.image import CLIPImage

QUESTIONS = {
    "follows": "similarity to its reference minus similarity to another pair's",
    "keeps": "similarity to a new prompt, with the reference minus without",
    "leaks": "similarity to the caption of the reference under another prompt, with the reference minus without",
}


@dataclass(frozen=True)
class Answer:
    """A mean difference over n pairs, and half of its 95 % interval."""

    question: str
    mean: float
    error: float
    n: int

    @property
    def reading(self) -> str:
        """What the interval says."""
        if abs(self.mean) <= self.error:
            return "no difference was found"
        return "more" if self.mean > 0 else "less"


@dataclass(frozen=True)
class Eyes:
    """What compares: images -> rows, for references and generated images alike; and in CLIP's space images and words
    -> rows, or None without a text tower."""

    reference: Callable[[Sequence[Image.Image]], Tensor]
    image: Callable[[Sequence[Image.Image]], Tensor] | None
    text: Callable[[Sequence[str]], Tensor] | None


def eyes_of(pipe: Pipeline, annotator: str | None, clip: str | None) -> Eyes:
    """By the adapter's annotator, and by the CLIP in a folder (None: the model's own). ValueError for an adapter
    without an annotator and a model without an image encoder."""
    encoder = pipe.image if clip is None else pipe.image_encoder(clip)
    words = pipe.text_tower(clip) if clip is not None or encoder is not None else None

    def seen(images: Sequence[Image.Image]) -> Tensor:
        if isinstance(encoder, CLIPImage):
            return encoder.embeds(encoder.pixels(images))
        assert encoder is not None
        return encoder(torch.stack([to_tensor(image, pipe.size) for image in images]).to(pipe.device))

    def maps(images: Sequence[Image.Image]) -> Tensor:
        made = [ANNOTATORS[annotator or ""](image.resize((pipe.size[1], pipe.size[0]))) for image in images]
        flat = torch.stack([to_tensor(image, 64).mean(0).flatten() for image in made])
        return flat - flat.mean(-1, keepdim=True)

    if annotator is None and encoder is None:
        raise ValueError(
            f"{pipe.name} has no image encoder to compare images with: give the folder of a CLIP (--clip)."
        )
    return Eyes(seen if annotator is None else maps, None if words is None else seen, words)


@torch.no_grad()
def evaluate_adapter(
    pipe: Pipeline,
    control: Callable[[ImageSource], Control],
    pairs: Pairs,
    role: str,
    eyes: Eyes,
    *,
    count: int,
    seed: int = 0,
    steps: int | None = None,
) -> list[Answer]:
    """The answers to QUESTIONS over the first `count` pairs. ValueError for fewer than two."""
    n = min(count, len(pairs))
    if n < 2:
        raise ValueError(f"An interval needs at least two pairs; found {n}.")
    chosen = [pairs[i] for i in range(n)]
    references = [load_image(pair.one(role)) for pair in chosen]
    prompts = [pair.text for pair in chosen]
    following = [(i + 1) % n for i in range(n)]
    sets: list[list[Image.Image]] = [[], [], []]
    with progress_bar(3 * n, "generating", unit="image") as advance:
        for i, after in enumerate(following):
            made = control(references[i])
            for images, prompt, controls in zip(
                sets, (prompts[after], prompts[i], prompts[after]), ([], [made], [made]), strict=True
            ):
                how = {"seed": seed + i, "num_inference_steps": steps}
                images += pipe(prompt, controls=controls, **how).images
                advance()
    plain, own, crossed = sets
    looked, wanted = eyes.reference(own), eyes.reference(references)
    rows = {"follows": similar(looked, wanted) - similar(looked, wanted[following])}
    if eyes.image is not None and eyes.text is not None:
        words, without, within = eyes.text(prompts), eyes.image(plain), eyes.image(crossed)
        rows["keeps"] = similar(within, words[following]) - similar(without, words[following])
        rows["leaks"] = similar(within, words) - similar(without, words)
    return [Answer(question, *interval(values.tolist()), n) for question, values in rows.items()]


def similar(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (n,) of rows."""
    return F.cosine_similarity(a.float(), b.float().to(a.device))
