"""IP-Adapter on transformers, FLUX (XLabs) and SD 3.5 (InstantX), against diffusers; golden/ip_adapter holds tensors
that diffusers wrote."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ip_golden import GOLDEN, close
from safetensors.torch import load_file, save_file
from torch import Tensor

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.controls.control import Run, Step
from condit.controls.ip_adapter import IPAdapter
from condit.controls.ip_projectors import SD3Adapter
from condit.encoders.image import CLIPImage
from condit.nn.attention import split_heads
from condit.nn.streams import Stream
from condit.weights.catalog import read_adapter
from condit.weights.ip_files import read_layout
from condit.weights.ip_load import sd3_adapter as read_sd3_adapter

FOLDER = GOLDEN / "ip_adapter"
FLUX, SD3 = (load_file(FOLDER / f"dit_{name}.safetensors") for name in ("flux", "sd3"))


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@dataclass
class FluxPipe:
    backbone: MMDiT
    name: str = "tiny-flux"
    image: CLIPImage | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def adapter_file(self, source, method: str):
        return read_adapter(source, method)


@pytest.fixture(scope="module")
def flux() -> FluxPipe:
    fields = json.loads((FOLDER / "dit_flux_config.json").read_text())["transformer"]
    fields["axes_dims_rope"] = tuple(fields["axes_dims_rope"])
    model = MMDiT(MMDiTConfig(**fields))
    model.load_state_dict(part(FLUX, "weights/"), strict=True)
    return FluxPipe(model.eval().requires_grad_(False))


class Encoder(CLIPImage):
    """Stands for ViT-L/14: the fixture begins with its embeddings."""

    def __init__(self, width: int):
        from condit.encoders.image import EncoderSize

        torch.nn.Module.__init__(self)
        self.size = EncoderSize(16, width, 5, 28)

    def embeds(self, pixels: Tensor) -> Tensor:
        return torch.zeros(1, self.size.projection)

    def black(self) -> Tensor:
        return torch.zeros(1, 3, 28, 28)


@pytest.mark.parametrize("spelling", ["diffusers", "xlabs"])
@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_xlabs_flux_adapter_is_read_by_its_tensors_and_equals_diffusers(flux, tmp_path: Path, spelling, scale):
    file = part(FLUX, "adapter/")
    if spelling == "xlabs":
        file = {xlabs(name): t for name, t in file.items()}
    save_file(file, tmp_path / "adapter.safetensors")
    adapter = IPAdapter.load(tmp_path / "adapter.safetensors", flux, image_encoder=Encoder(9))
    assert adapter.config.form == "residual" and adapter.config.tokens == 4
    close(adapter.tokens(FLUX["image_embeds"]), FLUX["image_tokens"].flatten(1, 2), 1e-5)
    control = adapter.control(embeds=FLUX["image_embeds"], strength=scale)
    run = Run(flux.backbone, 2, (4, 6), FLUX["pooled"], FLUX["guidance"], 8)
    acting = control.prepare(run).at(Step(0, 1, 1.0))
    controls = () if acting is None else (acting,)
    assert bool(controls) == (scale != 0)
    image = Stream(FLUX["hidden_states"], FLUX["img_ids"], FLUX["timestep"], FLUX["pooled"], FLUX["guidance"])
    with torch.no_grad():
        found = flux.backbone(image, FLUX["encoder_hidden_states"], FLUX["txt_ids"], controls=controls)
    close(found, FLUX[f"out/scale_{scale}"], 2e-5)


def xlabs(name: str) -> str:
    """The name as XLabs publishes it."""
    for part in ("k", "v"):
        if f".to_{part}_ip." in name:
            number, ending = name.split(".")[1], name.split(".")[-1]
            return f"double_blocks.{number}.processor.ip_adapter_double_stream_{part}_proj.{ending}"
    return name.replace("image_proj.", "ip_adapter_proj_model.")


def official(name: str) -> str:
    """The name as InstantX publishes SD 3.5's projector."""
    for theirs, ours in (
        ("0.norm1", "ln0"), ("0.norm2", "ln1"), ("0.to_out", "attn.to_out.0"), ("0.to_q", "attn.to_q"),
        ("0.to_kv", "attn.to_kv"), ("1.0", "adaln_norm"), ("1.1", "ff.net.0.proj"), ("1.3", "ff.net.2"),
        ("2.1", "adaln_proj"),
    ):  # fmt: skip
        if name.startswith("image_proj.layers.") and f".{ours}." in name:
            return name.replace(f".{ours}.", f".{theirs}.")
    return name


def sd3_adapter(spelling: str = "diffusers") -> SD3Adapter:
    file = part(SD3, "adapter_diffusers/")
    if spelling == "instantx":
        assert any(official(n) != n for n in file)
        file = {official(n): t for n, t in file.items()}
    config = json.loads((FOLDER / "dit_sd3_config.json").read_text())
    head_dim = config["transformer"]["attention_head_dim"]
    adapter = read_sd3_adapter(read_layout(file, "file"), head_dim, config["image_proj"]["dim_head"])
    return adapter.eval().requires_grad_(False)


@pytest.mark.parametrize("spelling", ["diffusers", "instantx"])
def test_sd3_tokens_and_clock_of_each_rows_time_are_those_of_diffusers(spelling):
    adapter = sd3_adapter(spelling)
    tokens, clock = adapter.tokens(SD3["image_hidden"], SD3["timestep"])
    close(tokens, SD3["image_tokens"], 1e-5)
    close(clock, SD3["time_emb"], 1e-5)
    assert set(adapter.state_dict()) == set(part(SD3, "adapter_diffusers/"))


class Branched:
    """diffusers' joint attention, to which our branch is added in front of the output projection."""

    def __init__(self, branch, added, strength: float):
        self.branch, self.added, self.strength = branch, added, torch.tensor(strength)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        def qkv(x, linears, norms):
            q, k, v = (split_heads(linear(x), attn.heads) for linear in linears)
            return norms[0](q), norms[1](k), v, q, k

        image = qkv(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        linears = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        text = qkv(encoder_hidden_states, linears, (attn.norm_added_q, attn.norm_added_k))
        q, k, v = (torch.cat([i, t], 2) for i, t in zip(image[:3], text[:3], strict=True))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        n = hidden_states.shape[1]
        own = out[:, :n] + self.branch(image[3], image[4], image[2], self.added, self.strength)
        rest = out[:, n:] if attn.context_pre_only else attn.to_add_out(out[:, n:])
        return attn.to_out[0](own), rest


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_the_sd3_branch_in_diffusers_transformer_equals_diffusers_own(scale):
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    config = json.loads((FOLDER / "dit_sd3_config.json").read_text())["transformer"]
    model = SD3Transformer2DModel(**config).eval().requires_grad_(False)
    model.load_state_dict(part(SD3, "weights/"), strict=True)
    given = {n: SD3[n] for n in ("hidden_states", "encoder_hidden_states", "timestep")}

    def predict() -> Tensor:
        with torch.no_grad():
            return model(**given, pooled_projections=SD3["pooled"], return_dict=False)[0]

    close(predict(), SD3["out/no_adapter"], 2e-5)
    adapter = sd3_adapter()
    tokens, clock = adapter.tokens(SD3["image_hidden"], SD3["timestep"])
    for i, block in enumerate(model.transformer_blocks):
        branch = adapter.ip_adapter[str(i)]
        block.attn.set_processor(Branched(branch, branch.keys_values(tokens, clock), float(scale)))  # type: ignore[operator]
    close(predict(), SD3[f"out/scale_{scale}"], 2e-5)
