"""A weight file of ViT, DiT or DiffiT: what it is, and how its forward differs from an installed reference's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor, nn

from condit.backbones import diffit, diffit_image, dit, vit
from condit.verify.check import Differences, Row, difference
from condit.weights.catalog import MODELS
from condit.weights.class_models import PUBLISHED, names_in, recognise, weight_file
from condit.weights.diffit import file_of, load_diffit, load_diffit_image, own_config
from condit.weights.dit import load_dit
from condit.weights.vit import read_vit, save_vit
from condit.weights.vit_layouts import Layout, to_layout

# Of the largest output. Tiny networks agree to 1e-6; deep ones sum some thousand terms in another order a layer.
TOLERANCE = 1e-4
# What no output shows in evaluation, or what is told apart from the sizes.
_NOT_SIZES = {"flavour", "dropout", "zero_init"}


@dataclass(frozen=True)
class Reference:
    """A comparison with another library. rows is empty where there is none, and `note` says why."""

    note: str
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class FileReport:
    """What a file is. preset: the published network that differs in the fewest sizes; differs: its sizes, as
    name -> (the file's, the preset's)."""

    path: Path
    layout: str
    preset: str
    differs: Mapping[str, tuple[Any, Any]]
    parameters: int
    dtype: str
    computes: str
    reference: Reference

    def described(self) -> dict[str, str]:
        """Name -> text, for people."""
        others = ", ".join(f"{name} {found} instead of {other}" for name, (found, other) in self.differs.items())
        return {
            "file": str(self.path),
            "layout": self.layout,
            "preset": f"nearest {self.preset}: {others}" if others else self.preset,
            "parameters": f"{self.parameters:,}",
            "dtype": self.dtype,
            **({"computes": self.computes} if self.computes else {}),
            "reference": self.reference.note,
        }


def verify_file(backbone: str, source: str, *, heads: int | None = None) -> FileReport:
    """Loads a file, a folder, or an embedded or published model by name strictly, tells what it is, and compares its
    float32 forward on random input where a reference is installed. ValueError or FileNotFoundError as the loaders."""
    found = recognise(source) if source in PUBLISHED else None
    path = found[1] if found else MODELS[source].path if source in MODELS else Path(source)
    if heads is not None and backbone == "diffit":
        raise ValueError("A DiffiT file tells its heads itself; leave --heads out.")
    return {"vit": _vit, "dit": _dit, "diffit": _diffit}[backbone](path, heads)


def _vit(path: Path, heads: int | None) -> FileReport:
    config, state = read_vit(path, heads=heads)
    with torch.device("meta"):
        model = vit.ViT(config)
    model.load_state_dict(state, strict=True, assign=True)
    layout = _vit_layout(model, _names(path))
    f = config.flavour
    computes = f"gelu {f.gelu}, eps {f.eps:g}, positions {f.resize}"
    reference = _transformers(model.float().eval(), path, layout)
    dtype = _dtype(state.values())
    return _report(path, layout, config, vit.PRESETS, model, dtype, reference, computes)


def _dit(path: Path, heads: int | None) -> FileReport:
    model = load_dit(path, num_heads=heads)
    dtype, names = _dtype(model.parameters()), _names(path)
    layout = "official"
    if any(name.startswith("transformer_blocks.") for name in names):
        layout = "diffusers"
    elif any(name.startswith(("ema.", "model.")) for name in names):
        layout = "training"
    reference = Reference("none: diffusers reads folders with a config.json only")
    if layout == "diffusers" and path.is_dir():
        reference = _diffusers(model.float(), path)
    return _report(path, layout, model.config, dit.PRESETS, model, dtype, reference)


def _diffit(path: Path, heads: int | None) -> FileReport:
    path = file_of(path)
    image = bool(own_config(path, "DiffiTImage"))
    model = load_diffit_image(path) if image else load_diffit(path)
    layout = "condit, image space" if image else "release"
    presets = diffit_image.IMAGE_PRESETS if image else diffit.PRESETS
    reference = Reference("none: neither transformers nor diffusers has a DiffiT")
    return _report(path, layout, model.config, presets, model, _dtype(model.parameters()), reference)


def _report(
    path: Path,
    layout: str,
    config: Any,
    presets: Mapping[str, Any],
    model: nn.Module,
    dtype: str,
    reference: Reference,
    computes: str = "",
) -> FileReport:
    preset, differs = nearest(config, presets)
    parameters = sum(p.numel() for p in model.parameters())
    return FileReport(path, layout, preset, differs, parameters, dtype, computes, reference)


def nearest(config: Any, presets: Mapping[str, Any]) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The preset that differs in the fewest sizes, and among equals by the least factor; with the sizes that differ."""

    def differing(preset: Any) -> dict[str, tuple[Any, Any]]:
        pairs = {f.name: (getattr(config, f.name), getattr(preset, f.name)) for f in fields(config)}
        return {name: pair for name, pair in pairs.items() if name not in _NOT_SIZES and pair[0] != pair[1]}

    def distance(name: str) -> tuple[int, float]:
        pairs = differing(presets[name]).values()
        numbers = [(a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int) and a > 0 and b > 0]
        return len(pairs), sum(abs(math.log(a / b)) for a, b in numbers)

    name = min(presets, key=distance)
    return name, differing(presets[name])


def _names(path: Path) -> set[str]:
    file = weight_file(path)
    assert file is not None  # the loader has read it
    return set(names_in(file))


def _dtype(tensors: Any) -> str:
    return ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in tensors}))


def _vit_layout(model: vit.ViT, names: set[str]) -> str:
    """The layout that shares the most names with the file; its names are written from the model, not kept here."""
    names = {name.removeprefix("vit.") for name in names}
    with torch.device("meta"):
        state = vit.ViT(replace(model.config, representation_size=None, fc_norm=False)).state_dict()
    return max(get_args(Layout), key=lambda layout: len(names & to_layout(state, layout, model.config.heads).keys()))


# References


@torch.no_grad()
def _transformers(model: vit.ViT, path: Path, layout: str) -> Reference:
    """transformers' model of the same weights: its own folder as it is, other layouts written as such a folder."""
    try:
        import transformers
    except ImportError:
        return Reference("none: transformers is not installed")
    c = model.config
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder, how = path, "reading the same folder"
        if layout != "transformers" or not (path / "config.json").is_file():
            how = "reading a copy that condit wrote in its layout"
            try:
                folder = save_vit(Path(scratch) / "vit", c, model.state_dict(), layout="transformers")
            except ValueError as error:
                return Reference(f"none: {error}")
        options = {"dtype": torch.float32, "local_files_only": True}
        if c.classes:
            theirs = transformers.ViTForImageClassification.from_pretrained(folder, **options)
        else:
            pooler = c.representation_size is not None
            theirs = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=pooler, **options)
        size = (c.image_size,) * 2 if isinstance(c.image_size, int) else c.image_size
        x = _random(2, c.in_channels, *size)
        output = theirs.eval()(x)
        if c.classes:
            expected = output.logits
        elif c.representation_size is not None:
            expected = output.pooler_output
        else:
            expected = output.last_hidden_state if c.classifier == "unpooled" else output.last_hidden_state[:, 0]
        found = {"random images": difference(model(x), expected, relative=True)}
    library = f"transformers {transformers.__version__}"
    return Reference(f"{library}, {how}", (_row("forward in float32 (relative)", library, found),))


@torch.no_grad()
def _diffusers(model: dit.DiT, path: Path) -> Reference:
    """diffusers' model of the folder. Its timestep features divide by 127 where the official ones divide by 128, which
    does not show at t = 0 alone; elsewhere the difference is told, but nothing that could be wrong here."""
    try:
        import diffusers
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    except ImportError:
        return Reference("none: diffusers is not installed")
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        return Reference("none: diffusers reads folders with a config.json only")
    # The official eps, whatever the folder says: diffusers' default is 1e-5.
    theirs = DiTTransformer2DModel.from_pretrained(
        folder, norm_eps=1e-6, torch_dtype=torch.float32, local_files_only=True
    ).eval()
    c = model.config
    x, y = _random(2, c.in_channels, *c.latent), torch.arange(2) % (c.num_classes or 1)

    def at(t: int) -> float:
        time = torch.full((2,), t)
        return difference(model(x, time, y), theirs(x, timestep=time, class_labels=y).sample, relative=True)

    library = f"diffusers {diffusers.__version__}"
    note = f"{library}; at t = 500 it is off by {at(500):.1e}, as its timestep features are not the official ones"
    return Reference(note, (_row("forward at t = 0 in float32 (relative)", library, {"random latents": at(0)}),))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _row(what: str, against: str, found: Differences) -> Row:
    return Row(what, against, TOLERANCE, {"file": found})
