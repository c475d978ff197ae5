"""controls/omini.py: adapters and what they place into the sequence. Numbers: tests/parity/test_omini_golden.py."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from condit.controls.control import Step, When
from condit.controls.omini import OminiConfig, OminiControl
from condit.controls.omini_tasks import TASKS, omini_targets
from condit.data.annotators import canny
from condit.data.images import to_tensor
from condit.drawing.pipeline import Pipeline
from condit.weights.files import save_tensors
from condit_lab.parity.omini_official import official_guidance
from omini_runs import latents, run_of

LEFT = np.zeros((32, 48), np.uint8)
LEFT[:, :24] = 255


@pytest.fixture(scope="module")
def pipe(make_pipe) -> Pipeline:
    return make_pipe(guidance_embeds=True, distilled=True)


def test_the_official_targets_are_adapted_and_nothing_else(pipe):
    assert set(omini_targets(pipe.backbone)) == {
        "x_embedder",
        *(
            f"transformer_blocks.{i}.{part}"
            for i in range(2)
            for part in ("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2")
        ),
        *(
            f"single_transformer_blocks.{i}.{part}"
            for i in range(2)
            for part in ("norm.linear", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
        ),
    }


def test_a_fresh_adapter_starts_as_the_plain_model(pipe):
    fresh = OminiControl.new(pipe.backbone, OminiConfig())
    assert all(not b.any() for b in fresh.lora.b.values())


def test_a_backbone_without_streams_is_refused():
    with pytest.raises(ValueError, match="needs a backbone with streams; Identity has none"):
        OminiControl.new(nn.Identity(), OminiConfig())


def test_a_condition_has_clock_zero_guidance_one_and_the_prompts_pooled_text(pipe, make_omini, pictures):
    run = run_of(pipe, batch=2)
    (stream,) = make_omini(pipe, delta=(0, -6)).control(pictures(2)).prepare(run).streams()
    assert not stream.timestep.any() and stream.guidance is not None and (stream.guidance == 1).all()
    assert torch.equal(stream.pooled, run.pooled)
    assert stream.ids[0].tolist() == [0, 0, -6]
    assert stream.tokens.shape == (2, 24, 20) and not stream.tokens[..., 16:].any()  # no canvas in a condition


def test_joint_conditions_see_the_image_and_independent_ones_themselves_through_a_cache(pipe, make_omini, pictures):
    joint = make_omini(pipe).control(pictures(1)).prepare(run_of(pipe))
    assert joint.streams()[0].sees == "main" and joint.memory is None
    cached = make_omini(pipe, independent=True).control(pictures(1)).prepare(run_of(pipe))
    assert cached.streams() == () and cached.memory is not None
    assert list(cached.memory) == [site.path for site in pipe.backbone.sites]
    assert {k.shape for k, _ in cached.memory.values()} == {(1, 2, 24, 16)}


def test_strength_is_the_log_of_a_factor_and_one_needs_no_bias(pipe, make_omini, pictures):
    adapter = make_omini(pipe)
    (half,) = adapter.control(pictures(1), strength=0.5).prepare(run_of(pipe)).at(Step(0, 4, 1.0)).streams()
    assert float(half.log_weight.exp()) == pytest.approx(0.5)
    (one,) = adapter.control(pictures(1)).prepare(run_of(pipe)).at(Step(0, 4, 1.0)).streams()
    assert one.log_weight is None


def test_a_curve_over_the_schedule_changes_the_factor(pipe, make_omini, pictures):
    control = make_omini(pipe).control(pictures(1), strength=2.0, when=When(curve=lambda progress: 1 - progress))
    weight = control.prepare(run_of(pipe)).at(Step(3, 4, 0.25)).log_weight
    assert float(weight.exp()) == pytest.approx(0.5)


def test_the_empty_reference_of_guidance_is_an_encoded_black_image(pipe, make_omini, pictures):
    negative = make_omini(pipe).control(pictures(2)).negative()
    black, _ = pipe.encode_condition(-torch.ones(1, 3, 32, 48))
    assert torch.equal(negative.tokens, black)


def test_a_compact_condition_is_encoded_small_and_spread_over_the_image(pipe, make_omini, pictures):
    control = make_omini(pipe, scale=2).control(pictures(1))
    assert control.tokens.shape == (1, 6, 16) and control.black.shape == (1, 6, 16)
    assert control.ids[:, 1].unique().tolist() == [0.5, 2.5] and control.ids[:, 2].max() == 4.5


def test_a_negative_strength_is_refused(pipe, make_omini, pictures):
    with pytest.raises(ValueError, match=">= 0; found -1"):
        make_omini(pipe).control(pictures(1), strength=-1)


def test_an_unbound_adapter_tells_how_to_bind_it(pipe, pictures):
    with pytest.raises(ValueError, match=r"OminiControl.load\(name, pipe\)"):
        OminiControl.new(pipe.backbone, OminiConfig()).control(pictures(1))


def test_a_saved_adapter_comes_back_with_its_weights_and_settings(pipe, make_omini, tmp_path):
    config = {"delta": (0, -6), "independent": True, "annotator": "gray", "task": "x", "rank": 3}
    adapter = make_omini(pipe, **config)
    path = save_tensors(tmp_path / "a.safetensors", adapter.tensors(), {"condit": adapter.metadata()})
    again = OminiControl.load(path, pipe)
    assert again.config == adapter.config
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in adapter.tensors().items())
    assert not any(p.requires_grad for p in again.parameters())


def test_a_lora_of_another_model_raises_with_its_first_unknown_layer(pipe, make_omini, tmp_path):
    tensors = make_omini(pipe).tensors()
    strange = {name.replace("x_embedder", "y_embedder"): tensor for name, tensor in tensors.items()}
    wide = tensors | {"transformer.x_embedder.lora_A.weight": torch.zeros(4, 64)}
    for number, (given, message) in enumerate(
        [(strange, "'y_embedder'.*random has none"), (wide, r"'x_embedder' of shape \(32, 64\).*\(32, 20\)")]
    ):
        path = save_tensors(tmp_path / f"{number}.safetensors", given)
        with pytest.raises(ValueError, match=message):
            OminiControl.load(path, pipe, "subject")


def test_the_recipe_of_a_control_says_how_to_make_it_again(pipe, make_omini, pictures):
    control = make_omini(pipe).control(pictures(2), strength=0.5, when=When(0, 0.5))
    described = control.describe()
    assert (described["method"], described["strength"], described["when"]) == ("OminiControl", 0.5, [0, 0.5])
    assert len(described["reference"]) == 2


# Sizes and parts of a picture


def test_a_condition_is_read_at_the_size_of_the_argument(pipe, make_omini, pictures):
    control = make_omini(pipe).control(pictures(1), size=(16, 40))
    assert control.ids[-1].tolist() == [0, 1, 4] and control.tokens.shape == (1, 10, 16)
    assert control.describe()["size"] == [16, 40]
    with pytest.raises(ValueError, match="size must be positive multiples of 8 up to 4096; found 16 x 42"):
        make_omini(pipe).control(pictures(1), size=(16, 42))


@pytest.mark.parametrize("config", [{}, {"scale": 2.0}, {"annotator": "gray"}])
def test_an_aligned_condition_has_the_size_that_the_call_generates(make_pipe, make_omini, pictures, config):
    pipe = make_pipe(canvas=False)
    adapter, given = make_omini(pipe, **config), {"prompt": "a fox", "height": 48, "width": 64}
    fixed = latents(pipe, [adapter.control(pictures(1), size=(48, 64))], **given)
    assert torch.equal(latents(pipe, [adapter.control(pictures(1))], **given), fixed)
    small = latents(pipe, [adapter.control(pictures(1), size=pipe.size)], **given)
    assert not torch.allclose(small, fixed, atol=1e-3)


def test_at_another_size_the_empty_reference_is_black_and_posterior_generates_repeat(make_pipe, make_omini, pictures):
    pipe = make_pipe(canvas=False)
    adapter = make_omini(pipe)
    control = adapter.control(pictures(1)).sampled(torch.Generator().manual_seed(3))
    at = control.sized((48, 64), pipe)
    assert len(at.ids) == 48 and torch.equal(control.sized((48, 64), pipe).tokens, at.tokens)
    black = adapter.control(-np.zeros((8, 8, 3), np.uint8), size=(48, 64))
    assert torch.equal(control.negative().sized((48, 64), pipe).tokens, black.black)
    assert control.sized(control.size, pipe) is control


def test_a_condition_that_is_not_aligned_keeps_its_size(make_pipe, make_omini, pictures):
    for how in ({"delta": (0, -6)}, {"delta": "left"}):
        pipe = make_pipe(canvas=False)
        control = make_omini(pipe, **how).control(pictures(1))
        assert control.sized((48, 64), pipe) is control


def test_an_image_to_fill_follows_the_call_too(make_pipe, make_omini, pictures):
    pipe = make_pipe(canvas=False)
    control = make_omini(pipe).control(pictures(1), fill=LEFT)
    assert latents(pipe, [control], height=64, width=96).shape == (1, 96, 16)
    assert int(control.sized((64, 96), pipe).whole.generated.sum()) == 48


def test_an_image_to_fill_must_have_the_size_of_the_call(make_pipe, make_omini, pictures):
    pipe = make_pipe(canvas=False)
    control = make_omini(pipe).control(pictures(1), fill=LEFT, size=(16, 48))
    with pytest.raises(ValueError, match="image to fill has 2 x 6 cells, this call generates 4 x 6"):
        latents(pipe, [control])
    assert latents(pipe, [control], height=16).shape == (1, 12, 16)


def test_two_images_cannot_be_filled_at_once(pipe, make_omini, pictures):
    control = make_omini(pipe).control(pictures(1), fill=LEFT)
    with pytest.raises(ValueError, match="2 controls fill a part of the image; at most one can"):
        latents(pipe, [control, control])


@pytest.mark.parametrize("config", [{"delta": (0, -6)}, {"scale": 2}, {"annotator": "gray"}])
def test_only_an_adapter_of_the_image_itself_can_fill(pipe, make_omini, pictures, config):
    with pytest.raises(ValueError, match="fill keeps cells of the image in place"):
        make_omini(pipe, **config).control(pictures(1), fill=LEFT)


def test_the_empty_reference_of_a_part_is_black_in_the_same_cells(pipe, make_omini, pictures):
    control = make_omini(pipe).control(pictures(1), fill=LEFT)
    black, _ = pipe.encode_condition(-torch.ones(1, 3, 32, 48))
    negative = control.negative()
    assert torch.equal(negative.tokens, black[:, ~control.whole.generated.flatten()])
    assert torch.equal(negative.ids, control.ids) and control.describe()["fill"][0]["sha256"]


# The official image guidance


@pytest.mark.parametrize("how", [{"strength": 0.5}, {"when": When(0, 0.5)}, {"mask": LEFT}])
def test_the_official_guidance_knows_no_strength_schedule_or_mask(pipe, make_omini, pictures, how):
    with pytest.raises(ValueError, match="supports neither strength, schedule nor mask"):
        official_guidance([make_omini(pipe).control(pictures(1), **how)])


def test_the_official_guidance_caches_all_or_none(pipe, make_omini, pictures):
    mixed = [make_omini(pipe, independent=i).control(pictures(1)) for i in (False, True)]
    with pytest.raises(ValueError, match="caches all conditions of a call, or none"):
        official_guidance(mixed)


def test_one_joint_condition_is_guided_officially_as_by_default(pipe, make_omini, pictures):
    control = make_omini(pipe).control(pictures(1))
    ours, theirs = (
        latents(pipe, given, image_guidance_scale=1.5) for given in ([control], official_guidance([control]))
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)  # groups of other rows sum in another order


# Tasks


def test_the_tasks_are_those_of_the_papers():
    names = {"canny", "depth", "coloring", "deblurring", "fill", "subject", "sr", "art", "cartoon"}
    assert names <= TASKS.keys() and all(config.task == name for name, config in TASKS.items())


def test_the_side_of_a_condition_is_one_width_of_its_own(pipe, make_omini, pictures):
    adapter = make_omini(pipe, delta="left")
    assert adapter.control(pictures(1)).ids[0].tolist() == [0, 0, -6]
    assert adapter.control(pictures(1), size=(16, 80)).ids[0].tolist() == [0, 0, -10]
    assert adapter.control(pictures(1), delta="right").ids[0].tolist() == [0, 0, 6]
    small = make_omini(pipe, delta="left", scale=2).control(pictures(1)).ids[:, 2]
    assert small.max() == -1.5 and small.min() == -5.5  # three tokens of two columns each, up to the picture's edge
    official = make_omini(pipe, delta="left", scale=2, order="official-inference").control(pictures(1))
    assert torch.equal(official.ids[:, 2], small)
    with pytest.raises(ValueError, match="two numbers, 'left' or 'right'; found 'up'"):
        OminiConfig(delta="up")  # type: ignore[arg-type]


def test_a_published_file_is_read_as_the_task_that_it_was_trained_for(pipe, make_omini, pictures, tmp_path):
    path = save_tensors(tmp_path / "canny.safetensors", make_omini(pipe, rank=2).tensors())
    adapter = OminiControl.load(path, pipe, "canny")
    assert adapter.config == replace(TASKS["canny"], rank=2)
    drawn = to_tensor(canny(pictures(1)[0]), (32, 48))[None]
    assert torch.equal(adapter.control(pictures(1)[0]).tokens, pipe.encode_condition(drawn)[0])
    given = OminiConfig("mine", (1, 2), order="official-inference")
    assert OminiControl.load(path, pipe, given).config == replace(given, rank=2)
    with pytest.raises(ValueError, match="No task 'cany'; there are canny, depth"):
        OminiControl.load(path, pipe, "cany")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_makes_a_control(pipe, make_omini, pictures, tmp_path, task):
    path = save_tensors(tmp_path / "a.safetensors", make_omini(pipe, rank=2).tensors())
    # A depth network is not part of condit: tests/unit/test_depth.py.
    control = OminiControl.load(path, pipe, task).control(pictures(1)[0], annotate=task != "depth")
    assert latents(pipe, [control]).isfinite().all()


def test_a_side_is_saved_and_loaded(pipe, make_omini, tmp_path):
    adapter = make_omini(pipe, delta="left", order="official-inference")
    path = save_tensors(tmp_path / "a.safetensors", adapter.tensors(), {"condit": adapter.metadata()})
    assert OminiControl.load(path, pipe).config == adapter.config


# Bad input, and two callers at once


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scale": 0.0}, "scale spreads.*above 0; found 0.0"),
        ({"scale": float("nan")}, "scale spreads"),
        ({"delta": (0, float("inf"))}, "delta must be two numbers"),
        ({"delta": (0, 1, 2)}, "delta must be two numbers"),
        ({"delta": "above"}, "delta must be two numbers, 'left' or 'right'; found 'above'"),
    ],
)
def test_scales_and_offsets_that_are_no_place_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        OminiConfig(**config)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_condition_on_the_image_that_leaves_its_grid_is_refused(make_pipe, make_omini, pictures, scale):
    pipe = make_pipe(canvas=False)
    control = make_omini(pipe, scale=scale).control(pictures(1), size=(48, 96))
    assert latents(pipe, [control], height=48, width=96).isfinite().all()
    with pytest.raises(ValueError, match=r"reaches position \(.*the call generates 4 x 6 cells. Leave size= out"):
        latents(pipe, [control])
    shifted = make_omini(pipe, delta=(0, -6)).control(pictures(1), size=(48, 96))
    assert latents(pipe, [shifted]).isfinite().all()  # nothing to lie on


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 4)])
def test_a_mask_of_a_wrong_shape_is_refused(pipe, make_omini, pictures, shape):
    with pytest.raises(ValueError, match="has shape .*expected one image"):
        make_omini(pipe).control(pictures(1), mask=np.zeros(shape, np.uint8))


def test_masks_that_do_not_fit_the_batch_are_refused(pipe, make_omini, pictures):
    control = make_omini(pipe).control(pictures(3), mask=[LEFT, 255 - LEFT])
    with pytest.raises(ValueError, match="mask: 2 references for 3 images"):
        pipe(["a", "b", "c"], controls=[control], seed=0, output_type="latent")


def test_two_threads_with_different_controls_on_one_model_give_what_each_gives_alone(pipe, make_omini, pictures):
    joint, cached = make_omini(pipe, seed=1), make_omini(pipe, seed=2, independent=True)
    controls = [joint.control(pictures(2)[0], strength=0.7), cached.control(pictures(2)[1], when=When(0, 0.7))]

    def draw(i: int) -> torch.Tensor:
        return latents(pipe, [controls[i % 2]])

    alone = [draw(0), draw(1)]
    with ThreadPoolExecutor(2) as pool:
        actual = list(pool.map(draw, range(6)))
    assert all(torch.equal(x, alone[i % 2]) for i, x in enumerate(actual))
    assert not torch.allclose(alone[0], alone[1])
