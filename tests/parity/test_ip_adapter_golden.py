"""IP-Adapter on UNets against the official classes; golden/ip_adapter holds what they computed. Tolerances are those of
its README: tokens 1e-5, one UNet call 2e-5, trajectories 1e-4 on values up to 30."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from ip_golden import GOLDEN, GoldenPipe, close, golden_pipe, unet_of
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from condit.controls.control import region_levels, region_mask
from condit.controls.ip_adapter import IPAdapter, IPConfig, IPReference
from condit.controls.ip_projectors import ImageProjection

VARIANTS = [("sd15", "global"), ("sd15", "plus"), ("sd15", "full"), ("sdxl", "global"), ("sdxl", "plus")]
every_variant = pytest.mark.parametrize(("tag", "variant"), VARIANTS)
TRAJECTORIES = [v for v in VARIANTS if v[1] != "full"]
TOKENS, CALL, TRAJECTORY = 1e-5, 2e-5, 1e-4


@cache
def adapter_of(tag: str, variant: str, ending: str = "safetensors") -> IPAdapter:
    pipe = golden_pipe(tag)
    return IPAdapter.load(pipe.file(f"{variant}_adapter.{ending}"), pipe, head_dim=8)


def features(pipe: GoldenPipe, variant: str) -> tuple[Tensor, Tensor]:
    """What the projector reads of the fixture's pictures, and of none."""
    given = pipe.tensors("inputs")
    if variant == "global":
        return given["clip_image_embeds"], torch.zeros_like(given["clip_image_embeds"])
    return given["clip_hidden_penultimate"], given["clip_hidden_penultimate_zero_image"]


def reference(tag: str, variant: str, strength: float = 1.0) -> IPReference:
    pipe, adapter = golden_pipe(tag), adapter_of(tag, variant)
    given, empty = features(pipe, variant)
    with torch.no_grad():
        return adapter.reference(given, strength, empty=empty)


@pytest.mark.parametrize("tag", ["sd15", "sdxl"])
def test_without_an_adapter_it_is_the_unet(tag):
    pipe = golden_pipe(tag)
    given = pipe.tensors("inputs")
    close(pipe.predict(given), given["noise_pred/no_adapter"], CALL)


@pytest.mark.parametrize("tag", ["sd15", "sdxl"])
def test_the_image_encoder_gives_the_official_features(tag):
    pipe = golden_pipe(tag)
    given, encoder = pipe.tensors("inputs"), pipe.image
    assert encoder is not None
    close(encoder.embeds(given["pixel_values"]), given["clip_image_embeds"], TOKENS)
    close(encoder.hidden(given["pixel_values"]), given["clip_hidden_penultimate"], TOKENS)
    zeros = encoder.hidden(encoder.zeros()).expand(2, -1, -1)
    close(zeros, given["clip_hidden_penultimate_zero_image"], TOKENS)


@every_variant
def test_tokens_with_and_without_a_reference_are_the_official_ones(tag, variant):
    pipe, adapter = golden_pipe(tag), adapter_of(tag, variant)
    expected = pipe.tensors(variant)
    for given, name in zip(features(pipe, variant), ("tokens", "uncond_tokens"), strict=True):
        close(adapter.tokens(given), expected[name], TOKENS)


@every_variant
@pytest.mark.parametrize("scale", ["0", "0.5", "1", "-0.3"])
def test_one_call_at_each_scale_is_the_official_one(tag, variant, scale):
    pipe = golden_pipe(tag)
    expected, given = pipe.tensors(variant), pipe.tensors("inputs")
    found = pipe.predict(given, reference(tag, variant, float(scale)))
    close(found, expected[f"noise_pred/scale_{scale}"], CALL)
    if f"noise_pred_v1/scale_{scale}" in expected:  # its processors write the softmax out
        close(found, expected[f"noise_pred_v1/scale_{scale}"], CALL)
    if scale == "0":
        assert torch.equal(found, pipe.predict(given))


@every_variant
def test_the_unconditional_tokens_are_the_negative_reference(tag, variant):
    pipe = golden_pipe(tag)
    found = pipe.predict(pipe.tensors("inputs"), reference(tag, variant).negative())
    close(found, pipe.tensors(variant)["noise_pred/scale_1_uncond_tokens"], CALL)


@every_variant
def test_every_layer_is_the_official_one_under_its_published_number(tag, variant):
    pipe, adapter = golden_pipe(tag), adapter_of(tag, variant)
    expected, text = pipe.tensors(variant), pipe.tensors("inputs")["text_embeds"]
    paths = {n.split("/")[1] for n in expected if n.startswith("layer/")}
    numbers = pipe.config["variants"][variant]["attn_processor_index"]
    assert {f"{layer.path}.processor": layer.number for layer in adapter.layers} == numbers
    assert paths <= set(adapter.sites) and (paths or variant == "full")  # of "full" no layer was kept
    (acting,) = pipe.at_work(reference(tag, variant, 0.5), 2)
    for path in sorted(paths):
        attention, layer = pipe.backbone.get_submodule(path), f"layer/{path}"
        k, v = (x.transpose(1, 2).flatten(2) for x in acting.kv[path])  # type: ignore[attr-defined]
        close(k, expected[f"{layer}/k_ip"], TOKENS)
        close(v, expected[f"{layer}/v_ip"], TOKENS)
        context = frame_of(pipe, text, (acting,))
        with torch.no_grad():
            close(attention(expected[f"{layer}/hidden_in"], context), expected[f"{layer}/out_scale_0.5"], CALL)


def frame_of(pipe: GoldenPipe, text: Tensor, controls: tuple):
    from condit.backbones.unet import UNetContext

    return UNetContext(torch.zeros(2, 1), pipe.backbone.text_keys_values(text), None, controls)


@pytest.mark.parametrize(("tag", "variant"), TRAJECTORIES)
def test_the_official_generate_is_reproduced_from_the_picture_to_the_last_latent(tag, variant):
    pipe, adapter = golden_pipe(tag), adapter_of(tag, variant)
    given = pipe.tensors(f"{variant}_ddim")
    picture = Image.fromarray(given["image_uint8"].numpy())
    assert pipe.image is not None
    close(pipe.image.pixels([picture]), given["pixel_values"], TOKENS)
    control = adapter.control(picture, strength=pipe.config["ddim"]["adapter_scale"])
    found = adapter.features([picture])
    close(adapter.tokens(found), given["image_prompt_embeds"], TOKENS)
    close(adapter.tokens(adapter.nothing(found)), given["uncond_image_prompt_embeds"], TOKENS)
    steps = pipe.ddim(given, control)
    for i, x in enumerate(steps):
        close(x, given[f"latents/step_{i + 1}"], TRAJECTORY)
    close(steps[-1], given["final"], TRAJECTORY)


@pytest.mark.parametrize("tag", ["sd15", "sdxl"])
def test_a_bin_file_is_the_safetensors_file(tag):
    one, other = (adapter_of(tag, "global", ending).state_dict() for ending in ("bin", "safetensors"))
    assert list(one) == list(other) and all(torch.equal(t, other[n]) for n, t in one.items())


@every_variant
def test_what_was_read_is_saved_under_the_same_names(tag, variant):
    file = load_file(golden_pipe(tag).file(f"{variant}_adapter.safetensors"))
    saved = adapter_of(tag, variant).tensors()
    assert saved.keys() == file.keys() and all(torch.equal(t, file[n]) for n, t in saved.items())


# Regions and several references, as diffusers computes them


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def regional(request):
    """The pipe, the fixture, the scales, adapters a and b."""
    pipe = golden_pipe(request.param)
    t = pipe.tensors("regional_diffusers")
    scales = json.loads(pipe.file("regional_diffusers_config.json").read_text())["scales"]
    second = {n.removeprefix("adapter_b/"): x for n, x in t.items() if n.startswith("adapter_b/")}
    other = IPAdapter.load(pipe.file("global_adapter.safetensors"), pipe)
    assert {n: x.shape for n, x in other.tensors().items()} == {n: x.shape for n, x in second.items()}
    other.load_state_dict(second)
    return pipe, t, scales, adapter_of(request.param, "global"), other


def test_one_image(regional):
    pipe, t, scales, a, _ = regional
    found = pipe.predict(t, a.control(embeds=t["image_embeds_a"][:, 0], strength=scales["one_image"]))
    close(found, t["one_image"], CALL)


def test_two_images_side_by_side_in_one_softmax(regional):
    pipe, t, scales, a, _ = regional
    two = a.control(embeds=t["image_embeds_a"], strength=scales["two_images_token_concat"])
    close(pipe.predict(t, two), t["two_images_token_concat"], CALL)


def test_two_images_by_the_mean_of_their_features(regional):
    pipe, t, scales, a, _ = regional
    two = a.control(embeds=t["image_embeds_a"], strength=scales["two_images_embed_mean"], combine="mean")
    close(pipe.predict(t, two), t["two_images_embed_mean"], CALL)


def test_two_images_each_in_its_region_at_its_own_weight(regional):
    pipe, t, scales, a, _ = regional
    parts = masked(a, t["image_embeds_a"], t["masks_a"], scales["two_images_two_masks"])
    close(pipe.predict(t, *parts), t["two_images_two_masks"], CALL)


def test_two_adapters_add_up_and_one_at_scale_zero_is_absent(regional):
    pipe, t, scales, a, b = regional
    for name in ("two_adapters", "two_adapters_b_off"):
        first, second = scales[name]
        given = [
            a.control(embeds=t["image_embeds_a"][:, :1], strength=first),
            b.control(embeds=t["image_embeds_b"], strength=second),
        ]
        close(pipe.predict(t, *given), t[name], CALL)


def test_two_adapters_in_regions(regional):
    pipe, t, scales, a, b = regional
    first, second = scales["two_adapters_masked"]
    parts = masked(a, t["image_embeds_a"], t["masks_a"], first) + masked(b, t["image_embeds_b"], t["mask_b"], second)
    close(pipe.predict(t, *parts), t["two_adapters_masked"], CALL)


def masked(adapter: IPAdapter, embeds: Tensor, masks: Tensor, scales: list[float]) -> list[IPReference]:
    """A control for each image, in its region; bicubic as in diffusers."""
    with torch.no_grad():
        return [
            adapter.reference(embeds[:, i], scale, mask=masks[:, i], mask_mode="bicubic")
            for i, scale in enumerate(scales)
        ]


def test_masks_come_to_each_level_as_diffusers_has_them(regional):
    _, t, *_ = regional
    mask = t["masks_a"][:, 0]
    levels = region_levels(mask, (16, 16), "bicubic")
    for name, expected in t.items():
        if name.startswith("mask_downsampled/"):
            n = int(name.rpartition("_")[2])
            close(levels[n].flatten(), expected, 1e-6)
            side = round(n**0.5)
            assert torch.equal(levels[n], region_mask(mask, (side, side), mode="bicubic"))


# Training


def test_one_training_step_is_the_official_one():
    folder = GOLDEN / "ip_adapter"
    config, t = json.loads((folder / "train_config.json").read_text()), load_file(folder / "train_step.safetensors")
    unet = unet_of(config["unet"], folder / "train_unet.safetensors")
    sizes = config["clip_projection_dim"], unet.config.cross_attention_dim, config["num_tokens"]
    adapter = IPAdapter.new(unet, IPConfig(sizes[0], sizes[2], sizes[1]), projector=ImageProjection(*sizes))
    names = [n.removeprefix("init/") for n in t if n.startswith("init/")]
    assert set(names) == set(adapter.state_dict())
    for name in names:
        if name.startswith("ip_adapter."):  # copies of the text's K, V
            assert torch.equal(adapter.state_dict()[name], t[f"init/{name}"])
    adapter.load_state_dict({n: t[f"init/{n}"] for n in names})
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, weight_decay=0.01)
    kept = (1 - t["drop_image_embed"])[:, None]
    pipe = GoldenPipe("train", folder, config, unet, None)
    controls = pipe.at_work(adapter.reference(t["image_embeds"] * kept), 4)
    found = unet(t["noisy_latents"], t["timesteps"].float(), t["text_embeds"], controls=controls)
    close(found, t["noise_pred"], CALL)
    loss = (found - t["noise"]).square().mean()
    close(loss, t["loss"], 1e-6)
    loss.backward()
    assert all(p.grad is None for p in unet.parameters())
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        # A thousandth of a step of AdamW at worst.
        close(parameter.grad, t[f"grad/{name}"], 1e-6)
    optimizer.step()
    for name, parameter in adapter.named_parameters():
        close(parameter.detach(), t[f"after/{name}"], 2e-6)


def test_pictures_of_any_shape_come_to_the_encoders_square():
    encoder = golden_pipe("sd15").image
    assert encoder is not None
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    crop, squash, pad = (encoder.pixels([picture], fit) for fit in ("crop", "squash", "pad"))  # type: ignore[arg-type]
    assert crop.shape == squash.shape == pad.shape == (1, 3, 28, 28)
    assert not torch.equal(crop, squash) and not torch.equal(squash, pad)
    with pytest.raises(ValueError, match="fit must be"):
        encoder.pixels([picture], "stretch")  # type: ignore[arg-type]
