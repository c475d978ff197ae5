"""A random embedded model with all its adapters, in the layout of the shipped one: the doors are tested without it."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from condit.backbones.mmdit import PRESETS, MMDiT
from condit.cli.options import ModelOptions
from condit.cli.rows import StudioOpener
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.omini import OminiConfig, OminiControl
from condit.encoders.image import TinyImage
from condit.encoders.vae import PatchAutoencoder, PatchAutoencoderConfig
from condit.jobs.plan import Drawer, Place
from condit.weights import catalog
from condit.weights.files import save_tensors
from condit.weights.folders import WEIGHTS
from condit_lab.training.clip_files import make_clip, make_tokenizer, save_clip, save_tokenizer


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Small random values everywhere, so that no part is without effect because it starts at zero."""
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)


def write_part(folder: Path, module: nn.Module, config: dict | None = None) -> None:
    save_tensors(folder / WEIGHTS, module.state_dict())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def write_model(folder: Path, generator: torch.Generator) -> MMDiT:
    """The embedded model's folder with random weights and one block of each kind; returns its backbone."""
    tokenizer = make_tokenizer(["a red apple", "红苹果", "a rocket"], vocab_size=200)
    clip = make_clip(len(tokenizer))
    randomise(clip, generator)
    save_clip(clip, folder / "clip")
    save_tokenizer(tokenizer, folder / "clip")
    canvas = nn.Linear(clip.text_projection.out_features, 64 * 16)
    vae_config = PatchAutoencoderConfig(width=16, depth=1)
    backbone_config = replace(PRESETS["tiny"], num_layers=1, num_single_layers=1)
    vae, backbone = PatchAutoencoder(vae_config), MMDiT(backbone_config)
    for part in (canvas, vae, backbone):
        randomise(part, generator)
    write_part(folder / "canvas", canvas)
    write_part(folder / "vae", vae, asdict(vae_config))
    condit = {"prediction": "x", "shift": 3.0}
    write_part(folder / "transformer", backbone, {**asdict(backbone_config), "condit": condit})
    return backbone


def write_adapter(folder: Path, adapter: IPAdapter | OminiControl, generator: torch.Generator) -> None:
    randomise(adapter, generator)
    save_tensors(folder / "adapter.safetensors", adapter.tensors(), {"condit": adapter.metadata()})


def write_tiny(folder: Path) -> Path:
    """model, style, subject, edges, gray: as under assets/tiny."""
    generator = torch.Generator().manual_seed(0)
    backbone = write_model(folder / "model", generator)
    style = IPConfig(features=TinyImage.features, heads=PRESETS["tiny"].num_attention_heads)
    width = PRESETS["tiny"].num_attention_heads * PRESETS["tiny"].attention_head_dim
    write_adapter(folder / "style", IPAdapter(style, backbone.sites, width), generator)
    for task, annotator in (("subject", None), ("edges", "lines"), ("gray", "gray")):
        delta = (0, -8) if task == "subject" else (0, 0)
        config = OminiConfig(task, delta=delta, independent=True, annotator=annotator)
        write_adapter(folder / task, OminiControl.new(backbone, config), generator)
    return folder


def tiny_entries(folder: Path) -> dict[str, catalog.Entry]:
    """The catalog of this folder's model."""
    kinds: dict[str, catalog.Kind] = {"style": "ip-adapter", "subject": "omini", "edges": "omini", "gray": "omini"}
    entries = {f"tiny/{name}": catalog.Entry(kind, "random", "none", folder / name) for name, kind in kinds.items()}
    return {"tiny": catalog.Entry("model", "random", "none", folder / "model"), **entries}


@pytest.fixture(scope="session")
def random_tiny_folder(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def random_tiny(random_tiny_folder, monkeypatch) -> Path:
    """The catalog holds the random model instead of the embedded one."""
    for name in list(catalog.MODELS):
        monkeypatch.delitem(catalog.MODELS, name)
    for name, entry in tiny_entries(random_tiny_folder).items():
        monkeypatch.setitem(catalog.MODELS, name, entry)
    return random_tiny_folder


@dataclass(frozen=True)
class RandomTiny:
    """Opens the random model in any process, as the worker of a job."""

    folder: Path

    def __call__(self, place: Place) -> Drawer:
        for name in [*catalog.MODELS]:
            del catalog.MODELS[name]
        catalog.MODELS.update(tiny_entries(self.folder))
        return StudioOpener(ModelOptions())(place)
