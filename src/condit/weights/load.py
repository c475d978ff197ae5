"""What condit loads: a published name, the name of an embedded model, a folder or a single file. `identify` says what a
source is, by the tables PUBLISHED, FOLDERS and TENSORS; `load_parts` reads it, by the table LOADERS."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from condit.data.hub import HubName, why_local
from condit.data.messages import text
from condit.encoders.vae import Autoencoder
from condit.weights.catalog import MODELS, models_folder
from condit.weights.class_models import (
    ClassifierParts,
    ClassParts,
    PixelParts,
    load_class_parts,
    load_classifier_parts,
    load_pixel_parts,
)
from condit.weights.files import Json, names_in, reading
from condit.weights.flux import SIGN, load_flux, load_flux_file
from condit.weights.folders import first_weight_file, optional_json
from condit.weights.guess import guess
from condit.weights.hub_files import BESIDE, COMPONENTS, download_beside, download_model, local_folder
from condit.weights.latent_models import LatentParts
from condit.weights.original_sd import load_original
from condit.weights.parts import Parts
from condit.weights.pixart import load_pixart
from condit.weights.quantise import Quantise, quantise
from condit.weights.stable_diffusion import load_stable_diffusion
from condit.weights.tiny import load_tiny, load_tiny_pixart, load_tiny_unet

FluxKind = Literal["tiny", "flux", "flux-file"]
LatentKind = Literal["stable-diffusion", "stable-diffusion-file", "pixart", "tiny-unet", "tiny-pixart"]
Kind = FluxKind | LatentKind | Literal["dit", "diffit", "diffit-image", "vit"]
LATENT: tuple[LatentKind, ...] = get_args(LatentKind)
AnyParts = Parts | LatentParts | ClassParts | PixelParts | ClassifierParts


@dataclass(frozen=True)
class Published:
    """Weights of a paper's authors: the names of their folder or file, which is looked for in the models folder, and
    where it is published. kind: None where folder and file are two kinds; preset: of its network."""

    kind: Kind | None
    files: tuple[str, ...]
    home: str
    preset: str = ""


PUBLISHED = {
    name: Published(row.get("kind"), tuple(row["files"]), row["home"], row.get("preset", ""))
    for name, row in tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8")).items()
}
# A folder with model_index.json, by the beginning of its pipeline's class. None: another model under a similar name.
FOLDERS: dict[str, Kind | None] = {
    "StableDiffusion3": None,
    "StableDiffusion": "stable-diffusion",
    "PixArt": "pixart",
    "DiTPipeline": "dit",
    "Flux": "flux",
    "IconPixArt": "tiny-pixart",
    "IconUNet": "tiny-unet",
}
# A single file, or the network of any other folder, by a tensor's name that one model has; the first that fits counts.
# The loaders refuse what only looks like their model.
TENSORS: dict[str, Kind] = {
    r"^(state_dict\.)?model\.diffusion_model\.input_blocks\.0\.0\.weight$": "stable-diffusion-file",
    SIGN.pattern: "flux-file",
    r"^encoder\.\d+\.blocks\.\d+\.block\.attn\.qkv_temb\.": "diffit-image",
    r"(^|\.)blocks\.\d+\.attn\.qkv_temb\.": "diffit",
    r"(^|\.)blocks\.\d+\.adaLN_modulation\.": "dit",
    r"^transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.": "dit",
    r"/MultiHeadDotProductAttention_\d/": "vit",
    r"^patch_embed\.proj\.": "vit",
    r"\.attention\.attention\.query\.": "vit",
    r"^(vit\.)?(encoder\.)?layers?\.\d+\.attention\.q_proj\.": "vit",
}


@dataclass(frozen=True)
class ModelSource:
    """What a source is, and where: `name` as the caller wrote it; hub: the repository at a commit that it is from."""

    kind: Kind
    name: str
    path: Path
    hub: HubName | None = None

    @property
    def label(self) -> str:
        """The name (from a hub: with the commit), or that of the folder or file where the name is a path."""
        if self.hub is not None:
            return str(self.hub)
        if self.name in PUBLISHED or self.name in MODELS:
            return self.name
        return self.path.name if self.path.is_dir() else self.path.stem


@dataclass(frozen=True)
class Options:
    """How a model is loaded; see `load_parts`."""

    dtype: torch.dtype | None
    device: str | torch.device
    vae: Autoencoder | str | Path | None
    components: str | Path | None

    @property
    def half(self) -> torch.dtype:
        """For models that run in half precision on a GPU."""
        return self.dtype or (torch.float16 if torch.device(self.device).type == "cuda" else torch.float32)


LOADERS: dict[Kind, Callable[[ModelSource, Options], AnyParts]] = {
    "tiny": lambda m, o: load_tiny(m.name, m.path, o.dtype or torch.float32),
    "flux": lambda m, o: load_flux(m.path, o.dtype or torch.bfloat16, m.label),
    "flux-file": lambda m, o: load_flux_file(m.path, o.components or m.path.parent, o.dtype or torch.bfloat16, m.label),
    "stable-diffusion": lambda m, o: load_stable_diffusion(m.path, o.half, m.label, o.vae),
    "stable-diffusion-file": lambda m, o: load_original(m.path, o.half, m.label, vae=o.vae),
    "pixart": lambda m, o: load_pixart(m.path, o.half, m.label),
    "tiny-unet": lambda m, o: load_tiny_unet(m.path, o.half, m.label),
    "tiny-pixart": lambda m, o: load_tiny_pixart(m.path, o.half, m.label),
    "dit": lambda m, o: load_class_parts(m.name, "dit", m.path, vae=o.vae, dtype=o.dtype),
    "diffit": lambda m, o: load_class_parts(m.name, "diffit", m.path, vae=o.vae, dtype=o.dtype),
    "diffit-image": lambda m, o: load_pixel_parts(m.name, m.path, dtype=o.dtype),
    "vit": lambda m, o: load_classifier_parts(m.name, m.path, dtype=o.dtype),
}
# Which kinds take an option of `condit.load`, and how an error names them.
OPTIONS: dict[str, tuple[tuple[Kind, ...], str]] = {
    "vae": (("dit", "diffit", "stable-diffusion", "stable-diffusion-file"), "Stable Diffusion, DiT and DiffiT"),
    "components": (("flux-file",), "a single file of FLUX.1"),
    "offload": (("tiny", "flux", "flux-file", *LATENT), "FLUX.1, Stable Diffusion and PixArt"),
    "quantize": (("tiny", "flux", "flux-file", *LATENT), "FLUX.1, Stable Diffusion and PixArt"),
}


def identify(source: str | Path, variant: str | None = None) -> ModelSource:
    """What a published name, an embedded model's name, a path or a name on a hub is, in this order; what is on a hub is
    downloaded, its weights in a variant ("fp16") where there is one. FileNotFoundError for a published name whose file
    is not in the models folder; ValueError for anything that condit does not load; for a hub's errors see
    `data.hub`."""
    # A Path is never a name: Path("./sd15") is "sd15" as text.
    name, path, hub = str(source), Path(source), None
    name = f"./{name}" if isinstance(source, Path) and name in {*PUBLISHED, *MODELS} else name
    if name in PUBLISHED:
        path = _published_path(name)
        if (kind := PUBLISHED[name].kind) is not None:
            return ModelSource(kind, name, path)
    elif name in MODELS:
        path = MODELS[name].path
    elif name.split("/")[0] not in MODELS and (asked := HubName.of(source)) is not None:
        path, hub = download_model(asked, partial(_check_index, name), variant)
    if not path.exists():
        raise ValueError(_refusal(name, why_local(source)))
    index = str(optional_json(path / "model_index.json").get("_class_name", ""))
    kind: Kind | None = next((kind for start, kind in FOLDERS.items() if index.startswith(start)), None)
    file = first_weight_file(path) if kind is None else None
    names = [] if file is None else names_in(file)
    if file is not None:
        kind = kind_of_tensors(names)
        path = file if kind == "flux-file" or kind == "stable-diffusion-file" else path
    if kind is None and name in MODELS and MODELS[name].kind == "model":
        kind = "tiny"
    if kind is not None:
        return ModelSource(kind, name, path, hub)
    looks = f" It is a {index}." if index else f" It looks like {found}." if (found := guess(names)) else ""
    raise ValueError(_refusal(name, looks))


def kind_of_tensors(names: Collection[str]) -> Kind | None:
    """The model whose tensors have such names."""
    return next((kind for sign, kind in TENSORS.items() if any(re.search(sign, name) for name in names)), None)


def load_parts(
    source: str | Path | ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    vae: Autoencoder | str | Path | None = None,
    components: str | Path | None = None,
    quantize: Quantise | None = None,
) -> AnyParts:
    """The parts of a pipeline, on the CPU. dtype None: float32 for "tiny", bfloat16 for FLUX.1, the file's for DiT,
    DiffiT and ViT (float32 for the embedded ones), and for the rest float16 where `device` is a GPU, else float32. vae,
    components: see `condit.load`. ValueError for an option that the model does not take; else as `identify`."""
    model = source if isinstance(source, ModelSource) else identify(source)
    check_options(model, vae=vae, components=components, quantize=quantize)
    if model.hub is not None and model.hub.path and components is None:
        download_beside(model.hub, BESIDE.get(model.kind, ()))
    components = None if components is None else local_folder(components, COMPONENTS)
    with reading(model.path):
        parts = LOADERS[model.kind](model, Options(dtype, device, vae, components))
    if quantize is not None and isinstance(parts, Parts | LatentParts):
        quantise(parts.backbone, quantize)
    return parts


def _check_index(name: str, settings: Json) -> None:
    """ValueError for a repository's model_index.json or config.json that says it is another model."""
    pipeline, kind = str(settings.get("_class_name", "")), str(settings.get("model_type", "vit"))
    known = next((kind for start, kind in FOLDERS.items() if pipeline.startswith(start)), None)
    if kind != "vit" or (pipeline.endswith("Pipeline") and known is None):
        raise ValueError(_refusal(name, f" It is a {pipeline or kind}."))


def check_options(model: ModelSource, **options: object) -> None:
    """ValueError for an option that is not None and that this kind of model does not take."""
    for option, value in options.items():
        kinds, what = OPTIONS[option]
        if value is not None and model.kind not in kinds:
            raise ValueError(f"{option}= is for {what}; {model.name!r} ({model.kind}) takes none. Leave it out.")


def _published_path(name: str) -> Path:
    row, folder = PUBLISHED[name], models_folder()
    path = next((folder / file for file in row.files if (folder / file).exists()), None)
    if path is None:
        files = " or ".join(row.files)
        raise FileNotFoundError(
            text("no-weights-here", name=repr(name), files=files, folder=folder, home=row.home)
            + (f" Or pass './{name}', which is here too." if Path(name).exists() else "")
        )
    return path


def _refusal(name: str, looks: str) -> str:
    known = ", ".join([*(n for n, entry in MODELS.items() if entry.kind == "model"), *PUBLISHED])
    return text("no-model", name=repr(name), looks=looks, known=known)
