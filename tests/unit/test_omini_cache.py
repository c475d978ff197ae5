"""OminiControl's strength, regions and caches of keys and values."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from condit.controls.control import Step, When
from condit.drawing.pipeline import Pipeline
from omini_runs import latents, run_of


@pytest.fixture(scope="module")
def pipe(make_pipe) -> Pipeline:
    return make_pipe(guidance_embeds=True, distilled=True)


def test_the_papers_strength_reaches_the_stream(pipe, make_omini, pictures):
    control = make_omini(pipe).control(pictures(1), strength=0.5, text_bias=False)
    (stream,) = control.prepare(run_of(pipe)).at(Step(0, 4, 1.0)).streams()
    assert not stream.weight_text


def test_a_region_is_a_weight_a_token_on_the_grid_of_the_run(pipe, make_omini, pictures):
    mask = np.zeros((32, 48), np.uint8)
    mask[:, :20] = 255  # two and a half cells
    control = make_omini(pipe).control(pictures(1), mask=mask, strength=0.5).prepare(run_of(pipe, batch=2))
    (stream,) = control.at(Step(0, 4, 1.0)).streams()
    weights = stream.log_weight.exp().unflatten(1, (4, 6))
    assert weights.shape == (2, 4, 6)
    torch.testing.assert_close(weights[1, 3], torch.tensor([0.5, 0.5, 0.25, 0, 0, 0]))


@pytest.fixture
def prefills(pipe, monkeypatch) -> list[int]:
    """Grows by one whenever the backbone runs a condition on its own."""
    counted, original = [], pipe.backbone.prefill
    monkeypatch.setattr(pipe.backbone, "prefill", lambda *given: counted.append(1) or original(*given))
    return counted


def test_one_prefill_serves_seeds_steps_guidance_and_copies(pipe, make_omini, pictures, prefills):
    control = make_omini(pipe, independent=True).control(pictures(1))
    ready = control.prefill("a fox")
    assert len(prefills) == 1
    settings = [{}, {"seed": 3}, {"num_inference_steps": 5}, {"guidance_scale": 2.0}, {"num_images_per_prompt": 2}]
    drawn = [latents(pipe, [ready], **how) for how in settings]
    assert len(prefills) == 1
    for how, actual in zip(settings, drawn, strict=True):
        torch.testing.assert_close(actual, latents(pipe, [control], **how), rtol=0, atol=1e-5)  # copies: a larger batch
    assert len(prefills) == 1 + len(settings)


def test_one_prefill_serves_every_size(make_pipe, make_omini, pictures):
    pipe = make_pipe(canvas=False, guidance_embeds=True, distilled=True)
    control = make_omini(pipe, independent=True, delta=(0, -6)).control(pictures(1))
    generated = latents(pipe, [control.prefill("a fox")], height=16, width=40)
    assert generated.shape == (1, 10, 16) and torch.equal(generated, latents(pipe, [control], height=16, width=40))


def test_prompts_with_references_of_their_own_are_prefilled_together(pipe, make_omini, pictures):
    control = make_omini(pipe, independent=True).control(pictures(2))
    prompts = ["a fox", "snow"]
    ready = control.prefill(prompts)
    torch.testing.assert_close(latents(pipe, [ready], prompts), latents(pipe, [control], prompts), rtol=0, atol=1e-5)


def test_a_prefilled_condition_refuses_another_prompt(pipe, make_omini, pictures):
    ready = make_omini(pipe, independent=True).control(pictures(1)).prefill("a fox")
    with pytest.raises(ValueError, match="prefilled for another prompt.*pooled text.*Prefill it for this prompt"):
        latents(pipe, [ready], "snow")
    with pytest.raises(ValueError, match="prefilled for another prompt"):
        latents(pipe, [ready], ["a fox", "snow"])


def test_the_unconditional_side_of_guidance_fills_its_own_cache(make_pipe, make_omini, pictures):
    pipe = make_pipe()
    control = make_omini(pipe, independent=True).control(pictures(1))
    assert torch.equal(latents(pipe, [control.prefill("a fox")]), latents(pipe, [control]))


def test_a_jointly_trained_adapter_with_a_cache_raises(pipe, make_omini, pictures):
    adapter = make_omini(pipe)
    with pytest.raises(ValueError, match="trained jointly: its condition attends to text and image"):
        adapter.control(pictures(1)).prefill("a fox")
    with pytest.raises(ValueError, match="trained jointly.*cached='first-step'.*cached='independent'"):
        adapter.control(pictures(1), cached=True)
    with pytest.raises(ValueError, match="trained jointly"):
        adapter.control(pictures(1), cached="first-step").prefill("a fox")


@pytest.mark.parametrize("cached", ["first-step", "independent"])
def test_an_approximate_cache_must_be_requested_and_differs(pipe, make_omini, pictures, cached):
    adapter = make_omini(pipe)
    rough = adapter.control(pictures(1), cached=cached)
    assert rough.describe()["cached"] == cached
    assert (latents(pipe, [rough]) - latents(pipe, [adapter.control(pictures(1))])).abs().max() > 1e-3


def test_a_condition_seen_as_independent_needs_no_first_step(pipe, make_omini, pictures):
    adapter = make_omini(pipe)
    rough, older = (adapter.control(pictures(1), cached=name) for name in ("independent", "approximate"))
    assert rough.prepare(run_of(pipe)).streams() == ()
    assert torch.equal(latents(pipe, [rough.prefill("a fox")]), latents(pipe, [rough]))
    assert torch.equal(latents(pipe, [older]), latents(pipe, [rough]))


def test_the_cache_of_the_first_step_joins_once_and_begins_anew_in_every_call(pipe, make_omini, pictures):
    adapter = make_omini(pipe)
    rough, joint = adapter.control(pictures(1), cached="first-step"), adapter.control(pictures(1))
    one = latents(pipe, [rough], num_inference_steps=1)
    assert torch.equal(one, latents(pipe, [joint], num_inference_steps=1))  # its only step is the first
    generated = latents(pipe, [rough])
    assert torch.equal(generated, latents(pipe, [rough]))
    late = [replace(c, when=When(0.5, 1)) for c in (rough, joint)]
    half = [latents(pipe, [c], num_inference_steps=2) for c in late]
    assert torch.equal(*half)  # the first step in which it acts
    assert not torch.equal(generated, latents(pipe, [rough], seed=5))


def test_a_row_of_a_batch_equals_its_single_run_with_the_cache_of_the_first_step(pipe, make_omini, pictures):
    adapter, prompts = make_omini(pipe), ["a fox", "snow"]
    both = latents(pipe, [adapter.control(pictures(2), cached="first-step")], prompts)
    for i, (picture, prompt) in enumerate(zip(pictures(2), prompts, strict=True)):
        alone = latents(pipe, [adapter.control(picture, cached="first-step")], prompt, seed=i)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-4)


def test_an_independent_adapter_is_as_exact_with_either_cache(pipe, make_omini, pictures):
    adapter = make_omini(pipe, independent=True)
    exact = latents(pipe, [adapter.control(pictures(1))])
    for cached in ("first-step", "independent"):
        assert torch.equal(latents(pipe, [adapter.control(pictures(1), cached=cached)]), exact)


def test_an_unknown_kind_of_cache_is_refused(pipe, make_omini, pictures):
    with pytest.raises(
        ValueError, match="cached must be True, False, None, 'first-step' or 'independent'; found 'yes'"
    ):
        make_omini(pipe).control(pictures(1), cached="yes")
