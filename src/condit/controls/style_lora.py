"""LoRA as a control: a style or character on the text and image tokens (Hu et al. 2021, arXiv:2106.09685).

Nothing is merged. A style LoRA acts on text and image, not on OminiControl's conditions. The official OminiControl code
lets a style leak: it disables other adapters only in the layers that OminiControl itself adapts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from condit.backbones.unet import UNet
from condit.controls import publish
from condit.controls.control import Control, Step, When, finite
from condit.controls.host import Host, save_adapter, within
from condit.controls.omini_tasks import TARGETS
from condit.nn.lora import LoRA, LowRank, PartialLoRA, linear_shapes, sum_loras, weighted


class StyleLoRA(nn.Module):
    """A LoRA of FLUX's transformer or Stable Diffusion's UNet. `control(strength)` makes a control."""

    def __init__(self, lora: LoRA, gated: frozenset[str]):
        """gated: the paths at which the official OminiControl code disables it for conditions."""
        super().__init__()
        self.lora, self.gated, self.name, self.hash = lora, gated, "", ""
        self.base, self.part = "", "transformer"  # the model that it was loaded for, and the part that it updates
        self.text: dict[str, tuple[Tensor, Tensor]] = {}  # updates of text encoders, by the layer's name in the file

    @classmethod
    def load(
        cls,
        source: str | Path,
        pipe: Host,
        *,
        subfolder: str = "",
        weight_name: str = "",
        ignore_text: bool = False,
    ) -> StyleLoRA:
        """From a file, a folder or a name on a hub, in one of the layouts of docs/files.md; subfolder, weight_name: see
        `IPAdapter.load`. ignore_text: drop the tensors for text encoders, which changes the LoRA. CLIP's act on
        condit's own pipelines."""
        source = within(source, subfolder, weight_name)
        file = pipe.adapter_file(source, "OminiControl", ignore_text=ignore_text or pipe.adapts_text)
        if file.config.get("method") == "OminiControl":
            raise ValueError(f"{source} is an OminiControl adapter, not a style LoRA. Use condit.OminiControl.load.")
        lora = LoRA.from_tensors(file.tensors, model=pipe.backbone)
        lora.check_fits(pipe.backbone, source, pipe.name)
        lora = lora.requires_grad_(False).to(pipe.device, pipe.dtype)
        adapter = cls(lora, frozenset(linear_shapes(pipe.backbone, TARGETS)))
        adapter.name, adapter.hash, adapter.base = file.name, file.hash, pipe.name
        adapter.part = "unet" if isinstance(pipe.backbone, UNet) else "transformer"
        pairs = {} if ignore_text else file.text_pairs()
        adapter.text = {name: (a.to(pipe.device), b.to(pipe.device)) for name, (a, b) in pairs.items()}
        return adapter

    save, save_pretrained, push_to_hub = save_adapter, publish.save_pretrained, publish.push_to_hub

    def tensors(self) -> dict[str, Tensor]:
        """diffusers' layout. Raises ValueError for a DoRA and for biases, which the file that it is from holds."""
        if self.lora.bias or self.lora.gains:
            raise ValueError(f"{self.name} has biases or is a DoRA, which are not written. Copy the file itself.")
        made = {f"{self.part}.{n.removeprefix('transformer.')}": t for n, t in self.lora.tensors().items()}
        for layer, (a, b) in self.text.items():
            made |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        return made

    def metadata(self) -> dict:
        return {"method": "StyleLoRA", "base": self.base}

    def control(
        self, strength: float = 1.0, *, when: When | tuple[float, float] | None = None, official: bool = False
    ) -> StyleReference:
        """strength: a factor on the update, any real number. official: as OminiControl's second generation computes it
        together with conditions. In the layers that OminiControl adapts, factor 1 without alpha, for text and image; in
        all others, alpha and strength, for the conditions too."""
        if official and when is not None:
            raise ValueError("The official code has no schedule. Leave when= or official= out.")
        unit = copy.copy(self.lora)
        unit.scales = dict.fromkeys(unit.scales, 1.0)
        return StyleReference(self, finite("strength", strength), When.of(when), unit if official else None)


@dataclass(frozen=True)
class StyleReference(Control):
    """A style LoRA at one strength; `official` is it without alpha, for that form; `update` is that of a step."""

    adapter: StyleLoRA
    strength: float
    when: When
    official: LoRA | None = None
    update: LowRank | None = None

    def weighted(self, strength: float, **paths) -> PartialLoRA:
        return weighted(self.adapter.lora, strength, **paths)

    def at(self, step: Step) -> StyleReference | None:
        if self.official is not None:
            gated = self.adapter.gated
            parts = PartialLoRA(self.official, only=gated), self.weighted(self.strength, without=gated)
            return replace(self, update=sum_loras(parts))
        strength = self.strength * self.when.factor(step)
        return None if strength == 0 else replace(self, update=self.weighted(strength))

    def lora(self) -> LowRank | None:
        return self.update

    def text_lora(self) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = self.adapter.text if self.strength else {}
        return {name: (a, b * self.strength) for name, (a, b) in pairs.items()}

    def leak(self) -> LowRank | None:
        return self.weighted(self.strength, without=self.adapter.gated) if self.official is not None else None

    def negative(self) -> StyleReference:
        return self  # a style acts with and without the prompt, as a merged one does

    def describe(self) -> dict:
        return {
            "method": "StyleLoRA",
            "adapter": self.adapter.name,
            "hash": self.adapter.hash,
            "strength": self.strength,
            "when": [self.when.start, self.when.end],
            **({} if self.official is None else {"official": True}),
        }
