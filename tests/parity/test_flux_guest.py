"""condit.interop: the same controls on diffusers' FLUX pipelines and on condit's own, over one random FLUX.1."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condit
from condit.controls.control import Control, When
from condit.drawing.pipeline import Pipeline
from condit.interop import attach
from condit.weights.files import save_tensors
from flux_guests import CASES, PROMPTS, REFERENCE, Colours, close, draw, host_of, noise


# The same as condit's pipeline
@pytest.mark.parametrize("case", CASES)
def test_a_guest_generates_what_condits_own_pipeline_generates(pair, table, pictures, case):
    references = pictures(2)
    with pair.attach() as guest:
        generated = draw(guest, PROMPTS, controls=table[case](guest, references))
    close(generated, draw(pair.ours, PROMPTS, controls=table[case](pair.ours, references)), atol=1e-5)
    assert (generated - draw(pair.theirs, PROMPTS)).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["joint", "cached", "ip"])
def test_true_guidance_uses_the_empty_reference_with_the_negative_prompt(flux_pairs, table, pictures, case):
    """On schnell: condit's pipeline has this guidance for models without a distilled one."""
    pair = flux_pairs["schnell"]
    guided = Pipeline(replace(pair.ours.parts, distilled=False))
    references, negative = pictures(2), ["a fox", "in the snow"]
    with pair.attach() as guest:
        controls = table[case](guest, references)
        actual = draw(guest, PROMPTS, controls=controls, negative_prompt=negative, true_cfg_scale=3.0)
        unguided = draw(guest, PROMPTS, controls=controls)
    expected = draw(
        guided, PROMPTS, controls=table[case](guided, references), negative_prompt=negative, guidance_scale=3.0
    )
    close(actual, expected, atol=1e-4)  # three times the difference of two predictions, four steps
    assert (actual - unguided).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["joint", "cached", "ip"])
def test_the_references_have_a_guidance_of_their_own(flux_pairs, table, pictures, case):
    """With true guidance as in condit's own run; without it, text + s_I (text and references - text)."""
    pair, how = flux_pairs["schnell"], {"image_guidance_scale": 2.0}
    guided = Pipeline(replace(pair.ours.parts, distilled=False))
    references, negative = pictures(2), ["a fox", "in the snow"]
    with pair.attach() as guest:
        controls = table[case](guest, references)
        actual = draw(guest, PROMPTS, controls=controls, negative_prompt=negative, true_cfg_scale=3.0, **how)
        alone = draw(guest, PROMPTS, controls=controls, **how)
        assert torch.equal(draw(guest, PROMPTS, **how), draw(pair.theirs, PROMPTS))
        close(
            draw(guest, PROMPTS, controls=controls, image_guidance_scale=1.0),
            draw(guest, PROMPTS, controls=controls),
            1e-5,
        )
    made = table[case](guided, references)
    expected = draw(guided, PROMPTS, controls=made, negative_prompt=negative, guidance_scale=3.0, **how)
    close(actual, expected, atol=2e-4)  # three predictions, times 3 and 2, four steps
    # At scale 1 the negative side cancels, so that condit's own run is that of the guest without it.
    close(alone, draw(guided, PROMPTS, controls=made, negative_prompt=negative, guidance_scale=1.0, **how), atol=2e-4)


def test_adapters_load_from_files_for_a_guest_as_for_a_pipeline(dev, omini, ip_adapter, pictures, tmp_path):
    made = omini(dev.ours, seed=8, independent=True), ip_adapter(dev.ours)
    files = [save_tensors(tmp_path / f"{i}", a.tensors(), {"condit": a.metadata()}) for i, a in enumerate(made)]

    def controls(p: Any) -> list[Control]:
        loaders = condit.OminiControl, condit.IPAdapter
        return [loader.load(file, p).control(pictures(1)) for loader, file in zip(loaders, files, strict=True)]

    with condit.interop.attach(dev.theirs, size=REFERENCE, image=Colours()) as guest:
        generated = draw(guest, controls=controls(guest))
    close(generated, draw(dev.ours, controls=controls(dev.ours)), atol=1e-5)


@pytest.mark.parametrize("case", ["joint", "cached", "ip"])
def test_a_row_of_a_batch_with_its_own_reference_equals_its_single_run(dev, table, pictures, case):
    references, start = pictures(2), noise(4)
    with dev.attach() as guest:
        controls = table[case](guest, references)
        batch = draw(guest, PROMPTS, controls=controls, latents=start, num_images_per_prompt=2)
        for i in range(4):
            alone = table[case](guest, references[i // 2 : i // 2 + 1])
            single = draw(guest, PROMPTS[i // 2], controls=alone, latents=start[i : i + 1])
            close(batch[i : i + 1], single, atol=1e-4)  # matrix products of another batch size sum in another order
    assert (batch[0] - batch[1]).abs().max() > 1e-2


# Plain, and left as it was


def test_without_an_acting_control_a_guest_is_the_plain_pipeline_bit_by_bit(pair, table, pictures, omini):
    def seeded(pipe: Any, kind: str, **given: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return draw(pipe, PROMPTS, latents=None, generator=generator, output_type=kind, **given)

    with pair.attach() as guest:
        adapter = omini(guest)
        absent = [
            [],
            [adapter.control(pictures(1), strength=0.0)],
            [adapter.control(pictures(1), when=When(0, 0.1))],  # none of four steps ends before 0.1
        ]
        for kind in ("latent", "pt"):
            plain = seeded(pair.theirs, kind)
            for controls in absent:
                assert torch.equal(seeded(guest, kind, controls=controls), plain)


def test_the_transformer_itself_predicts_where_no_control_acts(dev, omini, pictures):
    """Which bits cannot tell where both sum in one order. In the second half condit's MM-DiT predicts instead."""
    ran = []
    hook = dev.theirs.transformer.register_forward_hook(lambda *_: ran.append(1))
    counts = []
    with dev.attach() as guest:
        for how in ({"strength": 0.0}, {"when": When(0.5, 1)}, {}):
            draw(guest, controls=[omini(guest).control(pictures(1), **how)])
            counts.append(len(ran))
            ran.clear()
    hook.remove()
    assert counts == [4, 2, 0]


def test_detaching_leaves_the_pipeline_unchanged(dev, table, pictures):
    pipe = dev.theirs
    before, config = draw(pipe), dict(pipe.config)
    attributes = {name: id(value) for name, value in vars(pipe).items()}
    modules = {path: (id(m), sorted(vars(m))) for path, m in pipe.transformer.named_modules()}
    weights = {name: (id(p), p.clone()) for name, p in pipe.transformer.named_parameters()}
    levels = pipe.scheduler.timesteps.clone()
    with dev.attach() as guest:
        draw(guest, PROMPTS, controls=table["all"](guest, pictures(2)), num_inference_steps=3)
    assert torch.equal(pipe.scheduler.timesteps, levels)
    assert {name: id(value) for name, value in vars(pipe).items()} == attributes and dict(pipe.config) == config
    assert {path: (id(m), sorted(vars(m))) for path, m in pipe.transformer.named_modules()} == modules
    for name, parameter in pipe.transformer.named_parameters():
        assert id(parameter) == weights[name][0] and torch.equal(parameter, weights[name][1])
    assert torch.equal(draw(pipe), before)


def test_the_shared_layers_hold_the_parameters_of_the_transformer_itself(dev):
    def ids(module: nn.Module) -> set[int]:
        return {id(p) for p in module.parameters()}

    assert ids(dev.attach().backbone) == ids(dev.theirs.transformer)


def test_two_pipelines_that_share_a_transformer_do_not_see_each_other(dev, table, pictures):
    """Each step of the first draws with the second, plain, and with another guest of the second."""

    other = host_of(dev)
    one, two = dev.attach(), attach(other, size=REFERENCE, image=Colours())
    first, second = table["joint"](one, pictures(2)[:1]), table["cached"](two, pictures(2)[1:])
    alone = draw(one, controls=first), draw(other), draw(two, controls=second)
    seen = []

    def between(*_: Any) -> dict:
        seen.append((draw(other), draw(two, controls=second)))
        return {}

    assert torch.equal(draw(one, controls=first, callback_on_step_end=between), alone[0])
    assert len(seen) == 4
    assert all(torch.equal(a, alone[1]) and torch.equal(b, alone[2]) for a, b in seen)
