"""A weight file of ViT, DiT or DiffiT: its layout, sizes, and difference from another library's forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import torch
from torch import Tensor, nn

from condit.backbones import diffit, diffit_image, dit, vit
from condit.weights.catalog import MODELS
from condit.weights.diffit import file_of, load_diffit, load_diffit_image
from condit.weights.dit import load_dit
from condit.weights.files import names_in
from condit.weights.folders import first_weight_file, own_config
from condit.weights.load import PUBLISHED, identify
from condit.weights.vit import read_vit, save_vit
from condit.weights.vit_layouts import Layout, to_layout
from condit_lab.parity.check import CheckResult, Differences, difference

# Relative to the largest output. Tiny networks agree to 1e-6; every layer of a deep one sums thousands of terms in
# another order.
TOLERANCE = 1e-4
Config = vit.ViTConfig | dit.DiTConfig | diffit.DiffiTConfig | diffit_image.DiffiTImageConfig
# Fields without an effect in evaluation, or that are reported apart from the sizes.
_NOT_SIZES = {"flavour", "dropout", "zero_init"}


@dataclass(frozen=True)
class ForwardComparison:
    """A comparison with another library. rows is empty without one; `note` gives the reason."""

    note: str
    rows: tuple[CheckResult, ...] = ()


@dataclass(frozen=True)
class FileReport:
    """A file's properties. preset: the published network that differs in the fewest sizes. differs: the sizes that
    differ, as name -> (the file's, the preset's)."""

    path: Path
    layout: str
    preset: str
    differs: Mapping[str, tuple[object, object]]
    parameters: int
    dtype: str
    computes: str
    reference: ForwardComparison

    def described(self) -> dict[str, str]:
        """Name -> text, for people."""
        others = ", ".join(f"{name} {value} instead of {other}" for name, (value, other) in self.differs.items())
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
    """Strictly loads a file, a folder, or an embedded or published model by name, reports its properties, and compares
    its float32 forward pass on random input with an installed library. Raises what the loaders raise."""
    path = identify(source).path if source in PUBLISHED or source in MODELS else Path(source)
    if heads is not None and backbone == "diffit":
        raise ValueError("A DiffiT file records its number of heads; leave --heads out.")
    return BACKBONES[backbone](path, heads)


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
    reference = ForwardComparison("none: diffusers reads folders with a config.json only")
    if layout == "diffusers" and path.is_dir():
        reference = _diffusers(model.float(), path)
    return _report(path, layout, model.config, dit.PRESETS, model, dtype, reference)


def _diffit(path: Path, heads: int | None) -> FileReport:
    path = file_of(path)
    image = bool(own_config(path, "DiffiTImage", diffit_image.DiffiTImageConfig))
    model = load_diffit_image(path) if image else load_diffit(path)
    layout = "condit, image space" if image else "release"
    presets = diffit_image.IMAGE_PRESETS if image else diffit.PRESETS
    reference = ForwardComparison("none: neither transformers nor diffusers has a DiffiT")
    return _report(path, layout, model.config, presets, model, _dtype(model.parameters()), reference)


BACKBONES = {"vit": _vit, "dit": _dit, "diffit": _diffit}


def _report(
    path: Path,
    layout: str,
    config: Config,
    presets: Mapping[str, Config],
    model: nn.Module,
    dtype: str,
    reference: ForwardComparison,
    computes: str = "",
) -> FileReport:
    preset, differs = nearest(config, presets)
    parameters = sum(p.numel() for p in model.parameters())
    return FileReport(path, layout, preset, differs, parameters, dtype, computes, reference)


def nearest(config: Config, presets: Mapping[str, Config]) -> tuple[str, dict[str, tuple[object, object]]]:
    """The preset that differs in the fewest sizes (of equals: by the smallest factor), and the sizes that differ."""

    def differing(preset: Config) -> dict[str, tuple[object, object]]:
        pairs = {f.name: (getattr(config, f.name), getattr(preset, f.name)) for f in fields(config)}
        return {name: pair for name, pair in pairs.items() if name not in _NOT_SIZES and pair[0] != pair[1]}

    def distance(name: str) -> tuple[int, float]:
        pairs = differing(presets[name]).values()
        numbers = [(a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int) and a > 0 and b > 0]
        return len(pairs), sum(abs(math.log(a / b)) for a, b in numbers)

    name = min(presets, key=distance)
    return name, differing(presets[name])


def _names(path: Path) -> set[str]:
    file = first_weight_file(path)
    assert file is not None  # the loader has read it
    return set(names_in(file))


def _dtype(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in tensors}))


def _vit_layout(model: vit.ViT, names: set[str]) -> str:
    """The layout that shares the most names with the file, computed by writing the model in each layout."""
    names = {name.removeprefix("vit.") for name in names}
    with torch.device("meta"):
        state = vit.ViT(replace(model.config, representation_size=None, fc_norm=False)).state_dict()
    return max(get_args(Layout), key=lambda layout: len(names & to_layout(state, layout, model.config.heads).keys()))


# References


@torch.no_grad()
def _transformers(model: vit.ViT, path: Path, layout: str) -> ForwardComparison:
    """Compares with transformers, which reads its own folders; other layouts are first written as such a folder."""
    try:
        import transformers
    except ImportError:
        return ForwardComparison("none: transformers is not installed")
    c = model.config
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder, how = path, "reading the same folder"
        if layout != "transformers" or not (path / "config.json").is_file():
            how = "reading a copy that condit wrote in its layout"
            try:
                folder = save_vit(Path(scratch) / "vit", c, model.state_dict(), layout="transformers")
            except ValueError as error:
                return ForwardComparison(f"none: {error}")
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
        differences = {"random images": difference(model(x), expected, relative=True)}
    library = f"transformers {transformers.__version__}"
    return ForwardComparison(f"{library}, {how}", (_row("forward in float32 (relative)", library, differences),))


@torch.no_grad()
def _diffusers(model: dit.DiT, path: Path) -> ForwardComparison:
    """Compares with diffusers at t = 0. At other timesteps its features differ from the official ones (it divides by
    127 instead of 128), so the difference at t = 500 is only reported."""
    try:
        import diffusers
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    except ImportError:
        return ForwardComparison("none: diffusers is not installed")
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        return ForwardComparison("none: diffusers reads folders with a config.json only")
    # The official eps, which overrides the folder's: diffusers' default is 1e-5.
    theirs = DiTTransformer2DModel.from_pretrained(
        folder, norm_eps=1e-6, torch_dtype=torch.float32, local_files_only=True
    ).eval()
    c = model.config
    x, y = _random(2, c.in_channels, *c.latent), torch.arange(2) % (c.num_classes or 1)

    def at(t: int) -> float:
        time = torch.full((2,), t)
        return difference(model(x, time, y), theirs(x, timestep=time, class_labels=y).sample, relative=True)

    library = f"diffusers {diffusers.__version__}"
    note = f"{library}; it differs by {at(500):.1e} at t = 500, because its timestep features are not the official ones"
    return ForwardComparison(
        note, (_row("forward at t = 0 in float32 (relative)", library, {"random latents": at(0)}),)
    )


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _row(what: str, against: str, differences: Differences) -> CheckResult:
    return CheckResult(what, against, TOLERANCE, {"file": differences})
