"""controls/omini.py: adapters and what they place into the sequence. Numbers: tests/parity/test_omini_golden.py."""

import pytest
import torch
from torch import nn

from condit.controls.control import Run, Step, When
from condit.controls.omini import OminiConfig, OminiControl, omini_targets
from condit.pipeline import Pipeline
from condit.weights.files import save_tensors


@pytest.fixture(scope="module")
def pipe(make_pipe) -> Pipeline:
    return make_pipe(guidance_embeds=True, distilled=True)


def run_of(pipe: Pipeline, batch: int = 1) -> Run:
    guidance = torch.full((batch,), 3.5)
    return Run(pipe.backbone, batch, (4, 6), torch.randn(batch, 10), guidance, pipe.backbone.config.in_channels)


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


def test_joint_conditions_see_the_picture_and_independent_ones_themselves_through_a_cache(pipe, make_omini, pictures):
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


def test_the_empty_reference_of_guidance_is_an_encoded_black_picture(pipe, make_omini, pictures):
    negative = make_omini(pipe).control(pictures(2)).negative()
    black, _ = pipe.encode_condition(-torch.ones(1, 3, 32, 48))
    assert torch.equal(negative.tokens, black)


def test_a_compact_condition_is_encoded_small_and_spread_over_the_picture(pipe, make_omini, pictures):
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


def test_an_official_file_without_our_metadata_loads(pipe, make_omini, tmp_path):
    path = save_tensors(tmp_path / "official.safetensors", make_omini(pipe, rank=2).tensors())
    assert OminiControl.load(path, pipe).config == OminiConfig(rank=2)


def test_a_lora_of_another_model_is_told_by_its_first_strange_layer(pipe, make_omini, tmp_path):
    tensors = make_omini(pipe).tensors()
    strange = {name.replace("x_embedder", "y_embedder"): tensor for name, tensor in tensors.items()}
    wide = tensors | {"transformer.x_embedder.lora_A.weight": torch.zeros(4, 64)}
    for number, (given, message) in enumerate(
        [(strange, "'y_embedder'.*random has none"), (wide, r"'x_embedder' of shape \(32, 64\).*\(32, 20\)")]
    ):
        path = save_tensors(tmp_path / f"{number}.safetensors", given)
        with pytest.raises(ValueError, match=message):
            OminiControl.load(path, pipe)


def test_the_recipe_of_a_control_says_how_to_make_it_again(pipe, make_omini, pictures):
    control = make_omini(pipe).control(pictures(2), strength=0.5, when=When(0, 0.5))
    described = control.describe()
    assert (described["method"], described["strength"], described["when"]) == ("OminiControl", 0.5, [0, 0.5])
    assert len(described["reference"]) == 2
