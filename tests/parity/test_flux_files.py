"""FLUX.1 single files in their authors' names, against diffusers' converters and pipelines of tiny random models."""

import json
import re
import shutil
import types
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import condit
from condit.backbones.mmdit import PRESETS, MMDiT, MMDiTConfig
from condit.weights import flux
from condit.weights.files import save_tensors
from condit.weights.vae import autoencoder_tensors
from condit.weights.vae import vae_names as vae_to_diffusers

TINY = MMDiTConfig(
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)


def diffusers_converter(width: int):
    """diffusers' own conversion, in whose code FLUX.1's width is a constant."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert

    constants = tuple(width if c == 3072 else c for c in convert.__code__.co_consts)
    return types.FunctionType(convert.__code__.replace(co_consts=constants), convert.__globals__)


def random_state(config: MMDiTConfig) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=g) for name, t in MMDiT(config).state_dict().items()}


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_the_rules_equal_diffusers_converter_and_undo_the_rules_backwards(authors, guidance):
    ours = random_state(replace(TINY, guidance_embeds=guidance))
    given = authors(ours)
    expected = diffusers_converter(TINY.dim)(dict(given))
    actual = flux.to_diffusers(given, TINY.dim, "file")
    assert actual.keys() == expected.keys() == ours.keys()
    assert all(torch.equal(actual[n], expected[n]) and torch.equal(actual[n], ours[n]) for n in ours)
    # Without the other order of the head's modulation the test would not see it.
    swapped = given["final_layer.adaLN_modulation.1.weight"]
    assert not torch.equal(actual["norm_out.linear.weight"], swapped)


def test_flux_dev_in_its_authors_names_covers_all_1160_tensors(authors):
    with torch.device("meta"):
        wanted = MMDiT(PRESETS["flux-dev"]).state_dict()
    given = authors(wanted)
    assert len(given) == 780 and sum(n.startswith("double_blocks.18.") for n in given) == 24
    actual = flux.flux_transformer(given, "file")  # type: ignore[arg-type]
    assert actual.config == replace(PRESETS["flux-dev"], out_channels=64) and len(actual.state_dict()) == 1160
    assert {n: t.shape for n, t in actual.state_dict().items()} == {n: t.shape for n, t in wanted.items()}


@pytest.mark.parametrize("name", ["flux-schnell", "flux-fill"])
def test_sizes_of_the_other_published_transformers_are_read_off_their_shapes(authors, name):
    with torch.device("meta"):
        given = authors(MMDiT(PRESETS[name]).state_dict())
    actual = flux.infer_config(given, "file")  # type: ignore[arg-type]
    assert replace(actual, out_channels=None) == replace(PRESETS[name], out_channels=None)
    assert actual.out_channels == 64


# Through condit.load


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_flux, authors):
    """A folder of diffusers, its pipeline, and the transformer's tensors in the authors' names."""
    pipe = make_flux(TINY, dynamic=True)
    folder = tmp_path_factory.mktemp("flux") / "components"
    pipe.save_pretrained(folder)
    return pipe, folder, authors(dict(pipe.transformer.state_dict()))


GIVEN = {"height": 24, "width": 32, "num_inference_steps": 2, "output_type": "pt", "seed": 0}


def draw(source, **more) -> Tensor:
    return condit.load(source, dtype=torch.float32, **more)("a red fox", **GIVEN).images


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_generates_what_its_folder_generates(saved, tmp_path, prefix):
    _, folder, tensors = saved
    named = {prefix + n: t for n, t in tensors.items()}
    others = {"text_encoders.t5xxl.transformer.shared.weight": torch.zeros(2)} if prefix else {}
    save_tensors(tmp_path / "flux1.safetensors", named | others)
    generated = draw(tmp_path / "flux1.safetensors", components=folder)
    assert torch.equal(generated, draw(folder))


def test_a_single_file_finds_its_other_parts_in_its_folder(saved, tmp_path):
    _, folder, tensors = saved
    for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae", "transformer", "scheduler"):
        (tmp_path / part).symlink_to(folder / part)
    save_tensors(tmp_path / "flux1-dev.safetensors", tensors)
    pipe = condit.load(tmp_path / "flux1-dev.safetensors", dtype=torch.float32)
    assert pipe.name == "flux1-dev" and torch.equal(pipe("a red fox", **GIVEN).images, draw(folder))


def authors_vae(vae) -> dict[str, Tensor]:
    """The autoencoder in its authors' names."""
    levels, tensors = len(vae.config.block_out_channels), {}
    for name, t in vae.state_dict().items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        name = name.replace("down_blocks", "down").replace("downsamplers.0", "downsample")
        name = name.replace("upsamplers.0", "upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace(".resnets.", ".block.").replace("mid_block.attentions.0", "mid.attn_1")
        name = re.sub(r"attn_1\.to_([qkv])", r"attn_1.\1", name).replace("to_out.0", "proj_out")
        name = name.replace("group_norm", "norm")
        tensors[name] = t[:, :, None, None] if re.search(r"attn_1\.([qkv]|proj_out)\.weight", name) else t
    return tensors


def test_the_autoencoders_rules_equal_diffusers_converter(saved):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = saved[0].vae
    given = authors_vae(vae)
    expected = convert_ldm_vae_checkpoint(dict(given), vae.config)
    actual = vae_to_diffusers(autoencoder_tensors({f"vae.{n}": t for n, t in given.items()}))
    assert actual.keys() == expected.keys() == vae.state_dict().keys()
    assert all(torch.equal(actual[n], expected[n]) and torch.equal(actual[n], t) for n, t in vae.state_dict().items())


@pytest.mark.parametrize("inside", [True, False], ids=["in the checkpoint", "ae.safetensors"])
def test_the_autoencoder_may_come_in_its_authors_names(saved, tmp_path, inside):
    pipe, folder, tensors = saved
    for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer", "scheduler"):
        (tmp_path / part).symlink_to(folder / part)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text((folder / "vae" / "config.json").read_text())
    vae = authors_vae(pipe.vae)
    if inside:
        tensors = {f"model.diffusion_model.{n}": t for n, t in tensors.items()}
        tensors |= {f"first_stage_model.{n}": t for n, t in vae.items()}
    else:
        save_tensors(tmp_path / "ae.safetensors", vae)
    save_tensors(tmp_path / "flux1.safetensors", tensors)
    # Weights that lie elsewhere in memory may be summed in another order.
    torch.testing.assert_close(draw(tmp_path / "flux1.safetensors"), draw(folder), rtol=0, atol=1e-5)


# Errors


def test_missing_components_are_named_before_the_file_is_read(saved, tmp_path):
    save_tensors(tmp_path / "flux1.safetensors", saved[2])
    with pytest.raises(
        ValueError, match=r"lacks text_encoder, tokenizer, text_encoder_2, tokenizer_2, vae .*components="
    ):
        condit.load(tmp_path / "flux1.safetensors")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_that_lacks_a_tensor_is_refused_and_not_filled_with_random_numbers(saved, tmp_path, part):
    for entry in saved[1].iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / part).unlink()
    shutil.copytree(saved[1] / part, tmp_path / part)
    file = tmp_path / part / "model.safetensors"
    tensors = load_file(file)
    lacking = next(name for name in tensors if name.endswith(("q_proj.weight", "q.weight")))
    save_tensors(file, {name: tensor for name, tensor in tensors.items() if name != lacking})
    with pytest.raises(ValueError, match=rf"{part} does not fit.*1 missing \(first: .*\.q"):
        condit.load(tmp_path)


def test_a_file_of_another_flux_raises_with_what_differs(saved, tmp_path):
    _, folder, tensors = saved
    schnell = {n: t for n, t in tensors.items() if not n.startswith("guidance_in.")}
    save_tensors(tmp_path / "schnell.safetensors", schnell)
    with pytest.raises(ValueError, match="guidance_embeds.*True.*another FLUX.1"):
        condit.load(tmp_path / "schnell.safetensors", components=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("img_in.weight"), "no whole transformer of FLUX.1: 'img_in.weight' is missing"),
        (lambda t: t.pop("double_blocks.1.img_attn.proj.bias"), "1 missing .first: transformer_blocks.1.attn.to_out.0"),
        (lambda t: t.update({"controlnet_in.weight": torch.zeros(2, 2)}), "no 'controlnet_in.weight'"),
        (lambda t: t.update({"double_blocks.0.img_foo.weight": torch.zeros(2)}), "double blocks have no 'img_foo'"),
        (lambda t: t.update({"img_in.scale_weight": torch.zeros(1)}), "scales of their own"),
    ],
)
def test_a_file_that_is_not_a_whole_flux_raises_with_its_tensors(saved, tmp_path, change, message):
    tensors = dict(saved[2])
    change(tensors)
    save_tensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        condit.load(tmp_path / "bad.safetensors", components=saved[1])


def test_heads_that_are_not_fluxs_need_a_configuration(saved):
    with pytest.raises(ValueError, match="heads of 16 channels.*axes_dims_rope"):
        flux.infer_config(saved[2], "file")  # type: ignore[arg-type]


def test_components_together_with_a_whole_folder_raise(saved):
    with pytest.raises(ValueError, match="components= is for a single file"):
        condit.load(saved[1], components=saved[1])


# The schedule


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 1.4, "base_image_seq_len": 16},
        {"use_dynamic_shifting": True, "max_image_seq_len": 300, "time_shift_type": "linear"},
        {"use_dynamic_shifting": False, "shift": 2.5},
    ],
)
def test_a_folders_own_shifts_draw_as_in_diffusers(saved, tmp_path, settings):
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    pipe, folder, _ = saved
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    for part in folder.iterdir():
        if part.name != "scheduler":
            (tmp_path / part.name).symlink_to(part)
    scheduler.save_pretrained(tmp_path / "scheduler")
    theirs = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 48, 8, generator=torch.Generator().manual_seed(0))
    given = {"height": 24, "width": 32, "num_inference_steps": 3, "latents": noise, "output_type": "latent"}
    expected = theirs("a red fox", **given).images
    actual = condit.load(tmp_path, dtype=torch.float32)("a red fox", **given).images
    # diffusers forms sigmas in float32 where ours are rounded from float64.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    standard = condit.load(folder, dtype=torch.float32)("a red fox", **given).images
    assert (actual - standard).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["use_karras_sigmas", "shift_terminal"])
def test_schedules_that_condit_does_not_have_are_refused(tmp_path, name):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({name: 0.1}))
    with pytest.raises(ValueError, match=f"{name}.*interop.attach"):
        flux.read_schedule(tmp_path, dev=True)


def test_without_a_scheduler_the_kind_of_model_says_the_schedule(tmp_path):
    assert flux.read_schedule(tmp_path, dev=True)[0] is None and flux.read_schedule(tmp_path, dev=False)[0] == 1.0
    assert flux.read_schedule(tmp_path, dev=True)[2] == 0.0


def test_stochastic_sampling_of_a_scheduler_is_eta_1(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"stochastic_sampling": True}))
    assert flux.read_schedule(tmp_path, dev=True)[2] == 1.0


def test_the_configuration_of_diffusers_and_of_a_single_file_are_one(saved):
    actual = flux.infer_config(saved[2], "file", TINY)  # type: ignore[arg-type]
    assert asdict(actual) == asdict(TINY)


# Memory


def test_load_offloads_and_quantises(saved):
    _, folder, _ = saved
    plain = draw(folder)
    assert torch.equal(draw(folder, offload="blocks"), plain) and torch.equal(draw(folder, offload="encoders"), plain)
    small = condit.load(folder, dtype=torch.float32, quantize="float8")
    drift = (small("a red fox", **GIVEN).images - plain).abs().mean()
    assert 0 < drift < 0.1
    with pytest.raises(ImportError, match="torchao"):
        condit.load(folder, quantize="int8")
