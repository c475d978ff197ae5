"""rulers/encoders.py: files and folders as their publishers lay them out, against the networks written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from condit.rulers.encoders import CSD_NOTE, convolutions, embedded, last_keys, load_encoder
from condit.weights.catalog import TINY
from condit.weights.deadiff import _tower_to_published
from condit.weights.files import save_tensors

GENERATOR = np.random.default_rng(0)
IMAGE = Image.fromarray(GENERATOR.integers(0, 255, (40, 60, 3), dtype=np.uint8))


def random(module, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return module().eval().requires_grad_(False)


def vgg(widths=(4, 6, 8, 10), plain=True):
    """Two convolutions a block in torchvision's order, or in that of AdaIN's file."""
    layers: list[nn.Module] = [] if plain else [nn.Conv2d(3, 3, 1)]
    before = 3
    for block, width in enumerate(widths):
        if block:
            layers.append(nn.MaxPool2d(2, ceil_mode=not plain))
        for inputs in (before, width):
            convolution = nn.Conv2d(inputs, width, 3, padding=1 if plain else 0)
            layers += [convolution, nn.ReLU()] if plain else [nn.ReflectionPad2d(1), convolution, nn.ReLU()]
        before = width
    return nn.Sequential(*layers)


def alexnet():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 12, 5, padding=2), nn.ReLU()),
        *(nn.MaxPool2d(3, 2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 10, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(10, 10, 3, padding=1), nn.ReLU()),
    )


@pytest.mark.parametrize("make", [vgg, lambda: vgg(plain=False), alexnet], ids=["vgg", "adain", "alexnet"])
def test_a_networks_maps_are_those_of_its_layers_in_a_row(make):
    network = random(make)
    x = torch.rand(1, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    expected, y = {}, x
    for number, layer in enumerate(network):
        y = layer(y)
        if isinstance(layer, nn.ReLU):
            expected[number - 1] = y
    actual = convolutions(network.state_dict(), x)
    assert list(actual) == list(expected)
    for number, y in expected.items():
        torch.testing.assert_close(actual[number][0], y, rtol=1e-5, atol=1e-6)  # padded apart, summed in another order


@pytest.mark.parametrize("plain", [True, False])
def test_vgg_reads_the_first_layer_of_each_block(tmp_path, plain):
    network = random(lambda: vgg(plain=plain))
    prefix = "features." if plain else ""
    torch.save({prefix + n: x for n, x in network.state_dict().items()}, tmp_path / "vgg.pth")
    (encoder,) = load_encoder("vgg", str(tmp_path / "vgg.pth"))
    made = encoder.features(IMAGE)
    assert made["moments"].shape == (8, 10)
    assert made["gram"].shape == (sum(w * (w + 1) // 2 for w in (4, 6, 8, 10)),)
    assert len(encoder.hash) == 16


def test_lpips_is_read_from_one_file_or_two(tmp_path):
    network = random(alexnet)
    lines = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate((8, 12, 16, 10, 10))}
    save_tensors(tmp_path / "a.safetensors", {f"features.{n}": x for n, x in network.state_dict().items()})
    save_tensors(tmp_path / "b.safetensors", lines)
    whole = {f"net.slice1.{n}": x for n, x in network.state_dict().items()} | lines
    save_tensors(tmp_path / "whole" / "lpips.safetensors", whole)
    two, one = (load_encoder("lpips", str(p))[0] for p in (tmp_path, tmp_path / "whole" / "lpips.safetensors"))
    a, b = two.features(IMAGE)["maps"], one.features(IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT))["maps"]
    assert torch.equal(a, one.features(IMAGE)["maps"])
    # Zhang et al., Eq. 1, of the layers written out, in the scaling of their repository.
    total = 0.0
    sides = []
    for image in (IMAGE, IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        x = torch.from_numpy(np.array(image.resize((128, 128), Image.Resampling.LANCZOS))).permute(2, 0, 1) / 127.5 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        sides.append([m for m, _ in convolutions(network.state_dict(), x[None]).values()])
    for left, right, line in zip(*sides, lines.values(), strict=True):
        total += float((line * (F.normalize(left, dim=1) - F.normalize(right, dim=1)) ** 2).sum(1).mean())
    assert float((a - b).square().sum()) == pytest.approx(total, rel=1e-4)


def test_files_of_other_networks_are_refused(tmp_path):
    save_tensors(
        tmp_path / "x.safetensors", {"net.slice1.0.weight": torch.zeros(2, 3, 3, 3), "net.1.filt": torch.zeros(1)}
    )
    for name, text in (("vgg", "no VGG"), ("lpips", "no VGG"), ("csd", "is no CSD")):
        with pytest.raises(ValueError, match=text):
            load_encoder(name, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="expected one of clip, csd"):
        load_encoder("resnet", "x")


def test_csd_is_a_clip_tower_and_one_matrix(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, patch_size=8, image_size=32
    )
    config.hidden_act = "quick_gelu"
    model = random(lambda: CLIPVisionModel(config))
    state = {n.removeprefix("vision_model."): x for n, x in model.state_dict().items()}
    matrix = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    tower = _tower_to_published({n: x for n, x in state.items() if not n.startswith("post_")})
    tower |= {n.replace("post_layernorm", "ln_post"): x for n, x in state.items() if n.startswith("post_")}
    content = {"model_state_dict": {f"module.backbone.{n}": x for n, x in tower.items()}}
    content["model_state_dict"] |= {"module.last_layer_style": matrix, "module.last_layer_content": matrix + 1}
    torch.save(content, tmp_path / "csd.pth")
    (encoder,) = load_encoder("csd", str(tmp_path / "csd.pth"))
    from transformers import CLIPVisionModelWithProjection

    from condit.encoders.image import CLIPImage

    x = CLIPImage(CLIPVisionModelWithProjection(config)).pixels([IMAGE])
    expected = F.normalize(model(x).pooler_output @ matrix, dim=-1)[0]
    torch.testing.assert_close(encoder.features(IMAGE)["style"], expected)
    assert encoder.note == CSD_NOTE and "differ from their paper's" in CSD_NOTE


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_gives_its_token_and_the_keys_of_its_last_layer(tmp_path, kind):
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    config: ViTConfig | Dinov2Config
    if kind == "dino":
        config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=56, image_size=224)
    else:
        config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=56, image_size=224)
    model = random(lambda: ViTModel(config) if isinstance(config, ViTConfig) else Dinov2Model(config))
    keys = []
    layer = [m for n, m in model.named_modules() if n.endswith((".key", ".k_proj"))][-1]
    handle = layer.register_forward_hook(lambda _, __, out: keys.append(out))
    out = model(torch.zeros(1, 3, 224, 224), output_hidden_states=True)
    handle.remove()
    torch.testing.assert_close(last_keys(model, out.hidden_states[-2]), keys[-1])
    model.save_pretrained(tmp_path)
    (encoder,) = load_encoder("dino", str(tmp_path))
    made = encoder.features(IMAGE)
    assert {n: tuple(x.shape) for n, x in made.items()} == {"token": (16,), "structure": (136,), "aligned": (256,)}


def test_a_clip_in_transformers_layout_embeds_pictures_and_words():
    folder = TINY / "model" / "clip"
    (encoder,) = load_encoder("clip", str(folder))
    image = encoder.features(IMAGE)["image"]
    assert image.shape == (256,) and image.norm().item() == pytest.approx(1)
    assert encoder.text is not None and encoder.text("image", ["a fox", "a cat"]).shape == (2, 256)


def test_the_aesthetic_predictor_is_linear_on_the_unit_embedding(tmp_path):
    folder = TINY / "model" / "clip"
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 256, generator=g), torch.randn(1, 8, generator=g)
    save_tensors(
        tmp_path / "p.safetensors",
        {"layers.0.weight": a, "layers.0.bias": torch.ones(8), "layers.2.weight": b, "layers.2.bias": torch.zeros(1)},
    )
    (encoder,) = load_encoder("aesthetic", f"{folder},{tmp_path / 'p.safetensors'}")
    (clip,) = load_encoder("clip", str(folder))
    expected = b @ (a @ clip.features(IMAGE)["image"] + 1)
    torch.testing.assert_close(encoder.features(IMAGE)["score"], expected)


def test_inception_gets_what_its_network_expects(tmp_path):
    class Pool(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    torch.jit.script(Pool()).save(str(tmp_path / "i.pt"))
    (encoder,) = load_encoder("inception", str(tmp_path / "i.pt"))
    white = Image.new("RGB", (50, 40), "white")
    assert encoder.features(white)["pool"].tolist() == pytest.approx([127 / 128] * 3)


def test_embedded_encoders_need_no_weights_and_give_every_feature_of_their_rulers():
    from condit.rulers.measure import RULERS

    made = {e.name: e.features(IMAGE) for e in embedded()}
    for ruler in RULERS.values():
        if ruler.needs in made:
            assert made[ruler.needs][ruler.feature].isfinite().all()
    assert {e.name for e in embedded()} == {"pixels", "judge", "own"}
