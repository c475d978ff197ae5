"""LoRA files as other tools write them: small random tensors under the published names and in the published shapes."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condit.backbones.unet import UNet
from condit.weights.flux_names import DOUBLE, WHOLE
from single_files import original_unet_name

LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
LOCON = (
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
    *("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
)
ADDED = ("add_embedding.linear_1", "add_embedding.linear_2")  # SDXL's sizes
RANK = 2


@dataclass(frozen=True)
class Part:
    """A module's update: A (r, in) or (r, in, h, w) and B (out, r), without alpha."""

    a: Tensor
    b: Tensor

    @property
    def up(self) -> Tensor:
        """B as tools keep it for a convolution."""
        return self.b if self.a.ndim == 2 else self.b[..., None, None]


Parts = dict[str, Part]


def parts_of(model: nn.Module, endings: Iterable[str]) -> Parts:
    """Random updates of the modules whose path ends so, in the shapes of their weights."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and any(path == e or path.endswith("." + e) for e in endings):
            a, b = torch.randn(RANK, *weight.shape[1:], generator=g), torch.randn(len(weight), RANK, generator=g)
            tensors[path] = Part(0.3 * a, 0.3 * b)
    return tensors


def diffusers(parts: Parts, prefix: str = "unet.") -> dict[str, Tensor]:
    return {
        f"{prefix}{path}.lora_{side}.weight": tensor
        for path, part in parts.items()
        for side, tensor in (("A", part.a), ("B", part.up))
    }


def processors(parts: Parts) -> dict[str, Tensor]:
    """diffusers in 2023: attention processors keep the LoRA of an attention."""
    tensors = {}
    for path, part in parts.items():
        module, _, name = path.removesuffix(".0").rpartition(".")
        attention = module.endswith(("attn1", "attn2"))
        key = f"unet.{module}.processor.{name}_lora" if attention else f"unet.{path}.lora"
        tensors |= {f"{key}.down.weight": part.a, f"{key}.up.weight": part.up}
    return tensors


def kohya(
    parts: Parts, spell: Callable[[str], str] = lambda path: path, prefix: str = "lora_unet_"
) -> dict[str, Tensor]:
    """With an alpha of 2 r, and B half as large, so that the update is the same."""
    tensors = {}
    for path, part in parts.items():
        name = prefix + spell(path).replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": part.a, f"{name}.lora_up.weight": part.up / 2}
        tensors[f"{name}.alpha"] = torch.tensor(2.0 * RANK)
    return tensors


def authors(unet: UNet) -> Callable[[str], str]:
    """diffusers' path -> the authors' (SDXL, kohya)."""
    return lambda path: original_unet_name(f"{path}.weight", unet.config).removesuffix(".weight")


def comfy(parts: Parts) -> dict[str, Tensor]:
    """ComfyUI's extracted LoRAs: alpha, and differences of biases."""
    g = torch.Generator().manual_seed(2)
    biases = {
        f"lora_unet_{p.replace('.', '_')}.diff_b": torch.randn(len(part.b), generator=g) for p, part in parts.items()
    }
    return kohya(parts) | biases


def tucker(parts: Parts) -> dict[str, Tensor]:
    """LyCORIS with use_tucker: A of a 3 x 3 convolution as a product of two."""
    tensors = kohya(parts)
    g = torch.Generator().manual_seed(3)
    for name in [n for n in tensors if n.endswith("lora_down.weight") and tensors[n].shape[2:] == (3, 3)]:
        tensors[name.replace("lora_down", "lora_mid")] = torch.randn(RANK, RANK, 3, 3, generator=g)
        tensors[name] = tensors[name][..., 1:2, 1:2].clone()
    return tensors


def dora(parts: Parts, model: nn.Module) -> dict[str, Tensor]:
    """kohya's names with LyCORIS's dora_scale over outputs: the norms of the rows, all 1.5 times too large."""
    tensors = kohya(parts)
    for path in parts:
        weight = model.get_parameter(f"{path}.weight")
        norm = 1.5 * weight.flatten(1).norm(dim=1)
        tensors[f"lora_unet_{path.replace('.', '_')}.dora_scale"] = norm.reshape(-1, *[1] * (weight.ndim - 1))
    return tensors


# FLUX.1, of one block each in the authors' widths: diffusers' converters have them written down


def flux_shapes(width: int) -> dict[str, tuple[int, int]]:
    """Modules of FLUX.1 in its authors' names -> (rows, columns)."""
    tensors = {}
    for name in DOUBLE:
        dotted = re.sub(r"^(img|txt)_(attn|mlp|mod)_", r"\1_\2.", name)
        rows = 6 if name.endswith("mod_lin") else 3 if name.endswith("qkv") else 4 if name.endswith("mlp_0") else 1
        tensors[f"double_blocks.0.{dotted}"] = rows * width, (4 if name.endswith("mlp_2") else 1) * width
    tensors |= {"single_blocks.0.linear1": (7 * width, width), "single_blocks.0.linear2": (width, 5 * width)}
    tensors["single_blocks.0.modulation.lin"] = 3 * width, width
    for name, columns in (("img_in", 64), ("txt_in", 4096), ("final_layer.adaLN_modulation.1", width)):
        tensors[name] = (2 * width if "final" in name else width), columns
    for name, columns in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        tensors |= {f"{name}.in_layer": (width, columns), f"{name}.out_layer": (width, width)}
    return tensors | {"final_layer.linear": (64, width)}


def random_pairs(shapes: dict[str, tuple[int, int]], a: str, b: str, spell: Callable[[str], str]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{spell(name)}.{a}.weight"] = torch.randn(1, columns, generator=g)
        tensors[f"{spell(name)}.{b}.weight"] = torch.randn(rows, 1, generator=g)
    return tensors


def xlabs(width: int) -> dict[str, Tensor]:
    shapes = {
        f"double_blocks.0.processor.{kind}_lora{n}": ((3 if kind == "qkv" else 1) * width, width)
        for kind in ("qkv", "proj")
        for n in (1, 2)
    }
    shapes["single_blocks.0.processor.qkv_lora"] = 3 * width, width
    shapes["single_blocks.0.processor.proj_lora"] = width, 5 * width
    return random_pairs(shapes, "down", "up", str)


def one_trainer(width: int) -> dict[str, Tensor]:
    """diffusers' paths with underscores, also outside the blocks."""
    paths = [f"transformer_blocks.0.{p}" for p in ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "attn.to_add_out")]
    paths += ["single_transformer_blocks.0.attn.to_v", *(path for path in WHOLE.values())]
    shapes = {f"lora_transformer_{path.replace('.', '_')}": (width, width) for path in paths}
    tensors = random_pairs(shapes, "lora_down", "lora_up", str)
    return tensors | {f"{name}.alpha": torch.tensor(0.5) for name in shapes}
