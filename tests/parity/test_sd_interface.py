"""What users of diffusers expect of a pipeline: schedulers by name, embeddings, weights in prompts, folders."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import condit
from condit.drawing.schedulers import find_sampler, samplers
from condit.drawing.vp import SAMPLERS
from condit.encoders.prompt_weights import has_weights, plain_prompt
from test_sd_diffusers import assert_equal, generators, picture

diffusers: Any = importlib.import_module("diffusers")
HOW = {"guidance_scale": 3.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def folders(make_sd, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sd")
    for kind in ("sd15", "sdxl"):
        make_sd(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("sd15", "sdxl")}


@pytest.mark.parametrize(
    ("name", "cls", "options"),
    [
        ("UniPC", "UniPCMultistepScheduler", {}),
        ("Heun Karras", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("PNDMScheduler", "PNDMScheduler", {"skip_prk_steps": True}),
    ],
)
def test_a_sampler_by_name_equals_diffusers_pipeline_with_its_scheduler(folders, name, cls, options):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folders["sd15"])
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(diffusers, cls).from_config(theirs.scheduler.config, **options)
    ours = condit.load(folders["sd15"])
    wanted = theirs("a red fox", num_inference_steps=4, generator=generators(1), **HOW).images
    found = ours("a red fox", num_inference_steps=4, generator=generators(1), sampler=name, **HOW).images
    assert_equal(found, wanted)


def test_fresh_noise_of_a_scheduler_does_not_depend_on_the_batch(folders):
    pipe = condit.load(folders["sd15"])
    how = {"sampler": "LCM", "num_inference_steps": 3, **HOW}
    both = pipe(["a fox", "a red fox"], seed=4, **how).images
    torch.testing.assert_close(both[1:], pipe("a red fox", seed=5, **how).images, rtol=1e-5, atol=1e-4)


def test_samplers_have_the_names_of_diffusers_and_a1111_and_a_mistyped_one_is_corrected():
    assert find_sampler("DPM++ 2M Karras", SAMPLERS) == "dpm++-karras"
    assert find_sampler("EulerAncestralDiscreteScheduler", SAMPLERS) == "euler-ancestral"
    for row in samplers().values():
        assert row in SAMPLERS if isinstance(row, str) else hasattr(diffusers, row.cls)
    with pytest.raises(ValueError, match="found 'unipcc'. Did you mean 'UniPC'"):
        find_sampler("unipcc", SAMPLERS)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_model_is_saved_in_a_folder_that_both_libraries_load(folders, kind, tmp_path):
    ours = condit.Pipeline.from_pretrained(folders[kind], torch_dtype=torch.float32)
    ours.save_pretrained(tmp_path / "saved")
    wanted = ours("a red fox", seed=0, num_inference_steps=2, **HOW).images
    again = condit.load(tmp_path / "saved")
    assert torch.equal(again("a red fox", seed=0, num_inference_steps=2, **HOW).images, wanted)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    theirs.set_progress_bar_config(disable=True)
    assert_equal(theirs("a red fox", num_inference_steps=2, generator=generators(1, 0), **HOW).images, wanted)
    with pytest.raises(ValueError, match="is not an empty folder"):
        ours.save_pretrained(tmp_path / "saved")


def test_embeddings_of_prompts_replace_the_words(folders):
    ours = condit.load(folders["sdxl"])
    text, none = ours.encode_text(["a red fox"]), ours.encode_text(["in the snow"])
    how = {"seed": 0, "num_inference_steps": 2, **HOW}
    seen: list[list[str]] = []
    found = ours(
        prompt_embeds=text.tokens,
        pooled_prompt_embeds=text.pooled,
        negative_prompt_embeds=none.tokens,
        negative_pooled_prompt_embeds=none.pooled,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(list(tensors)),
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        **how,
    ).images
    assert torch.equal(found, ours("a red fox", "in the snow", **how).images)
    assert seen == [["latents", "prompt_embeds"]] * 2
    with pytest.raises(ValueError, match="Give a prompt or its embeddings"):
        ours("a fox", prompt_embeds=text.tokens)
    with pytest.raises(ValueError, match="has 'noise'; a callback is given any of latents"):
        ours("a fox", callback_on_step_end_tensor_inputs=["noise"])


def test_images_as_numpy_are_those_of_pil(folders):
    ours = condit.load(folders["sd15"])
    how = {"seed": 0, "num_inference_steps": 2}
    array = ours("a red fox", output_type="np", **how).images
    assert array.dtype == np.float32 and array.shape == (1, 32, 32, 3)
    assert np.abs(array[0] * 255 - np.asarray(ours("a red fox", **how).images[0])).max() <= 0.51


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_weights_in_a_prompt_are_compels_and_weight_1_is_no_weight(folders, kind):
    ours = condit.load(folders[kind])
    plain, one = ours.encode_text(["a red fox"]), ours.encode_text(["a (red)1.0 fox"])
    torch.testing.assert_close(one.tokens, plain.tokens, rtol=1e-5, atol=1e-5)
    heavy, a1111 = ours.encode_text(["a (red)1.5 fox"]), ours.encode_text(["a (red:1.5) fox"])
    assert torch.equal(heavy.tokens, a1111.tokens) and not torch.equal(heavy.tokens, plain.tokens)
    assert torch.equal(heavy.pooled, plain.pooled)
    both = ours.encode_text(["in the snow", "a (red)1.5 fox"])
    torch.testing.assert_close(both.tokens[1:], heavy.tokens, rtol=1e-5, atol=1e-5)


def test_brackets_without_a_weight_are_text():
    for prompt in ("a cat (small)", "c++ code", "a well-known fox", "(a, b)"):
        assert not has_weights(prompt)
    assert plain_prompt("a (red:1.5) (big)++ fox (wet)0.5") == "a red big fox wet"


@pytest.mark.parametrize("offload", ["encoders", "blocks"])
def test_stable_diffusion_offloads_with_the_same_result(folders, offload):
    how = {"seed": 0, "num_inference_steps": 2, "image": picture(), **HOW}
    for kind in ("sd15", "sdxl"):
        wanted = condit.load(folders[kind])("a red fox", "in the snow", **how).images
        pipe = condit.load(folders[kind], offload=offload)
        for _ in range(2):  # every call makes copies of the encoders
            assert torch.equal(pipe("a red fox", "in the snow", **how).images, wanted)


def test_stable_diffusion_is_quantised(folders):
    pipe = condit.load(folders["sd15"], quantize="float8")
    kinds = {p.dtype for name, p in pipe.backbone.named_parameters() if "attn1.to_q" in name}
    assert kinds == {torch.float8_e4m3fn}
    plain = condit.load(folders["sd15"])("a red fox", seed=0, num_inference_steps=2, **HOW).images
    found = pipe("a red fox", seed=0, num_inference_steps=2, **HOW).images
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.1
    with pytest.raises(ValueError, match="Quantised weights cannot be saved"):
        pipe.save_pretrained("nowhere")


def test_an_adapter_is_saved_and_loaded(make_pipe, make_omini, tmp_path, pictures):
    pipe = make_pipe()
    adapter = make_omini(pipe, task="custom", delta=(0, 1))
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        adapter.save(path)
        again = condit.OminiControl.load(path, pipe)
        assert again.config == adapter.config
        controls = [[one.control(pictures(1)[0])] for one in (adapter, again)]
        a, b = (pipe("a fox", controls=each, seed=0, output_type="latent").images for each in controls)
        assert torch.equal(a, b)


def test_a_prompt_beyond_the_token_limit_is_named_in_a_warning(folders, caplog):
    pipe = condit.load(folders["sd15"])
    pipe.encode_text("fox " * 20)  # more bytes than 77, fewer tokens
    assert not caplog.records
    pipe.encode_text(["a fox", "fox " * 100])
    assert [r.getMessage()[:68] for r in caplog.records] == [
        "The text encoder reads only the first 77 tokens of this prompt: 'fox"
    ]
