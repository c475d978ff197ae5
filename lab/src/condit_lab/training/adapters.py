"""Training of adapters on the frozen embedded model: style by image embedding, conditions by tokens."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT
from condit.controls.control import Control, Run
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.omini import OminiControl, condition_stream
from condit.controls.omini_tasks import OminiConfig, condition_ids
from condit.data.annotators import edges_array, lines_array
from condit.data.images import to_images
from condit.data.sheets import contact_sheet
from condit.diffusion.guidance import guide
from condit.diffusion.objectives import add_noise, drop, flow_loss, to_velocity
from condit.diffusion.samplers import FlowPath, euler
from condit.diffusion.schedules import flow_sigmas
from condit.diffusion.steps import Step
from condit.encoders.image import TinyImage
from condit.encoders.text import Text, TinyText
from condit.encoders.vae import PatchAutoencoder, decode_tokens, encode_tokens
from condit.nn.lora import LoRA
from condit.nn.streams import Stream
from condit.training.export import ADAPTER, export_adapter
from condit.training.loop import Task, to_device
from condit.weights.files import load_strict, read_tensors
from condit.weights.folders import floats
from condit.weights.tiny import load_tiny
from condit_lab.icons.captions import plain_caption
from condit_lab.icons.world import GROUPS, TRAIN_LICENCES
from condit_lab.training.icon_batches import IconSet
from condit_lab.training.referenced import (
    NAMELESS,
    NAMELESS_SHARE,
    Referenced,
    reference_features,
    referenced,
    spread,
    style_batch,
    style_examples,
    style_table,
)
from condit_lab.training.text_to_image import ETA, GRID, SHIFT, T_MEAN, image_stream, training_times
from condit_lab.training.token_variants import Variant, added

# Fresh condition tokens first disturb the frozen model, and where the noisy picture shows its layout anyway the
# quickest cure is to disregard them. At more noise than in the model's own training they are worth reading. Lines and
# surfaces are decided at little noise, so a run that is to copy those has to end there.
TOKEN_T_MEAN = (2.0, 2.0)
# What has the smallest error takes a style too faintly, as it does the words, which guidance amplifies
# (arXiv:2207.12598). Exported V' are twice as strong as trained: docs/tiny.md has the figures.
STYLE_GAIN = 2.0
Kind = Literal["subject", "edges", "gray", "style"]


class AdapterTask(Task):
    """Shared by both: data, the frozen model, the loss. A subclass says what a reference is and how it acts."""

    t_mean = (T_MEAN, T_MEAN)  # of the logit of the noise level, at the begin and the end of a run

    def __init__(self, icons: str, model: str, ui: str | None = None):
        super().__init__()
        core = {"groups": GROUPS, "licences": TRAIN_LICENCES}
        self.icons = IconSet.open(icons, splits=("train",), **core)
        self.held_out = IconSet.open(icons, splits=("combo",), **core)
        self.unseen = IconSet.open(icons, splits=("style",), groups=GROUPS)
        self.ui = IconSet.open(ui, splits=("train",)) if ui else None
        parts = load_tiny("tiny", Path(model), torch.float32)
        self.transformer: MMDiT = parts.backbone.requires_grad_(False)
        self.vae: PatchAutoencoder = parts.vae.requires_grad_(False)
        self.text: TinyText = parts.text.requires_grad_(False)
        self.image: TinyImage = parts.image.requires_grad_(False)
        self.base_hash = parts.hash

    def compiled(self) -> list[nn.Module]:
        return [self.transformer]

    def predict(self, x_t: Tensor, t: Tensor, text: Text, streams: list[Stream], controls: list[Control]) -> Tensor:
        ids = torch.zeros(text.tokens.shape[1], 3, device=x_t.device)
        image = image_stream(x_t, t, text)
        return self.transformer(image, text.tokens, ids, conditions=streams, controls=controls)

    def forward(self, batch: Referenced, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x0 = encode_tokens(self.vae, batch.images)
            text = self.text(batch.captions)
        mean = self.t_mean[0] + (self.t_mean[1] - self.t_mean[0]) * self.progress
        t = training_times(len(x0), generator, mean).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        streams, controls = self.conditions(batch, text, drop(len(x0), 0.1, generator).to(x0.device))
        output = self.predict(add_noise(x0, noise, t), t, text, streams, controls)
        return flow_loss(output, x0, noise, t, "x").mean(), {}

    def conditions(self, batch: Referenced, text: Text, dropped: Tensor) -> tuple[list[Stream], list[Control]]:
        """What enters the forward pass; rows of `dropped` (B,) get the empty reference."""
        raise NotImplementedError(f"{type(self).__name__} has no conditions().")

    def run_of(self, text: Text) -> Run:
        c = self.transformer.config
        return Run(self.transformer, len(text.pooled), GRID, text.pooled, None, c.in_channels)

    def examples(self, icons: IconSet, count: int) -> Referenced:
        """Held-out rows with their references, the same at every look."""
        raise NotImplementedError(f"{type(self).__name__} has no examples().")

    def validate(self) -> dict[str, float]:
        """Velocity error on held-out rows, and how much it rises with another row's reference, and with none (in %)."""
        batch = to_device(self.examples(self.held_out, 128), self.device)
        x0, text = encode_tokens(self.vae, batch.images), self.text(batch.captions)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
        keep = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        swapped = Referenced(batch.images, batch.captions, batch.references.roll(7, 0), batch.counts.roll(7))
        figures = {}
        for level in (0.5, 0.7, 0.9):
            t = torch.full((len(x0),), level, device=x0.device)
            x_t = add_noise(x0, noise, t)
            errors = [
                float(flow_loss(self.predict(x_t, t, text, *self.conditions(*row)), x0, noise, t, "x").mean())
                for row in ((batch, text, keep), (swapped, text, keep), (batch, text, ~keep))
            ]
            figures[f"error_{level}"] = round(errors[0], 4)
            figures[f"wrong_reference_{level}"] = round(100 * (errors[1] / errors[0] - 1), 1)
            figures[f"no_reference_{level}"] = round(100 * (errors[2] / errors[0] - 1), 1)
        return figures

    @torch.no_grad()
    def draw(self, batch: Referenced, *, steps: int = 20, guidance: float = 3.0, seed: int = 0) -> list[Image.Image]:
        n, batch = len(batch.captions), to_device(batch, self.device)
        text, empty = self.text(batch.captions), self.text([""] * n)
        keep = torch.zeros(n, dtype=torch.bool, device=self.device)
        sides = [(text, *self.conditions(batch, text, keep)), (empty, *self.conditions(batch, empty, ~keep))]

        def velocity(x: Tensor, step: Step) -> Tensor:
            t = torch.full((n,), step.time, device=self.device)
            c, u = (to_velocity(self.predict(x, t, *side), x, t, "x") for side in sides)
            return guide(c, u, guidance)

        code = GRID[0] * GRID[1], 4 * self.vae.config.latent_channels
        generator = torch.Generator().manual_seed(seed)

        def noise(x: Tensor | None = None) -> Tensor:
            return torch.randn(n, *code, generator=generator).to(self.device)

        x = euler(velocity, noise(), FlowPath(tuple(flow_sigmas(steps, shift=SHIFT).tolist())), eta=ETA, noise=noise)
        return to_images(decode_tokens(self.vae, x, GRID))

    def sheet(self) -> Image.Image:
        """References, results and the real icons: held-out combinations, then the never-trained style."""
        rows, labels = [], []
        for name, icons in (("held out", self.held_out), ("new style", self.unseen)):
            batch = self.examples(icons, 10)
            rows += [to_images(batch.references[:, 0]), self.draw(batch), to_images(batch.images)]
            labels += ["reference", name, "real"]
        return contact_sheet(rows, labels)

    def adapter(self) -> IPAdapter | OminiControl:
        raise NotImplementedError(f"{type(self).__name__} has no adapter().")

    def export(self, folder: Path, card: dict) -> None:
        export_adapter(self.adapter(), folder, card, base=self.base_hash)


class StyleTask(AdapterTask):
    """IP-Adapter on the MM-DiT: one or two references of other concepts in the target's style; the caption does not
    name the style. Procedural styles are applied to target and references alike."""

    def __init__(
        self,
        icons: str,
        model: str,
        ui: str | None = None,
        *,
        init: str | None = None,
        tokens: int = 4,
        procedural_share: float = 0.4,
    ):
        super().__init__(icons, model, ui)
        self.ip = new_style_adapter(self.transformer, tokens)
        if init is not None:
            load_style_adapter(self.ip, Path(init) / ADAPTER)
        self.procedural_share = procedural_share
        self.table = style_table(self)

    def adapter(self) -> IPAdapter:
        return amplified(self.ip)

    def batch(self, rng: random.Random, size: int) -> Referenced:
        return style_batch(self, rng, size, self.procedural_share, most=2, pictures=False)

    def examples(self, icons: IconSet, count: int) -> Referenced:
        return style_examples(self, icons, count)

    def conditions(self, batch: Referenced, text: Text, dropped: Tensor) -> tuple[list[Stream], list[Control]]:
        return [], [self.ip.reference(reference_features(self, batch) * (~dropped)[:, None])]


class TokenTask(AdapterTask):
    """OminiControl on the MM-DiT: a condition through the model's own code joins as independent tokens.

    A fresh adapter soon learns to disregard a condition that helps little, and never looks again. So it may start from
    one that looks (`init`), and be led. walk: the shares of the run between which the condition moves from the
    picture's own positions to those of `kind`. leave: the shares of the run between which references take the place of
    the target itself, which is what every row sees until then. None: as it will be, from the start.
    """

    def __init__(
        self,
        icons: str,
        model: str,
        ui: str | None = None,
        *,
        init: str | None = None,
        kind: Kind = "subject",
        rank: int = 8,
        walk: tuple[float, float] | None = None,
        leave: tuple[float, float] | None = None,
        export_rank: int | None = None,
        t_mean: tuple[float, float] = TOKEN_T_MEAN,
        variant: dict | None = None,
    ):
        """rank: at least that of `init`; export_rank: a lower one for what is exported. t_mean: of the logit of the
        noise level, at the begin and the end of the run. variant: fields of `token_variants.Variant`, for ablations."""
        super().__init__(icons, model, ui)
        self.t_mean, self.export_rank = t_mean, export_rank
        self.variant = Variant(**(variant or {}))
        aligned = kind in ("edges", "gray")
        annotator = {"edges": "lines", "gray": "gray"}.get(kind)
        delta = (0, 0) if aligned else (0, -GRID[1])
        for name, part in (("walk", walk), ("leave", leave)):
            if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1] <= 1):
                raise ValueError(f"{name} needs two shares of the run, 0 <= begin < end <= 1; found {part}.")
        self.kind: Kind = kind
        self.walk, self.leave = walk, leave
        config = OminiConfig(kind, delta, independent=True, annotator=annotator, rank=rank, alpha=float(rank))
        config = self.variant.config(config)
        self.omini = OminiControl.new(self.transformer, config)
        if init is not None:
            lora = LoRA.from_tensors(floats(read_tensors(Path(init) / ADAPTER)))
            load_strict(self.omini.lora, widened(lora.state_dict(), self.omini.lora.state_dict()), source=init)
        self.edges = edge_maps(self.icons) if kind == "edges" else None

    def adapter(self) -> OminiControl:
        if self.export_rank is None:
            return self.omini
        config = replace(self.omini.config, rank=self.export_rank, alpha=float(self.export_rank))
        return OminiControl(self.omini.lora.resized(self.export_rank), config)

    def batch(self, rng: random.Random, size: int) -> Referenced:
        if self.kind == "style":
            referenced_rows = style_batch(self, rng, size, 0.3, most=1)
            return replace(referenced_rows, lots=torch.tensor([rng.random() for _ in referenced_rows.captions]))
        chosen = [rng.randrange(len(self.icons)) for _ in range(size)]
        if self.kind == "subject":
            others = [self.icons.other_drawing(rng, i) for i in chosen]
            captions = [self.subject_caption(rng, i) for i in chosen]
            referenced_rows = referenced(self.icons.images(chosen), captions, self.icons.images(others))
            return replace(referenced_rows, lots=torch.tensor([rng.random() for _ in chosen]))
        captions = [self.icons.caption(rng, i, p_no_style=0.3, p_tags=0.1) for i in chosen]
        images = self.icons.images(chosen)
        return referenced(images, captions, self.condition_image(self.icons, chosen, images))

    def subject_caption(self, rng: random.Random, i: int) -> str:
        """The full caption, or one that leaves the concept to the reference."""
        caption = self.icons.caption(rng, i, language="en", p_no_style=0.1, p_lead=0.0, p_short=0.0, p_tags=0.0)
        label = self.icons.icons[i].label
        if caption and rng.random() < NAMELESS_SHARE:
            return caption.replace(label, rng.choice(NAMELESS), 1)
        return self.icons.caption(rng, i, p_no_style=0.1, p_tags=0.1)

    def condition_image(self, icons: IconSet, chosen: list[int], images: Tensor) -> Tensor:
        if self.kind == "gray":
            weights = torch.tensor([0.299, 0.587, 0.114])
            return torch.einsum("bchw,c->bhw", images, weights)[:, None].expand(-1, 3, -1, -1)
        if self.edges is not None and icons is self.icons:
            maps = self.edges[chosen]
        else:
            maps = np.stack([lines_array(edges_array(icons.rgba[i])) for i in chosen])
        return (torch.from_numpy(maps).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)

    def examples(self, icons: IconSet, count: int) -> Referenced:
        if self.kind == "style":
            return style_examples(self, icons, count)
        chosen = spread(icons, count)
        images = icons.images(chosen)
        captions = [plain_caption(icons.icons[i]) for i in chosen]
        if icons is self.unseen:  # its name was never trained
            captions = [icons.icons[i].label for i in chosen]
        if self.kind != "subject":
            return referenced(images, captions, self.condition_image(icons, chosen, images))
        rng = random.Random(0)
        bases = [icons.icons[i].base for i in chosen]
        drawn = [rng.choice(self.icons.by_base[b]) if self.icons.by_base.get(b) else 0 for b in bases]
        return referenced(images, captions, self.icons.images(drawn))

    def conditions(self, batch: Referenced, text: Text, dropped: Tensor) -> tuple[list[Stream], list[Control]]:
        with torch.no_grad():
            shown = batch.references[:, 0]
            if self.leave is not None and batch.lots is not None:
                own = batch.lots >= at_progress(self.leave, self.progress)
                shown = torch.where(own[:, None, None, None], batch.images, shown)
            # The empty condition is a black picture, encoded like any other.
            shown = torch.where(dropped[:, None, None, None], torch.full_like(batch.images, -1.0), shown)
            tokens = encode_tokens(self.vae, self.variant.small(shown))
        stream = condition_stream(self.omini, tokens, self.positions(), self.run_of(text))
        return ([stream], []) if self.variant.what == "add" else self.variant.entered(stream, self.transformer)

    def positions(self) -> Tensor:
        """Where the condition stands at this point of the run, (N, 3)."""
        config, grid = self.omini.config, (GRID[0] // self.variant.scale, GRID[1] // self.variant.scale)
        there = condition_ids(config, grid)
        if self.walk is None:
            return there
        return torch.lerp(
            condition_ids(replace(config, delta=(0, 0)), grid), there, at_progress(self.walk, self.progress)
        )

    def predict(self, x_t: Tensor, t: Tensor, text: Text, streams: list[Stream], controls: list[Control]) -> Tensor:
        if self.variant.what != "add":
            return super().predict(x_t, t, text, streams, controls)
        ids = torch.zeros(text.tokens.shape[1], 3, device=x_t.device)
        return self.transformer(added(image_stream(x_t, t, text), streams[0]), text.tokens, ids)


def widened(small: dict[str, Tensor], large: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's weights in the shapes of one of higher rank, the same update: B of the ranks that it lacks is zero."""
    wide = dict(small)
    for name, there in large.items():
        axis, here = (0 if name.startswith("a.") else 1), small.get(name)
        if here is None or here.shape[1 - axis] != there.shape[1 - axis] or here.shape[axis] > there.shape[axis]:
            continue  # for the strict check
        rest = there.narrow(axis, here.shape[axis], there.shape[axis] - here.shape[axis])
        wide[name] = torch.cat([here, rest if axis == 0 else torch.zeros_like(rest)], axis)
    return wide


def at_progress(between: tuple[float, float], progress: float) -> float:
    """0 before the first share of the run, 1 after the second, a line between them."""
    begin, end = between
    return min(1.0, max(0.0, (progress - begin) / (end - begin)))


def new_style_adapter(transformer: MMDiT, tokens: int = 4) -> IPAdapter:
    """Decoupled attention alone: a shift of the pooled vector beside it carried no style (docs/tiny.md)."""
    c = transformer.config
    config = IPConfig(TinyImage.features, tokens, c.dim, c.num_attention_heads)
    return IPAdapter(config, transformer.sites, c.dim)


def load_style_adapter(adapter: IPAdapter, file: Path) -> None:
    """An exported adapter at the strength at which it is trained."""
    load_strict(adapter, floats(read_tensors(file)), source=file)
    adapter.load_state_dict(amplified(adapter, 1 / STYLE_GAIN).state_dict())


@torch.no_grad()
def amplified(adapter: IPAdapter, gain: float = STYLE_GAIN) -> IPAdapter:
    """A copy with `gain` times the strength."""
    amplified_copy = copy.deepcopy(adapter)
    for name, p in amplified_copy.named_parameters():
        if "to_v_ip" in name:
            p.mul_(gain)
    return amplified_copy


def edge_maps(icons: IconSet) -> np.ndarray:
    """Lines (N, 128, 128) uint8 of a whole set, made once."""
    return np.stack([lines_array(edges_array(x)) for x in icons.rgba])
