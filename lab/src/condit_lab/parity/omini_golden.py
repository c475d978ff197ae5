"""The fixtures of OminiControl as a network, adapters, controls and a pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.controls.control import Control, Fill, Run, When
from condit.controls.omini import OminiConfig, OminiControl, OminiReference
from condit.drawing.pipeline import Pipeline
from condit.encoders.text import Text
from condit.nn.lora import LoRA
from condit.nn.streams import Sees, Stream, grid_ids
from condit.weights.load import Parts
from condit_lab.parity.check import recorded_features
from condit_lab.parity.omini_official import official_guidance


class FixedText(nn.Module):
    """Stands for the text encoders: the fixture holds their output."""

    def __init__(self, text: Text):
        super().__init__()
        self.text = text

    def forward(self, prompts: list[str]) -> Text:
        assert len(prompts) == 1
        return self.text


class Seeded(Pipeline):
    """Draws every encoding with the fixture's seed: 1234 + k for the k-th image or black image."""

    count = 0

    def encode_condition(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        self.count += 1
        return super().encode_condition(images, torch.Generator().manual_seed(1233 + self.count))


class Golden:
    """The fixtures of a folder, with the network, adapters and pipeline of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.grid: tuple[int, int] = (self.config["grid_h"], self.config["grid_w"])
        self.text_tokens: int = self.config["text_tokens"]
        self.loras = {name: self.lora(name) for name in ("canny", "subject")}

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def lora(self, name: str) -> LoRA:
        return LoRA.from_tensors(self.tensors(f"lora_{name}"))

    @cached_property
    def forward(self) -> dict[str, Tensor]:
        return self.tensors("forward")

    @cached_property
    def trajectory(self) -> dict[str, Tensor]:
        return self.tensors("trajectory")

    @cached_property
    def model(self) -> MMDiT:
        fields = self.config["transformer"]
        model = MMDiT(MMDiTConfig(**{**fields, "axes_dims_rope": tuple(fields["axes_dims_rope"])}))
        model.load_state_dict(self.tensors("transformer"), strict=True)
        model.time_text_embed.features = recorded_features(self.folder.parent / "dit")
        return model.eval().requires_grad_(False)

    @cached_property
    def vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        vae = AutoencoderKL(**self.config["vae"])
        vae.load_state_dict(self.tensors("vae"), strict=True)
        return vae.eval().requires_grad_(False)

    def pipe(self, kind: type[Pipeline] = Pipeline) -> Pipeline:
        t = self.trajectory
        return kind(
            Parts(
                name="golden",
                hash="",
                backbone=self.model,
                text=FixedText(Text(t["text"], t["pooled"])),
                vae=self.vae,
                image=None,
                prediction="velocity",
                shift=None,
                size=(self.grid[0] * self.config["px"], self.grid[1] * self.config["px"]),
                steps=4,
                guidance=3.5,
                distilled=True,
            )
        )

    @property
    def left(self) -> Tensor:
        """Positions one width to the left."""
        return grid_ids(*self.grid, delta=(0, -self.grid[1]))

    # One prediction

    def image(self, later: bool = False, lora: LoRA | None = None) -> Stream:
        f, ending = self.forward, "_next" if later else ""
        return Stream(f[f"x{ending}"], f["img_ids"], f[f"timestep{ending}"], f["pooled"], f["guidance"], lora)

    def condition(
        self,
        which: str = "a",
        ids: str = "",
        adapter: str = "",
        *,
        sees: Sees = "main",
        gamma: float | None = None,
        weight_text: bool = True,
    ) -> Stream:
        """Of `cond_a` as edges, `cond_b` as a subject, or what is named."""
        f = self.forward
        ids = ids or {"a": "aligned", "b": "delta_minus_w"}[which]
        lora = self.loras[adapter or ("subject" if which == "b" else "canny")]
        clock = torch.zeros_like(f["timestep"])
        weight = None if gamma is None else torch.tensor(gamma).log()
        tokens, guidance = f[f"cond_{which}"], clock + 1
        return Stream(tokens, f[f"ids/{ids}"], clock, f["pooled"], guidance, lora, sees, weight, weight_text)

    @torch.no_grad()
    def predict(self, *conditions: Stream, image: Stream | None = None, controls: tuple[Control, ...] = ()) -> Tensor:
        f = self.forward
        return self.model(image or self.image(), f["text"], f["txt_ids"], conditions=conditions, controls=controls)

    # Controls

    def reference(
        self,
        tokens: Tensor,
        ids: Tensor,
        adapter: str,
        *,
        independent: bool = False,
        black: Tensor | None = None,
        whole: Fill | None = None,
    ) -> OminiReference:
        control = OminiControl(self.loras[adapter], OminiConfig(independent=independent))
        black = tokens if black is None else black
        return OminiReference(tokens, black, ids, control, 1.0, When(), whole=whole)

    def references(self, *, independent: bool) -> list[OminiReference]:
        """Those of the file of caches."""
        f = self.forward
        pairs = ("cond_a", "aligned", "canny"), ("cond_b", "delta_minus_w", "subject")
        return [self.reference(f[x], f[f"ids/{ids}"], name, independent=independent) for x, ids, name in pairs]

    def run(self, pooled: str = "pooled") -> Run:
        f = self.forward
        return Run(self.model, len(f["x"]), self.grid, f[pooled], f["guidance"], self.model.config.in_channels)

    @torch.no_grad()
    def cached(self, pooled: str = "pooled") -> tuple[OminiReference, ...]:
        return tuple(c.prepare(self.run(pooled)) for c in self.references(independent=True))

    def encoded(self, case: str, k: int, adapter: str, ids: Tensor | None = None, **how) -> OminiReference:
        """The k-th encoding of a trajectory. The file keeps positions as encoded, before they are moved or scaled."""
        tokens = self.trajectory[f"{case}/encoded_{k}/tokens"]
        return self.reference(tokens, self.forward["img_ids"] if ids is None else ids, adapter, **how)

    def guided(self) -> list[OminiReference]:
        """The two cached conditions under image guidance; the black image of each was encoded right after it."""
        case = "image_guidance_1.5_two_kv"
        black = [self.trajectory[f"{case}/encoded_{k}/tokens"] for k in (1, 3)]
        return [
            self.encoded(case, 0, "canny", black=black[0], independent=True),
            self.encoded(case, 2, "subject", self.left, black=black[1], independent=True),
        ]

    def integrated(self, case: str, *, independent: bool) -> OminiReference:
        """The known cells of an image as the condition, the others to be generated."""
        tokens = self.trajectory[f"{case}/encoded_0/tokens"]
        mask = from_official_mask(self.trajectory["integration/condition_mask_wh"])
        known = ~mask.flatten()
        ids, given = self.forward["img_ids"][known], Fill(tokens, mask)
        return replace(
            self.encoded(case, 0, "canny", ids, independent=independent, whole=given), tokens=tokens[:, known]
        )

    def cases(self) -> dict[str, list[Control]]:
        """The controls of every trajectory."""
        black = self.trajectory["image_guidance_1.5/encoded_1/tokens"]
        two = [self.encoded("two", 0, "canny"), self.encoded("two", 1, "subject", self.left)]
        small = grid_ids(self.grid[0] // 2, self.grid[1] // 2, scale=2)
        return {
            "none": [],
            "aligned": [self.encoded("aligned", 0, "canny")],
            "subject": [self.encoded("subject", 0, "subject", self.left)],
            "compact": [self.encoded("compact", 0, "canny", small)],
            "two": [*two],
            # The official cache hides text and image from conditions, whatever their adapter was trained for.
            "two_kv": [replace(c, independent=True) for c in two],
            "v1_gamma_0.5": [replace(self.encoded("aligned", 0, "canny"), strength=0.5)],
            "v1_gamma_1.5": [replace(self.encoded("aligned", 0, "canny"), strength=1.5)],
            "image_guidance_1.5": [self.encoded("image_guidance_1.5", 0, "canny", black=black)],
            "image_guidance_1.5_two_kv": official_guidance(self.guided()),
            "integration": [self.integrated("integration", independent=False)],
            "integration_kv": [self.integrated("integration_kv", independent=True)],
        }

    def generate(self, case: str, controls: list[Control]) -> tuple[Tensor, Tensor]:
        """The latents after each of four steps, and the last."""
        steps: list[Tensor] = []
        result = self.pipe()(
            "",
            controls=controls,
            latents=self.trajectory["latents_init"],
            image_guidance_scale=1.5 if case.startswith("image_guidance") else None,
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, kept: steps.append(kept["latents"]),
        )
        return torch.stack(steps), result.images


@cache
def read(folder: Path) -> Golden:
    return Golden(folder)


def from_official_mask(mask: Tensor) -> Tensor:
    """The official inference's mask of the condition (columns, rows), True = known -> generated cells (rows, columns).

    Its `generate` and `Condition` transpose a mask before they flatten it; its trainer does not.
    """
    return ~mask.bool().mT
