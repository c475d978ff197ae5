"""LoRAs of CLIP text encoders: a call encodes its prompts with a copy of the encoders that has updated layers; the
other layers are shared, and the model stays as it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from condit.controls.control import Control
from condit.drawing.model import Model, module_device
from condit.encoders.text import ClipText
from condit.nn.offload import on_device

# "lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
LAYER = re.compile(r"(?:lora_te|text_encoder)(?:_?(?P<number>[12]))?[._](?:text_model[._])?(?P<path>.+)")


def with_text_loras(model: Model, controls: Sequence[Control]) -> Model:
    """The model with the text encoders of these controls; itself without any. Raises ValueError for a layer that the
    encoders do not have."""
    updates = [update for control in controls for update in control.text_lora().items()]
    if not updates:
        return model
    text = model.parts.text
    if not isinstance(text, ClipText):
        raise ValueError(f"{model.parts.name} has no CLIP text encoder that a LoRA could adapt.")
    weights: list[dict[str, Tensor]] = [{} for _ in text.encoders]
    for name, (a, b) in updates:
        number, path = layer_of(name, text)
        layer = text.encoders[number].get_submodule(path)
        assert isinstance(layer, nn.Linear)
        before = weights[number].get(path, layer.weight)
        if (b.shape[0], a.shape[1]) != before.shape:
            raise ValueError(
                f"{name!r} updates {b.shape[0]} x {a.shape[1]}; this text encoder has {tuple(before.shape)}."
            )
        weights[number][path] = before + (b.float() @ a.float()).to(before)
    adapted = on_device(text, module_device(text))  # modules of its own, which share their tensors
    for encoder, each in zip(adapted.encoders, weights, strict=True):
        for path, weight in each.items():
            encoder.get_submodule(path)._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    changed = copy.copy(model)
    vars(changed)["parts"] = replace(model.parts, text=adapted)
    return changed


def layer_of(name: str, text: ClipText) -> tuple[int, str]:
    """The encoder's number and the layer's path, of a layer as a file names it."""
    match = LAYER.fullmatch(name)
    number = int((match and match["number"]) or 1) - 1
    if match is not None and number < len(text.encoders):
        paths = {
            path.removeprefix("text_model.").replace(".", "_"): path
            for path, module in text.encoders[number].named_modules()
            if isinstance(module, nn.Linear)
        }
        path = paths.get(match["path"].replace(".", "_"))
        if path is not None:
            return number, path
    raise ValueError(f"{name!r}: this model's text encoders have no such layer. Was the LoRA made for another model?")
