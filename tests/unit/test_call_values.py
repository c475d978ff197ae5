"""Values of a call that are no numbers, no text or out of range: a clear error before anything is computed."""

import logging
import pickle

import numpy as np
import pytest
import torch

from condit.controls.control import When
from condit.controls.omini_tasks import OminiConfig
from condit.drawing.pipeline import Pipeline
from condit.drawing.settings import Settings, image_generators, prompt_list
from condit.encoders.prompts import warn_syntax
from condit.nn.lora import LoRA


@pytest.fixture(scope="module")
def pipe(make_pipe) -> Pipeline:
    return make_pipe()


@pytest.mark.parametrize("name", ["guidance_scale", "image_guidance_scale", "guidance_rescale", "eta", "strength"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", [3.0]])
def test_a_real_setting_that_is_no_finite_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number; found"):
        Settings(**{name: value})


@pytest.mark.parametrize("name", ["height", "width", "num_inference_steps", "clip_skip"])
@pytest.mark.parametrize("value", ["64", 64.0, True])
def test_a_whole_setting_that_is_none_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number; found {value!r}"):
        Settings(**{name: value})


def test_numbers_of_numpy_and_torch_become_pythons():
    given: dict = {"height": np.int64(64), "guidance_scale": np.float32(3), "eta": torch.tensor(0.5)}
    values = Settings(**given, copies=np.int32(2))  # type: ignore[arg-type]
    kinds = [type(x) for x in (values.height, values.guidance_scale, values.eta, values.copies)]
    assert kinds == [int, float, float, int]


def test_nan_is_refused_before_the_network_runs(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "predictor", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match="guidance_scale must be a finite number; found nan"):
        pipe("a", guidance_scale=float("nan"))
    with pytest.raises(ValueError, match="num_images_per_prompt must be a whole number; found '2'"):
        pipe("a", num_images_per_prompt="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive multiples of 8 up to 4096; found 0 x 48"):
        pipe("a", height=0)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), 3])
def test_a_seed_may_be_any_whole_number(seed):
    seeds, generators = image_generators(2, seed, None)
    assert seeds == [3, 4] and [type(s) for s in seeds] == [int, int]
    assert [g.initial_seed() for g in generators] == [3, 4]


def test_seed_minus_one_is_random_and_recorded(pipe):
    results = [pipe("a", seed=-1, num_inference_steps=1, output_type="pt") for _ in range(2)]
    assert results[0].seeds != results[1].seeds and min(results[0].seeds) >= 0
    again = pipe("a", seed=results[0].recipe["seeds"][0], num_inference_steps=1, output_type="pt")
    assert torch.equal(again.images, results[0].images)


@pytest.mark.parametrize("seed", ["3", 1.5, -2, 2**70])
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed must be a whole number from 0 .* or -1 for a random one; found"):
        image_generators(1, seed, None)


def test_a_prompt_of_undecodable_bytes_is_refused(pipe, pictures):
    with pytest.raises(ValueError, match=r"not Unicode text; found 'a \\udcff'"):
        prompt_list("a \udcff")
    with pytest.raises(ValueError, match="not Unicode text"):
        pipe.edit(pictures(1)[0], "a", "\udcff")


@pytest.mark.parametrize("name", ["height", "width", "num_inference_steps"])
@pytest.mark.parametrize("value", [torch.zeros(2, 2), "64", 1.5])
def test_sizes_and_steps_of_an_edit_that_are_no_whole_numbers_are_refused(pipe, pictures, name, value):
    for work in (pipe.invert, pipe.edit):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            work(pictures(1)[0], *(["a"] if work == pipe.invert else ["a", "b"]), **{name: value})


@pytest.mark.parametrize("value", ["0.5", [0.5], None, float("nan")])
def test_strengths_that_are_no_numbers_are_refused(pipe, make_ip, make_omini, pictures, value):
    picture = pictures(1)[0]
    with pytest.raises(ValueError, match="strength"):
        make_omini(pipe).control(picture, value)
    if value != [0.5]:  # a list has one for each image
        with pytest.raises(ValueError, match="strength"):
            make_ip(pipe).control(picture, value)
    with pytest.raises(ValueError, match="start of when must be a finite number"):
        When("a")  # type: ignore[arg-type]


def test_an_unknown_annotator_and_a_rank_of_0_are_refused(pipe, make_omini, pictures):
    with pytest.raises(ValueError, match="annotator must be one of 'edges', .*; found 'sketch'"):
        make_omini(pipe, annotator="sketch").control(pictures(1)[0])
    tensors = {"transformer.a.lora_A.weight": torch.zeros(0, 4), "transformer.a.lora_B.weight": torch.zeros(4, 0)}
    with pytest.raises(ValueError, match=r"a: expected .* rank >= 1; found A \(0, 4\)"):
        LoRA.from_tensors(tensors)
    with pytest.raises(ValueError, match="rank .* must be at least 1; found 0"):
        OminiConfig(rank=0)


@pytest.mark.parametrize("kind", ["ip", "omini", "independent"])
def test_a_float32_control_acts_on_a_pipeline_that_was_cast_to_bfloat16(kind, make_pipe, make_ip, make_omini, pictures):
    pipe = make_pipe()
    adapter = make_ip(pipe) if kind == "ip" else make_omini(pipe, independent=kind == "independent")
    control, given = adapter.control(pictures(1)[0]), {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    exact, plain = pipe("a", controls=[control], **given).images, pipe("a", **given).images
    pipe.backbone.to(torch.bfloat16)
    cast = pipe("a", controls=[control], **given).images
    assert (cast - exact).abs().mean() < 0.3 * (plain - exact).abs().mean()


@pytest.mark.parametrize("prompt", ["a (fox:1.3)", "a ((fox))", "[[fox]] on grass", "a [fox:wolf:0.5]"])
def test_prompt_weights_that_are_read_as_text_are_named(pipe, prompt, caplog):
    pipe.encode_text(prompt)
    assert "reads no prompt weights" in caplog.text and "fox" in caplog.text
    caplog.clear()
    warn_syntax([prompt], weights=True)
    assert bool(caplog.text) == (prompt != "a (fox:1.3)")


def test_plain_brackets_are_text_and_a_lora_in_a_prompt_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        warn_syntax(["a fox (red) [old] at 12:30 (see: 3 dogs)", "ratio (16:9)"[:5]])
        assert not caplog.text
        warn_syntax(["a fox <lora:pixel:0.8>"])
    assert "'<lora:pixel:0.8>' is read as text" in caplog.text


def test_used_pipelines_adapters_and_controls_can_be_pickled(
    make_pipe, make_latent, make_deadiff, make_omini, pictures
):
    picture, given = pictures(1)[0], {"num_inference_steps": 1, "seed": 0, "output_type": "pt"}
    latent, flow = make_latent("sd15"), make_pipe()
    for pipe, adapter in ((latent, make_deadiff(latent)), (flow, make_omini(flow))):
        images = pipe("a", controls=[adapter.control(picture)], **given).images
        pipe, adapter, control = pickle.loads(pickle.dumps((pipe, adapter, adapter.control(picture))))
        assert torch.equal(pipe("a", controls=[control], **given).images, images)
        assert torch.equal(pipe("a", controls=[adapter.control(picture)], **given).images, images)
