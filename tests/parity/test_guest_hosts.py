"""What users of diffusers do with a pipeline, on a guest: guidance that ends half-way, step caches, a stop from
outside, distilled and pruned networks, a guidance of its own for the references."""

import copy
import importlib
from typing import Any

import pytest
import torch

import lora_layouts as layouts
from condit.controls.style_lora import StyleLoRA
from condit.interop import attach
from condit.weights.files import save_tensors
from sd_guests import GIVEN, PROMPTS, Present, close, draw, every_kind, noise

diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for


def without_guidance(cut: bool = True):
    """diffusers' guide: a callback that ends the guidance after the first step."""

    def callback(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
        if index > 0:
            return {}
        pipe._guidance_scale = 0.0
        return {name: value.chunk(2)[-1] for name, value in values.items() if name != "latents"} if cut else {}

    return callback


def ended(kind: str, **how: Any) -> dict[str, Any]:
    names = ["latents", "prompt_embeds", *(["add_text_embeds", "add_time_ids"] if kind == "sdxl" else [])]
    return {"callback_on_step_end": without_guidance(**how), "callback_on_step_end_tensor_inputs": names}


@every_kind
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_guidance_that_ends_half_way_leaves_the_prompts_alone(sd_pairs, pictures, kind, prompts):
    """The rows are then the prompts', not a negative prompt's and a prompt's."""
    pair, start = sd_pairs(kind), noise(len(prompts))
    guest, how = attach(pair.theirs), ended(kind)
    close(draw(guest, prompts, controls=[Present()], **how), draw(pair.theirs, prompts, **how))
    references = pictures(len(prompts))
    actual = draw(guest, prompts, controls=pair.controls(guest, "global", references), latents=start, **how)
    for i, prompt in enumerate(prompts):
        controls = pair.controls(guest, "global", references[i])
        alone = draw(guest, prompt, controls=controls, latents=start[i : i + 1], **how)
        close(actual[i : i + 1], alone)
        assert (alone - draw(guest, prompt, controls=controls, latents=start[i : i + 1])).abs().max() > 1e-2


def test_a_callback_that_ends_the_guidance_and_keeps_the_negative_rows_is_refused(sd_pairs, pictures):
    pair = sd_pairs("sd15")
    guest = attach(pair.theirs)
    with pytest.raises(ValueError, match="prompt_embeds has 4 rows for 2 latents.*last half"):
        draw(guest, PROMPTS, controls=pair.controls(guest, "global", pictures(1)[0]), **ended("sd15", cut=False))


@every_kind
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_references_have_a_guidance_of_their_own(sd_pairs, pictures, kind, guidance):
    pair, how = sd_pairs(kind), {"guidance_scale": guidance, "image_guidance_scale": 2.5}
    guest = attach(pair.theirs)
    actual = draw(guest, PROMPTS, controls=pair.controls(guest, "all", pictures(2)), **how)
    # condit's own run needs the negative prompt's side, which cancels at scale 1.
    close(actual, draw(pair.ours, PROMPTS, controls=pair.controls(pair.ours, "all", pictures(2)), **how))
    assert torch.equal(draw(guest, image_guidance_scale=2.5), draw(pair.theirs))
    if kind == "sd15":
        with pytest.raises(ValueError, match="guidance_rescale has no meaning"):
            draw(guest, image_guidance_scale=2.5, guidance_rescale=0.7)


def test_a_stop_from_outside_reaches_a_guests_run(sd_pairs):
    """Another thread sets it on the pipeline; so does this callback."""
    pipe = sd_pairs("sd15").theirs
    seen = []

    def stop(_: Any, index: int, timestep: Any, values: dict) -> dict:
        seen.append(index)
        pipe._interrupt = True
        return {}

    for controls in ([], [Present()]):
        draw(attach(pipe), controls=controls, callback_on_step_end=stop)
    assert seen == [0, 0]
    assert not draw(attach(pipe)).equal(draw(attach(pipe), callback_on_step_end=stop))


class Counting(torch.nn.Module):
    """Reads a pipeline's timestep in each step, as a cache of diffusers does."""

    def __init__(self, pipe: Any):
        super().__init__()
        self.seen = []
        pipe.transformer.register_forward_pre_hook(lambda *_: self.seen.append(pipe.current_timestep))


def test_the_timestep_is_read_on_the_pipeline_itself(make_flux):
    from condit.backbones.mmdit import MMDiTConfig

    pipe = make_flux(tiny_flux(MMDiTConfig), dynamic=False)
    counting = Counting(pipe)
    how = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 8}
    attach(pipe)("a red fox", **how)
    assert [t is not None for t in counting.seen] == [True, True] and counting.seen[0] > counting.seen[1]


def tiny_flux(config: Any) -> Any:
    sizes: dict[str, Any] = {"in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10}
    return config(**sizes, guidance_embeds=False, axes_dims_rope=(4, 6, 6))


@pytest.mark.parametrize("cache", ["FirstBlockCacheConfig", "PyramidAttentionBroadcastConfig", "FasterCacheConfig"])
def test_a_step_cache_is_refused_beside_controls_and_runs_without(make_flux, cache):
    from condit.backbones.mmdit import MMDiTConfig

    pipe = make_flux(tiny_flux(MMDiTConfig), dynamic=False)
    given: dict[str, Any] = {}
    if cache != "FirstBlockCacheConfig":
        given = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: pipe.current_timestep}
    if cache == "FasterCacheConfig":
        given["is_guidance_distilled"] = True
    pipe.transformer.enable_cache(getattr(diffusers, cache)(**given))
    start = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    how = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 8}
    guest, cached = attach(pipe), pipe("a red fox", latents=start, **how).images
    assert torch.equal(guest("a red fox", latents=start, **how).images, cached)
    with pytest.raises(ValueError, match="step cache.*pipe.transformer.disable_cache"):
        guest("a red fox", controls=[Present()], latents=start, **how)
    pipe.transformer.disable_cache()
    plain = pipe("a red fox", latents=start, **how).images
    close(guest("a red fox", controls=[Present()], latents=start, **how).images, plain)


def test_convolutions_and_doras_of_a_style_act_on_a_guest(sd_pairs, tmp_path):
    """The layers are borrowed: their weights are diffusers' own."""
    pair = sd_pairs("sd15")
    parts = layouts.parts_of(pair.ours.backbone, layouts.LINEAR + layouts.LOCON)
    file = save_tensors(tmp_path / "style.safetensors", layouts.dora(parts, pair.ours.backbone))
    pipes = attach(pair.theirs), pair.ours
    actual, expected = (draw(pipe, controls=[StyleLoRA.load(file, pipe).control(0.5)]) for pipe in pipes)
    close(actual, expected)
    assert (actual - draw(pair.theirs)).abs().max() > 1e-2


# Networks that attach used to refuse before any control was given

PRUNED: dict[str, dict[str, Any]] = {
    "BK-SDM, without a middle": {"mid_block_type": None},
    "a middle without attention": {"mid_block_type": "UNetMidBlock2D"},
    "LCM, with the guidance scale as an input": {"time_cond_proj_dim": 8},
    "SSD-1B, with depths of its own on the way up": {
        "transformer_layers_per_block": [1, 2],
        "reverse_transformer_layers_per_block": [[2, 1], 1],
    },
    "widths of text by level": {"cross_attention_dim": [10, 10]},
}


@pytest.mark.parametrize("name", PRUNED)
def test_distilled_and_pruned_networks_take_controls(make_sd, name):
    pipe = make_sd("sdxl" if "SSD" in name else "sd15", **PRUNED[name])
    guest = attach(pipe)
    plain = draw(pipe)
    assert torch.equal(draw(guest), plain)
    close(draw(guest, controls=[Present()]), plain)


def test_sdxls_refiner_takes_controls(make_sd):
    """Its aesthetic score stands for the target size: five numbers, not six."""
    base = make_sd("sdxl", cross_attention_dim=10, projection_class_embeddings_input_dim=32)
    parts = {name: part for name, part in base.components.items() if part is not None}
    parts |= {"text_encoder": None, "tokenizer": None}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def call(host: Any, **given: Any) -> torch.Tensor:
        start = torch.Generator().manual_seed(4)
        return host("a red fox", image=image, strength=0.8, generator=start, **GIVEN, **given).images

    close(call(attach(pipe), controls=[Present()]), call(pipe))


def test_a_network_of_another_kind_runs_without_controls_only(make_sd):
    pipe = copy.copy(make_sd("sd15", class_embed_type="timestep"))
    guest = attach(pipe)
    with pytest.raises(ValueError, match="class_embed_type = 'timestep'"):
        guest("a red fox", controls=[Present()], **GIVEN)
