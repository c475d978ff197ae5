"""AdaIN, the baseline without a diffusion model (Huang & Belongie 2017, arXiv:1703.06868).

Weights are not shipped. The layers carry the numbers of the PyTorch files in circulation (`vgg_normalised.pth`,
`decoder.pth`), which are read as they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from condit.data.files import hash_file
from condit.weights.files import load_strict, read_tensors

# Widths of the 3 x 3 convolutions; "down" and "up" halve and double the side.
_ENCODER: tuple[int | str, ...] = (64, 64, "down", 128, 128, "down", 256, 256, 256, 256, "down", 512)
_DECODER: tuple[int | str, ...] = (256, "up", 256, 256, 256, 128, "up", 128, 64, "up", 64, 3)


def _layers(plan: tuple[int | str, ...], width: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for step in plan:
        if step == "down":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        elif step == "up":
            layers.append(nn.UpsamplingNearest2d(scale_factor=2))
        else:
            assert isinstance(step, int)
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(width, step, 3), nn.ReLU()]
            width = step
    return layers


class AdaIN(nn.Module):
    """Encoder = a VGG-19 up to relu4_1 behind a 1 x 1 convolution that normalises; decoder = its mirror image."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 3, 1), *_layers(_ENCODER, 3))
        self.decoder = nn.Sequential(*_layers(_DECODER, 512)[:-1])  # the picture has no ReLU
        self.hash = ""

    @classmethod
    def load(cls, folder: str | Path | None) -> AdaIN:
        """From a folder that holds both files, which their tensors identify. Raises ValueError if one is missing."""
        wanted = "AdaIN needs the weights of a normalised VGG-19 and of its decoder (vgg_normalised.pth, decoder.pth)."
        if folder is None:
            raise ValueError(f"{wanted} They are not shipped. Give their folder: --adain DIR.")
        if not Path(folder).is_dir():
            raise ValueError(f"{wanted} There is no folder {folder}.")
        model, marks = cls(), []
        files = [f for f in sorted(Path(folder).iterdir()) if f.suffix in (".pth", ".pt", ".bin", ".safetensors")]
        parts: dict[str, tuple[Path, dict[str, Tensor]]] = {}
        for file in files:
            tensors = read_tensors(file)
            for name, first in (("encoder", "0.weight"), ("decoder", "1.weight")):
                own = getattr(model, name).state_dict()
                if first in tensors and tensors[first].shape == own[first].shape:
                    # The file of the encoder goes on to relu5_4, which is not needed.
                    parts[name] = file, {k: v.float() for k, v in tensors.items() if k in own or name == "decoder"}
        for name in ("encoder", "decoder"):
            if name not in parts:
                raise ValueError(f"{wanted} {folder} has no {name} among {[f.name for f in files]}.")
            file, tensors = parts[name]
            load_strict(getattr(model, name), tensors, source=file)
            marks.append(hash_file(file))
        model.hash = "+".join(marks)
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, content: Tensor, style: Tensor, strength: float = 1.0) -> Tensor:
        """Pictures (B, 3, H, W) in 0..1, sides multiples of 8 -> the content drawn with the style's statistics.
        strength interpolates the features between content (0) and style (1), Eq. 14."""
        features = self.encoder(content)
        target = adain(features, self.encoder(style))
        return self.decoder(torch.lerp(features, target, strength)).clamp(0, 1)


def adain(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """Eq. 8: the content's features with mean and deviation of the style's, by channel; (B, C, H, W) twice."""
    mean, deviation = content.mean((2, 3), keepdim=True), (content.var((2, 3), keepdim=True) + eps).sqrt()
    wanted_mean, wanted = style.mean((2, 3), keepdim=True), (style.var((2, 3), keepdim=True) + eps).sqrt()
    return (content - mean) / deviation * wanted + wanted_mean
