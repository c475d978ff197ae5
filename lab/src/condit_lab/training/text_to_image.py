"""Training of the embedded text-to-icon MM-DiT: rectified flow, clean-latent prediction, captions in two languages."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from condit.backbones.mmdit import PRESETS, MMDiT
from condit.controls.control import Control
from condit.data.images import to_images
from condit.diffusion.guidance import guide
from condit.diffusion.objectives import add_noise, flow_loss, to_velocity
from condit.diffusion.samplers import FlowPath, euler
from condit.diffusion.schedules import flow_sigmas, logit_normal
from condit.diffusion.steps import Step
from condit.encoders.text import Text, TinyText
from condit.encoders.vae import PatchAutoencoder, decode_tokens, encode_tokens
from condit.nn.streams import Stream, grid_ids
from condit.training.loop import Task
from condit.weights.files import load_strict, read_tensors, save_tensors
from condit.weights.folders import WEIGHTS, floats
from condit.weights.tiny import load_clip
from condit.weights.vae import load_latent
from condit_lab.icons.world import GROUPS
from condit_lab.training.captioned import Captioned, CaptionedIcons
from condit_lab.training.icon_batches import IconSet

GRID = (8, 8)
# More noise than FLUX's N(0, 1): in a linear code the layout stays visible longer (docs/tiny.md).
T_MEAN, T_STD = 0.8, 1.3
SHIFT = 2.5
# Fresh noise in every step: what a small network has drawn badly it draws again (docs/tiny.md has pictures, figures).
ETA = 1.0


def image_stream(x_t: Tensor, t: Tensor, text: Text, *, canvas: bool = True) -> Stream:
    """The noisy image beside the text's canvas."""
    assert text.canvas is not None
    canvas_channels = text.canvas if canvas else torch.zeros_like(text.canvas)
    tokens = torch.cat([x_t, canvas_channels.to(x_t.dtype)], -1)
    return Stream(tokens, grid_ids(*GRID).to(x_t.device), t, text.pooled)


def training_times(n: int, generator: torch.Generator, mean: float = T_MEAN, std: float = T_STD) -> Tensor:
    """Noise levels (n,)."""
    return logit_normal(n, mean=mean, std=std, generator=generator)


class TextToImageTask(Task):
    """`text` and `vae` are frozen; the transformer predicts the clean latent. `init`: a folder of an earlier export
    whose transformer training starts from."""

    def __init__(
        self,
        icons: str,
        clip: str,
        latent: str,
        ui: str | None = None,
        *,
        preset: str = "tiny",
        init: str | None = None,
        ui_share: float = 0.1,
        procedural_share: float = 0.25,
        t_mean: float = T_MEAN,
        t_std: float = T_STD,
    ):
        """t_mean, t_std: of the logit of the noise level in training."""
        super().__init__()
        self.t_mean, self.t_std = t_mean, t_std
        self.data = CaptionedIcons.open(icons, ui, ui_share=ui_share, procedural_share=procedural_share)
        self.icons, self.held_out, self.ui = self.data.icons, self.data.held_out, self.data.ui
        self.unseen = IconSet.open(icons, splits=("style",), groups=GROUPS)
        self.vae: PatchAutoencoder = load_latent(latent).requires_grad_(False)
        self.text = TinyText(*load_clip(clip)).requires_grad_(False)
        self.transformer = MMDiT(PRESETS[preset])
        start(self.transformer)
        self.fit_canvas()
        if init is not None:
            load_strict(self.transformer, floats(read_tensors(Path(init) / "transformer" / WEIGHTS)), source=init)

    def compiled(self) -> list[nn.Module]:
        return [self.transformer]

    @property
    def code(self) -> tuple[int, int]:
        """Tokens of an image and channels of a token."""
        return GRID[0] * GRID[1], 4 * self.vae.config.latent_channels

    @torch.no_grad()
    def fit_canvas(self) -> None:
        """Thumbnails (the four first principal components) of the training icons, from their captions."""
        rng, thumbnails, pooled = random.Random(0), [], []
        for begin in range(0, len(self.icons), 256):
            chosen = list(range(begin, min(begin + 256, len(self.icons))))
            z = encode_tokens(self.vae, self.icons.images(chosen))[:, :, : self.text.channels].flatten(1)
            for _ in range(2):
                captions = [self.icons.caption(rng, i, p_empty=0.0, p_no_style=0.3) for i in chosen]
                pooled.append(self.text(captions).pooled)
                thumbnails.append(z)
        y = torch.cat(thumbnails)
        self.text.fit_canvas(torch.cat(pooled), y / y.std())

    def batch(self, rng: random.Random, size: int) -> Captioned:
        return self.data.batch(rng, size)

    def forward(self, batch: Captioned, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x0 = encode_tokens(self.vae, batch.images)
            text = self.text(batch.captions)
        t = training_times(len(x0), generator, self.t_mean, self.t_std).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        return flow_loss(self.predict(add_noise(x0, noise, t), t, text), x0, noise, t, "x").mean(), {}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, controls: Sequence[Control] = ()) -> Tensor:
        """Clean-latent prediction (B, 64, channels of the code)."""
        ids = torch.zeros(text.tokens.shape[1], 3, device=x_t.device)
        return self.transformer(image_stream(x_t, t, text), text.tokens, ids, controls=controls)

    def validate(self) -> dict[str, float]:
        """Held-out combinations: velocity error, and how much it rises with another icon's caption (in %)."""
        generator = torch.Generator().manual_seed(0)
        examples = self.data.examples()
        x0, right = encode_tokens(self.vae, examples.images.to(self.device)), self.text(examples.captions)
        wrong = right.rows(torch.arange(len(x0)).roll(7).to(x0.device))
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        figures = {}
        for level in (0.2, 0.5, 0.7, 0.9, 1.0):
            t = torch.full((len(x0),), level, device=x0.device)
            x_t = add_noise(x0, noise, t)
            good, bad = (float(flow_loss(self.predict(x_t, t, s), x0, noise, t, "x").mean()) for s in (right, wrong))
            figures[f"error_{level}"] = round(good, 4)
            figures[f"wrong_words_{level}"] = round(100 * (bad / good - 1), 1)
        return figures

    @torch.no_grad()
    def draw(self, prompts: list[str], *, steps: int = 20, guidance: float = 3.0, seed: int = 0) -> list[Image.Image]:
        """One picture a prompt, by the sampler of the pipeline."""
        text, empty = self.text(prompts), self.text([""] * len(prompts))

        def velocity(x: Tensor, step: Step) -> Tensor:
            t = torch.full((len(x),), step.time, device=x.device)
            both = [to_velocity(self.predict(x, t, s), x, t, "x") for s in (text, empty)]
            return guide(both[0], both[1], guidance)

        generator = torch.Generator().manual_seed(seed)

        def noise(x: Tensor | None = None) -> Tensor:
            return torch.randn(len(prompts), *self.code, generator=generator).to(self.device)

        x = euler(velocity, noise(), FlowPath(tuple(flow_sigmas(steps, shift=SHIFT).tolist())), eta=ETA, noise=noise)
        return to_images(decode_tokens(self.vae, x, GRID))

    def sheet(self) -> Image.Image:
        """Words of users over four styles, and two rows of held-out combinations beside the real icon."""
        return self.data.sheet(self.draw)

    def export(self, folder: Path, card: dict) -> None:
        for name, module in (("transformer", self.transformer), ("canvas", self.text.canvas)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            tensors = {k: v.half() for k, v in module.state_dict().items()}
            save_tensors(folder / name / "diffusion_pytorch_model.safetensors", tensors, {"condit": name})
        config = {"_class_name": "FluxTransformer2DModel", **dataclasses.asdict(self.transformer.config)}
        config["condit"] = {"prediction": "x", "shift": SHIFT, "eta": ETA, "grid": GRID}
        (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


@torch.no_grad()
def start(model: MMDiT) -> None:
    """The start of DiT (arXiv:2212.09748, section 3.2): gates and head at zero, so that blocks begin as identity."""
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim == 2:
            torch.nn.init.xavier_uniform_(p)
        elif name.endswith("bias"):
            p.zero_()
    for name, p in model.named_parameters():
        if ".linear.weight" in name and ("norm1" in name or ".norm." in name or "norm_out" in name):
            p.zero_()
    model.proj_out.weight.zero_()
