"""What an IP-Adapter costs a step: no adapter, diffusers with the adapter, condit with K', V' made once a run.

    python benchmarks/ip_adapter.py                 # minutes on one core
    python benchmarks/ip_adapter.py --tokens 16     # the "plus" form

One prediction with guidance in one call (batch 2), of a random UNet of Stable Diffusion 1.5's layout at reduced widths,
as ratios to the same library's prediction without an adapter, in one run. Then: do four references in a batch of four
prompts give what four single runs give? The answer is a difference, not a time.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import Timing, machine, measure, save
from torch import Tensor, nn

from condit.backbones.unet import UNet, UNetConfig
from condit.cli.memory import keep_memory
from condit.controls.control import Control, Run, Step
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import Resampler
from condit.diffusion.vp import Process
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import CLIPImage
from condit.encoders.text import Text
from condit.weights.latent_models import LatentParts, tell_unet

SMALL = UNetConfig(block_out_channels=(96, 192, 384, 384), sample_size=32)
FEATURES, HIDDEN = 1024, 1280  # of ViT-H/14: embeddings, hidden states


@dataclass(frozen=True)
class Setting:
    """The same weights twice, an adapter, and inputs of one guided prediction."""

    theirs: Any
    bare: Any  # diffusers' network before the adapter was loaded
    ours: UNet
    adapter: IPAdapter
    features: Tensor
    x: Tensor
    text: Tensor


def native_unet(config: UNetConfig) -> Any:
    """diffusers' network of our configuration."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    fields = {name: value for name, value in vars(config).items() if value is not None}
    return UNet2DConditionModel(**fields).eval().requires_grad_(False)


def setting(config: UNetConfig, *, tokens: int, side: int, features: int = FEATURES, hidden: int = HIDDEN) -> Setting:
    """tokens 4: a global adapter; otherwise "plus", whose projector reads 257 states."""
    torch.manual_seed(0)
    bare = native_unet(config)
    ours = UNet(config).eval().requires_grad_(False)
    ours.load_state_dict(bare.state_dict(), strict=True)
    width, plus = config.cross_attention_dim, tokens != 4
    projector = None
    if plus:
        dim = 64 * max(1, width // 64)
        sizes = {"inner": dim, "heads": dim // 64, "depth": 4, "hidden": 4 * dim}
        projector = Resampler(hidden, dim, width, queries=tokens, **sizes)
    ip = IPConfig(hidden if plus else features, tokens, width, combine="concat", feature="hidden" if plus else "embeds")
    adapter = IPAdapter.new(ours, ip, projector=projector).requires_grad_(False).eval()
    theirs = native_unet(config)
    theirs.load_state_dict(bare.state_dict())
    theirs._load_ip_adapter_weights([published(adapter)], low_cpu_mem_usage=False)
    given = torch.randn(1, 257, hidden) if plus else torch.randn(1, features)
    x, text = torch.randn(2, config.in_channels, side, side), torch.randn(2, 77, width)
    return Setting(theirs.eval(), bare, ours, adapter, given, x, text)


def published(adapter: IPAdapter) -> dict[str, dict[str, Tensor]]:
    """As a `.bin` file has it."""
    found: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in adapter.tensors().items():
        part, _, rest = name.partition(".")
        found[part][rest] = tensor
    return found


def both_sides(s: Setting) -> Control:
    """One control for the batch [negative, positive], as diffusers has it."""
    positive = s.features
    control = s.adapter.reference(torch.cat([torch.zeros_like(positive), positive]))
    rows, columns = s.x.shape[2:]
    prepared = control.prepare(Run(s.ours, 2, (rows, columns), s.text.new_zeros(2, 0), None, s.x.shape[1]))  # type: ignore[arg-type]
    acting = prepared.at(Step(0, 1, 1.0))
    assert acting is not None
    return acting


def variants(s: Setting) -> dict[str, Callable[[], Tensor]]:
    """Each a prediction without arguments. What is made once a run is made here."""
    t, control = torch.full((2,), 500.0), both_sides(s)
    known = s.ours.text_keys_values(s.text)
    embeds = [torch.cat([torch.zeros_like(s.features), s.features])[:, None]]

    def native(unet: Any, added: Mapping | None) -> Tensor:
        return unet(s.x, t, s.text, added_cond_kwargs=added, return_dict=False)[0]

    return {
        "diffusers, no adapter": lambda: native(s.bare, None),
        "diffusers, adapter": lambda: native(s.theirs, {"image_embeds": embeds}),
        "condit, no adapter": lambda: s.ours(s.x, t, s.text),
        "condit, adapter": lambda: s.ours(s.x, t, s.text, controls=[control]),
        "condit, no adapter, text keys once a run": lambda: s.ours(s.x, t, known),
        "condit, adapter, text keys once a run": lambda: s.ours(s.x, t, known, controls=[control]),
    }


def table(found: Mapping[str, Timing]) -> str:
    """Milliseconds, and ratios to no adapter of the same library and of diffusers."""
    lines = ["| variant | ms (quartiles) | to its own no adapter | to diffusers, no adapter |", "|---|---|---|---|"]
    base = found["diffusers, no adapter"].seconds
    for name, t in found.items():
        own = found[name.replace(", adapter", ", no adapter")].seconds
        ms = f"{1000 * t.seconds:.1f} ({1000 * t.low:.1f} to {1000 * t.high:.1f})"
        lines.append(f"| {name} | {ms} | {t.seconds / own:.3f} | {t.seconds / base:.3f} |")
    return "\n".join([*lines, ""])


# A batch of references


class Given(CLIPImage):
    """Features are handed over, so no tower is needed."""

    def __init__(self, width: int):
        nn.Module.__init__(self)
        self.width = width


def batch_differences(s: Setting, *, steps: int = 4, count: int = 4) -> dict[tuple[str, float], float]:
    """(library, guidance) -> the largest difference, relative to the largest value, between row i of a batch with
    `count` references and prompts and the run of reference i alone. `s` must be of a global adapter."""
    side, width = s.x.shape[-1], s.text.shape[-1]
    g = torch.Generator().manual_seed(1)
    texts, latents = torch.randn(count, 77, width, generator=g), torch.randn(count, 4, side, side, generator=g)
    references = torch.randn(count, s.features.shape[-1], generator=g)
    theirs, ours = their_pipeline(s), our_pipeline(s)
    found = {}
    for guidance in (1.0, 5.0):
        for name, draw in (("diffusers", theirs), ("condit", ours)):
            batch = draw(texts, latents, references, guidance, steps)
            alone = []
            for i in range(count):
                row = slice(i, i + 1)
                alone.append(draw(texts[row], latents[row], references[row], guidance, steps))
            single = torch.cat(alone)
            found[name, guidance] = float((batch - single).abs().max() / single.abs().max())
    return found


Draw = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


def their_pipeline(s: Setting) -> Draw:
    diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=s.theirs, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def draw(texts: Tensor, latents: Tensor, references: Tensor, guidance: float, steps: int) -> Tensor:
        embeds = references[None]  # one prompt's worth of images: (1, count, E)
        if guidance > 1:
            embeds = torch.cat([torch.zeros_like(embeds), embeds])
        return pipe(
            prompt_embeds=texts, negative_prompt_embeds=torch.zeros_like(texts), latents=latents,
            ip_adapter_image_embeds=[embeds],
            guidance_scale=guidance, num_inference_steps=steps, height=8 * latents.shape[2], width=8 * latents.shape[3],
            output_type="latent",
        ).images  # fmt: skip

    return draw


def no_text(prompts: Sequence[str]) -> Text:
    raise ValueError(f"The texts here are given encoded; found {prompts!r}.")


def our_pipeline(s: Setting) -> Draw:
    parts = LatentParts(
        name="benchmark", hash="", backbone=s.ours, text=no_text, vae=autoencoder(), image=None,
        process=Process(), solver="ddim", size=(8 * s.x.shape[2], 8 * s.x.shape[3]), steps=4, guidance=5.0,
        tell=tell_unet, zero_negative=False,
    )  # fmt: skip
    pipe = Pipeline(parts)

    def draw(texts: Tensor, latents: Tensor, references: Tensor, guidance: float, steps: int) -> Tensor:
        none = texts.new_zeros(len(texts), 0)
        control = s.adapter.control(embeds=references)
        return pipe(
            Text(texts, none), Text(torch.zeros_like(texts), none), controls=[control], latents=latents,
            guidance_scale=guidance, num_inference_steps=steps, output_type="latent",
        ).images  # fmt: skip

    return draw


def autoencoder() -> Any:
    """Eight pixels a latent cell, as Stable Diffusion's; its weights are not used."""
    diffusers: Any = importlib.import_module("diffusers")
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def differences_table(found: Mapping[tuple[str, float], float]) -> str:
    lines = ["| library | guidance | row of a batch against its single run |", "|---|---|---|"]
    lines += [f"| {name} | {guidance:g} | {value:.1e} |" for (name, guidance), value in found.items()]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4, help="4: global; 16: plus")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent; 8 pixels a cell")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    keep_memory()
    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        s = setting(SMALL, tokens=given.tokens, side=given.latent)
        timings = measure(variants(s), turns=given.turns)
        size = sum(p.numel() for p in s.ours.parameters()) / 1e6
        title = f"{size:.0f} M parameters, {given.latent} x {given.latent} latents, {given.tokens} image tokens"
        pages = [f"`python benchmarks/ip_adapter.py --tokens {given.tokens}` on {machine()}.", f"\n**{title}**\n"]
        pages.append(table(timings))
        if given.tokens == 4:
            pages.append(differences_table(batch_differences(s)))
    print("\n".join(pages))
    save(given.out / "ip_adapter.json", {title: timings})
    (given.out / "ip_adapter.md").write_text("\n".join(pages))


if __name__ == "__main__":
    main()
