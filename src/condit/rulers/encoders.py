"""Encoders of rulers: a picture -> its features by name. The embedded ones need nothing; the others come by path or hub
name. A picture is encoded alone, so that its features do not depend on the others or on where a run was stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from condit.data.files import hash_file
from condit.data.images import to_tensor
from condit.encoders.clip import CONCEPT, STYLE, embed_image, embed_text, style_statistics, token_ids
from condit.rulers import features, pixels
from condit.rulers.judge import JUDGE, WEIGHTS, frame, load_judge, to_input
from condit.weights.catalog import TINY
from condit.weights.files import inner_state, load_strict, read_tensors
from condit.weights.tiny import load_clip

SIDE, NETWORK_SIDE = 128, 256  # pixels: of rulers without a network and LPIPS; of VGG
PIXELS_VERSION = "pixels-1"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class FeatureEncoder:
    """features: an RGB image -> tensors without a batch dimension. text: phrases -> (n, D) in the space of `image`, for
    rulers that compare with words. size: how a picture is resized, for the report."""

    name: str
    hash: str
    size: str
    features: Callable[[Image.Image], dict[str, Tensor]]
    text: Callable[[str, Sequence[str]], Tensor] | None = None  # feature's name, phrases
    note: str = ""


def embedded() -> list[FeatureEncoder]:
    """Those that need no weights but the package's."""
    return [_pixels(), _judge(), _own()]


def load_encoder(name: str, source: str) -> list[FeatureEncoder]:
    """Encoders of a file, folder or hub name. ValueError for an unknown name or weights that do not fit."""
    if name not in LOADERS:
        raise ValueError(f"no ruler reads weights named {name!r}; expected one of {', '.join(LOADERS)}")
    return LOADERS[name](source)


def _pixels() -> FeatureEncoder:
    def encode(image: Image.Image) -> dict[str, Tensor]:
        small = _uint8(image, SIDE)
        array = small[0].permute(1, 2, 0).numpy()
        edges = pixels.edge_feature(small)[0]
        size = torch.tensor([image.width, image.height])
        colours = {"histogram": features.colour_histogram(array), "palette": features.palette(array)}
        return {"size": size, "edges": edges, **colours}

    return FeatureEncoder("pixels", PIXELS_VERSION, f"squashed to {SIDE} px", encode)


def _judge() -> FeatureEncoder:
    judge = load_judge()

    def encode(image: Image.Image) -> dict[str, Tensor]:
        x = to_input(torch.from_numpy(frame(np.array(image)))[None])
        maps = judge.maps(x)
        return {
            "logits": judge(x)[0],
            "gram": features.gram(maps)[0],
            "moments": features.moments(maps)[0],
        }

    return FeatureEncoder("judge", hash_file(JUDGE / WEIGHTS), "ink scaled to 58 of 64 px", encode)


def _own() -> FeatureEncoder:
    folder = TINY / "model" / "clip"
    clip, tokenizer = load_clip(folder)
    parts = {"concept": CONCEPT, "style": STYLE}

    def encode(image: Image.Image) -> dict[str, Tensor]:
        hidden, embedding = embed_image(clip, to_tensor(image, clip.config.vision_config.image_size)[None])
        patches = hidden[4][:, 1:].mT.float()
        made = {name: embedding[0, part].float() for name, part in parts.items()}
        return made | {"middle": style_statistics(hidden)[0], "aligned": features.aligned(patches[..., None])[0]}

    def text(feature: str, phrases: Sequence[str]) -> Tensor:
        ids = token_ids(tokenizer, list(phrases))
        return torch.cat([embed_text(clip, x)[1] for x in ids.split(64)])[:, parts[feature]].float()

    return FeatureEncoder("own", hash_file(folder / "model.safetensors"), "squashed to 128 px", encode, text)


def _clip(source: str) -> list[FeatureEncoder]:
    from condit.weights.clip_towers import load_image_encoder, load_text_tower, weight_file
    from condit.weights.hub_files import local_folder

    folder = local_folder(source)
    tower, words = load_image_encoder(folder), load_text_tower(folder)
    side = tower.size.side

    def encode(image: Image.Image) -> dict[str, Tensor]:
        return {"image": F.normalize(tower.embeds(tower.pixels([image]))[0].float(), dim=-1)}

    def text(feature: str, phrases: Sequence[str]) -> Tensor:
        return torch.cat([words(phrases[i : i + 64]) for i in range(0, len(phrases), 64)]).float()

    size = f"shortest side to {side} px, bicubic, centre cut"
    return [FeatureEncoder("clip", hash_file(weight_file(folder)), size, encode, text, tower.size.describe())]


CSD_NOTE = "The weights that CSD's authors publish differ from their paper's, as their README says: do not compare "
CSD_NOTE += "these figures with published ones."


def _csd(source: str) -> list[FeatureEncoder]:
    """The authors' checkpoint: a CLIP image tower in OpenAI's names and `last_layer_style` (width, 768)."""
    prefix = re.compile(r"^(model_state_dict\.|state_dict\.|module\.)+")
    tensors = {prefix.sub("", name): x.float() for name, x in read_tensors(source).items()}
    matrix, position = tensors.get("last_layer_style"), tensors.get("backbone.positional_embedding")
    if matrix is None or position is None:
        raise ValueError(f"{source} is no CSD: expected backbone.* and last_layer_style, as its authors publish them")
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from condit.encoders.image import CLIPImage
    from condit.weights.deadiff import tower_to_ours

    tower = {n.removeprefix("backbone."): x for n, x in tensors.items() if n.startswith("backbone.")}
    state = tower_to_ours({n: x for n, x in tower.items() if not n.startswith("ln_post.")})
    state |= {n.replace("ln_post", "post_layernorm"): x for n, x in tower.items() if n.startswith("ln_post.")}
    state = {f"vision_model.{n}": x for n, x in state.items()} | {"visual_projection.weight": matrix.T.contiguous()}
    width, patch = tower["conv1.weight"].shape[0], tower["conv1.weight"].shape[-1]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len([n for n in tower if n.endswith("ln_1.weight")]),
        num_attention_heads=max(1, width // 64),
        patch_size=patch,
        image_size=patch * round((position.shape[0] - 1) ** 0.5),
        projection_dim=matrix.shape[1],
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModelWithProjection(config)
    load_strict(model, state, source=source)
    encoder = CLIPImage(model.eval())

    def encode(image: Image.Image) -> dict[str, Tensor]:
        return {"style": F.normalize(encoder.embeds(encoder.pixels([image]))[0], dim=-1)}

    size = f"shortest side to {encoder.size.side} px, bicubic, centre cut"
    return [FeatureEncoder("csd", hash_file(source), size, encode, note=CSD_NOTE)]


def _dino(source: str) -> list[FeatureEncoder]:
    """A ViT in transformers' layout (DINO's, DINOv2's): its class token, and the keys of its last layer."""
    from transformers import AutoModel

    from condit.weights.folders import weight_files
    from condit.weights.hub_files import local_folder

    folder = Path(local_folder(source))
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    side = 224
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def encode(image: Image.Image) -> dict[str, Tensor]:
        x = ((to_tensor(image, side) + 1) / 2 - mean) / std
        out = model(x[None], output_hidden_states=True)
        patches = out.last_hidden_state[:, -((side // model.config.patch_size) ** 2) :]
        keys = last_keys(model, out.hidden_states[-2])[:, -patches.shape[1] :]
        return {
            "token": out.last_hidden_state[0, 0],
            "structure": features.self_similarity(keys)[0],
            "aligned": features.aligned(patches.mT[..., None])[0],
        }

    hashes = "+".join(hash_file(file) for file in weight_files(folder))
    return [FeatureEncoder("dino", hashes, f"squashed to {side} px", encode)]


def last_keys(model: torch.nn.Module, states: Tensor) -> Tensor:
    """The keys (B, T, D) of a ViT's last layer, of the states that enter it."""
    named = dict(model.named_modules())
    projection = [name for name in named if re.search(r"\.(key|k_proj)$", name)][-1]
    layer = re.match(r".*?layers?\.\d+\.", projection)
    norm = next((n for n in ("layernorm_before", "norm1") if layer and layer[0] + n in named), None)
    if layer is None or norm is None:
        raise ValueError(
            f"{type(model).__name__} has no layer with layernorm_before or norm1; expected a ViT or DINOv2"
        )
    return named[projection](named[layer[0] + norm](states))


def convolutions(tensors: Tensors, x: Tensor) -> dict[int, tuple[Tensor, bool]]:
    """The rectified outputs of a VGG's or AlexNet's convolutions by their number in the file, and whether pooling
    follows. tensors: `N.weight`, `N.bias` of torchvision's `features`, or of the normalised VGG of AdaIN, whose first
    convolution is 1 x 1 and whose padding reflects."""
    numbers = sorted(int(name.split(".")[0]) for name in tensors if name.endswith(".weight"))
    plain = tensors[f"{numbers[0]}.weight"].shape[-1] > 1
    large = tensors[f"{numbers[0]}.weight"].shape[-1] == 11  # AlexNet
    maps: dict[int, tuple[Tensor, bool]] = {}
    for place, number in enumerate(numbers):
        weight, bias = tensors[f"{number}.weight"], tensors[f"{number}.bias"]
        side = weight.shape[-1]
        after = numbers[place + 1] - number if place + 1 < len(numbers) else 0
        if side == 1 and place == 0:
            x = F.conv2d(x, weight, bias)
            continue
        border = (2 if side == 11 else side // 2,) * 4
        x = F.pad(x, border, mode="constant" if plain else "reflect")
        x = F.relu(F.conv2d(x, weight, bias, stride=4 if side == 11 else 1))
        pooled = after > (2 if plain else 3)
        maps[number] = x, pooled
        if pooled:
            x = F.max_pool2d(x, 3 if large else 2, 2, ceil_mode=not plain)
    return maps


def _network(tensors: Tensors, source: str) -> dict[str, Tensor]:
    """`N.weight` and `N.bias` of the convolutions in a file of torchvision, of LPIPS or of AdaIN."""
    own = re.compile(r"^(?:features\.|net\.slice\d+\.)?(\d+\.(?:weight|bias))$")
    found = {match[1]: x.float() for name, x in tensors.items() if (match := own.match(name)) and x.ndim in (1, 4)}
    if any(name.endswith(".filt") for name in tensors) or not any(x.ndim == 4 for x in found.values()):
        raise ValueError(f"{source} holds no VGG or AlexNet; expected features.N.weight as torchvision has them")
    return found


def _vgg(source: str) -> list[FeatureEncoder]:
    network = _network(read_tensors(source), source)
    plain = network[min(network, key=lambda n: int(n.split(".")[0]))].shape[-1] > 1
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def encode(image: Image.Image) -> dict[str, Tensor]:
        x = (to_tensor(image, NETWORK_SIDE) + 1) / 2
        maps = list(convolutions(network, ((x - mean) / std if plain else x)[None]).values())
        firsts = [x for place, (x, _) in enumerate(maps) if place == 0 or maps[place - 1][1]][:4]
        return {"gram": features.gram(firsts)[0], "moments": features.moments(firsts)[0]}

    return [FeatureEncoder("vgg", hash_file(source), f"squashed to {NETWORK_SIDE} px", encode)]


def _lpips(source: str) -> list[FeatureEncoder]:
    """A file or folder with torchvision's AlexNet or VGG16 and LPIPS' `linN.model.1.weight`."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".pth", ".safetensors"))
    tensors = {name: x for file in files for name, x in read_tensors(file).items()}
    network = _network(tensors, source)
    lines = [
        tensors[name].float().flatten() for name in sorted(tensors) if re.fullmatch(r"lin\d\.model\.1\.weight", name)
    ]
    if not lines:
        raise ValueError(f"{source} holds no lin0.model.1.weight, which LPIPS publishes beside its network")
    shift, scale = (torch.tensor(x).view(3, 1, 1) for x in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))

    def encode(image: Image.Image) -> dict[str, Tensor]:
        maps = list(convolutions(network, ((to_tensor(image, SIDE) - shift) / scale)[None]).values())
        if len(maps) > len(lines):  # VGG16: the last of each block
            maps = [entry for place, entry in enumerate(maps) if entry[1] or place == len(maps) - 1]
        return {"maps": features.perceptual([x for x, _ in maps], lines)[0]}

    hashes = "+".join(hash_file(file) for file in files)
    return [FeatureEncoder("lpips", hashes, f"squashed to {SIDE} px", encode)]


def _inception(source: str) -> list[FeatureEncoder]:
    """A TorchScript network that maps (B, 3, 299, 299), (x - 128) / 128, to features (B, 2048)."""
    network = torch.jit.load(source, map_location="cpu").eval()

    def encode(image: Image.Image) -> dict[str, Tensor]:
        x = (_uint8(image).float() - 128) / 128
        return {"pool": network(F.interpolate(x, (299, 299), mode="bilinear", align_corners=False))[0].float()}

    return [FeatureEncoder("inception", hash_file(source), "bilinear to 299 px, without antialiasing", encode)]


def _aesthetic(source: str) -> list[FeatureEncoder]:
    """Linear layers in a row, without activations between them, on CLIP's unit embedding: `FOLDER_OF_CLIP,FILE`."""
    folder, _, file = source.rpartition(",")
    if not folder:
        raise ValueError(
            f"aesthetic={source}: expected aesthetic=CLIP,FILE, since the predictor reads CLIP's embedding"
        )
    tensors = inner_state(read_tensors(file))
    names = [
        name for name in sorted(tensors, key=lambda n: [int(x) for x in re.findall(r"\d+", n)]) if "weight" in name
    ]
    (clip,) = _clip(folder)

    def encode(image: Image.Image) -> dict[str, Tensor]:
        x = clip.features(image)["image"]
        for name in names:
            x = F.linear(x, tensors[name].float(), tensors[name.replace("weight", "bias")].float())
        return {"score": x}

    return [FeatureEncoder("aesthetic", f"{clip.hash}+{hash_file(file)}", clip.size, encode)]


def _uint8(image: Image.Image, side: int | None = None) -> Tensor:
    """(1, 3, H, W), squashed to a side where one is given."""
    small = image if side is None else image.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]


LOADERS: Mapping[str, Callable[[str], list[FeatureEncoder]]] = {
    "clip": _clip,
    "csd": _csd,
    "dino": _dino,
    "vgg": _vgg,
    "lpips": _lpips,
    "inception": _inception,
    "aesthetic": _aesthetic,
}
