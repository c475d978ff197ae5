"""controls/ip_adapter.py: decoupled attention on the image rows."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from condit.controls.control import Run, Step, When
from condit.controls.ip_adapter import IPAdapter, IPConfig, IPReference
from condit.drawing.pipeline import Pipeline
from condit.nn.attention import Call, sdpa
from condit.weights.files import save_tensors


@pytest.fixture(scope="module")
def pipe(make_pipe) -> Pipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def adapter(pipe, make_ip) -> IPAdapter:
    return make_ip(pipe)


def at_step(pipe: Pipeline, control: IPReference, batch: int = 1) -> IPReference:
    run = Run(pipe.backbone, batch, (4, 6), torch.zeros(batch, 10), None, 20)
    active = control.prepare(run).at(Step(0, 1, 1.0))
    assert active is not None
    return active


def call_of(pipe: Pipeline, batch: int = 1) -> Call:
    g = torch.Generator().manual_seed(0)
    q, k, v, plain = torch.randn(4, batch, 2, 29, 16, generator=g)
    return Call(q, k, v, pipe.backbone.sites[0], image=slice(5, 29), plain=plain)


def test_equation_5_adds_attention_to_the_reference_on_the_image_rows(pipe, adapter, pictures):
    control = at_step(pipe, adapter.control(pictures(1), strength=0.7))
    call = call_of(pipe)
    assert call.plain is not None
    k, v = control.kv[call.site.path]
    expected = sdpa(call)
    expected[:, :, 5:] += 0.7 * F.scaled_dot_product_attention(call.plain[:, :, 5:], k, v)
    torch.testing.assert_close(control.around(call, sdpa), expected, rtol=0, atol=1e-6)


def test_keys_are_normalised_and_one_token_is_its_value(pipe, adapter):
    kv = adapter.keys_values(torch.randn(2, 12))
    assert set(kv) == {site.path for site in pipe.backbone.sites}
    for k, v in kv.values():
        assert k.shape == v.shape == (2, 2, 3, 16)
        torch.testing.assert_close(k.square().mean(-1), torch.ones(2, 2, 3), rtol=0, atol=1e-3)  # eps of the norm


def test_a_fresh_adapter_starts_as_the_plain_model(pipe, pictures):
    fresh = IPAdapter(IPConfig(12, heads=2), pipe.backbone.sites, 32, pipe)
    call = call_of(pipe)
    control = fresh.control(pictures(1))
    assert isinstance(control, IPReference)
    assert torch.equal(at_step(pipe, control).around(call, sdpa), sdpa(call))


def test_a_call_without_image_rows_is_left_alone(pipe, adapter, pictures):
    call = replace(call_of(pipe), image=None)
    assert torch.equal(at_step(pipe, adapter.control(pictures(1))).around(call, sdpa), sdpa(call))


def test_where_limits_the_layers(pipe, adapter, pictures):
    control = at_step(pipe, adapter.control(pictures(1), where="single_transformer_blocks.*"))
    call = call_of(pipe)
    assert torch.equal(control.around(call, sdpa), sdpa(call))
    inside = replace(call, site=pipe.backbone.sites[-1])
    assert not torch.equal(control.around(inside, sdpa), sdpa(inside))


def test_a_mask_limits_the_tokens(pipe, adapter, pictures):
    mask = torch.zeros(32, 48)
    mask[:, :24] = 1  # the left three of six columns
    call = call_of(pipe)
    changed = at_step(pipe, adapter.control(pictures(1), mask=mask)).around(call, sdpa) - sdpa(call)
    columns = changed[:, :, 5:].abs().amax((0, 1, 3)).view(4, 6).amax(0)
    assert (columns[:3] > 1e-3).all() and not columns[3:].any()
    square = adapter.control(pictures(1), mask=torch.ones(32, 32))
    with pytest.raises(ValueError, match="a mask of 32 x 32 .* for an image of 4 x 6 tokens: the shapes differ"):
        pipe("a fox", controls=[square], seed=0)


def test_references_of_one_image_are_averaged_or_concatenated(adapter, pictures):
    one, two = pictures(2)
    mean = adapter.control([[one, two]])
    concat = adapter.control([[one, two]], combine="concat")
    assert all(k.shape[2] == 3 for k, _ in mean.kv.values()) and all(k.shape[2] == 6 for k, _ in concat.kv.values())
    first = adapter.control(one)
    for path, (k, v) in concat.kv.items():
        torch.testing.assert_close(k[:, :, :3], first.kv[path][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(v[:, :, :3], first.kv[path][1], rtol=0, atol=1e-5)


def test_summed_references_add_their_branches(pipe, adapter, pictures):
    one, two = pictures(2)
    parts = [at_step(pipe, adapter.control(r, strength=s)) for r, s in ((one, 0.3), (two, 0.5))]
    both = at_step(pipe, adapter.control([[one, two]], combine="sum", weights=[0.3, 0.5]))
    call = call_of(pipe)
    expected = parts[1].around(call, lambda call: parts[0].around(call, sdpa))
    torch.testing.assert_close(both.around(call, sdpa), expected, rtol=0, atol=1e-6)


def test_the_same_reference_twice_is_that_reference(adapter, pictures):
    (one,) = pictures(1)
    for path, (k, _) in adapter.control([[one, one]]).kv.items():
        torch.testing.assert_close(k, adapter.control(one).kv[path][0], rtol=0, atol=1e-5)


def test_the_empty_reference_of_guidance_is_zero_features(adapter, pictures):
    empty = adapter.keys_values(torch.zeros(1, 12))
    negative = adapter.control(pictures(2)).negative()
    assert all(torch.equal(negative.kv[path][1], v) for path, (_, v) in empty.items())


def test_a_curve_scales_the_strength(pipe, adapter, pictures):
    control = adapter.control(pictures(1), strength=0.8, when=When(curve=lambda progress: 0.5))
    weight = at_step(pipe, control).weight
    assert isinstance(weight, torch.Tensor) and float(weight) == pytest.approx(0.4)


def test_features_made_elsewhere_act_as_their_image_and_those_of_another_encoder_are_refused(adapter, pictures):
    picture, other = pictures(2)
    both = adapter.features([picture, other])
    for embeds, reference in ((both[:1], picture), (both[None], [[picture, other]])):
        seen = adapter.control(reference)
        for path, (k, v) in adapter.control(embeds=embeds).kv.items():
            torch.testing.assert_close((k, v), seen.kv[path], rtol=0, atol=1e-5)
    for wrong in (both[0], both[:, :5], both[None, None]):
        with pytest.raises(ValueError, match=r"embeds must be \(n, 12\) or \(n, R, 12\)"):
            adapter.control(embeds=wrong)
    with pytest.raises(ValueError, match="not both"):
        adapter.control(picture, embeds=both[:1])


def test_unequal_numbers_of_references_and_unknown_combinations_are_refused(adapter, pictures):
    one, two = pictures(2)
    with pytest.raises(ValueError, match=r"the same number of references; found \[2, 1\]"):
        adapter.control([[one, two], [one]])
    with pytest.raises(ValueError, match="found 'max'"):
        adapter.control(one, combine="max")


def test_a_saved_adapter_comes_back(pipe, make_ip, tmp_path):
    adapter = make_ip(pipe, combine="concat")
    path = save_tensors(tmp_path / "a.safetensors", adapter.tensors(), {"condit": adapter.metadata()})
    again = IPAdapter.load(path, pipe)
    assert again.config == adapter.config
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in adapter.tensors().items())


def test_an_adapter_of_another_model_or_encoder_raises(pipe, adapter, tmp_path):
    tensors = adapter.tensors()
    fewer = {name: t for name, t in tensors.items() if ".3." not in name}
    features = tensors | {"image_proj.proj.weight": torch.zeros(24, 99)}
    for number, (given, message) in enumerate(
        [
            (fewer, "3 K', V' pairs of width 32; random has 4 attention layers of width 32"),
            (tensors | {"pooled_proj.weight": torch.zeros(10, 12)}, "holds 'pooled_proj.weight'; .* train it again"),
            (features, "needs image features of width 99; random has an image encoder of width 12"),
            ({"image_proj.latents": torch.zeros(1)}, "no 'image_proj.proj.weight'"),
        ]
    ):
        path = save_tensors(tmp_path / f"{number}.safetensors", given)
        with pytest.raises(ValueError, match=message):
            IPAdapter.load(path, pipe)


def test_a_file_of_another_method_is_refused_by_its_tensors(pipe, make_omini, tmp_path):
    path = save_tensors(tmp_path / "lora.safetensors", make_omini(pipe).tensors())
    with pytest.raises(ValueError, match="is for condit.OminiControl or condit.StyleLoRA, not condit.IPAdapter"):
        IPAdapter.load(path, pipe)
