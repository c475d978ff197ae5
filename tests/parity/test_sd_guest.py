"""condit.interop on Stable Diffusion: the same controls on diffusers' pipelines and on condit's own, over one random
SD 1.x and one random SDXL."""

import gc

import pytest
import torch

from condit.controls.control import When
from condit.interop import attach
from condit.interop.unet import ControlledUNet
from sd_guests import PROMPTS, close, draw, every_kind, noise


@every_kind
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", ["global", "plus", "style", "deadiff", "lora", "all"])
def test_a_guest_generates_what_condits_own_pipeline_generates(sd_pairs, pictures, kind, name, guidance):
    pair, references = sd_pairs(kind), pictures(2)
    with attach(pair.theirs) as guest:
        generated = draw(guest, PROMPTS, controls=pair.controls(guest, name, references), guidance_scale=guidance)
    controls = pair.controls(pair.ours, name, references)
    close(generated, draw(pair.ours, PROMPTS, controls=controls, guidance_scale=guidance))
    assert (generated - draw(pair.theirs, PROMPTS, guidance_scale=guidance)).abs().max() > 1e-2


@every_kind
def test_all_controls_act_in_one_call_in_any_order(sd_pairs, pictures, kind):
    """IP-Adapter in a region, InstantStyle, DEADiff's content and a LoRA."""
    pair = sd_pairs(kind)
    guest = attach(pair.theirs)
    controls = pair.controls(guest, "all", pictures(1)[0])
    whole = draw(guest, controls=controls)
    close(draw(guest, controls=controls[::-1]), whole)
    for left_out in range(len(controls)):
        others = [control for i, control in enumerate(controls) if i != left_out]
        assert (draw(guest, controls=others) - whole).abs().max() > 1e-3


@every_kind
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_references_of_a_batch_equal_single_runs(sd_pairs, pictures, kind, guidance):
    pair, references, start = sd_pairs(kind), pictures(4), noise(4)
    prompts = [*PROMPTS, "a fox", "snow"]
    with attach(pair.theirs) as guest:
        how = {"guidance_scale": guidance}
        batch = draw(guest, prompts, controls=pair.controls(guest, "all", references), latents=start, **how)
        for i, prompt in enumerate(prompts):
            alone = pair.controls(guest, "all", references[i])
            close(batch[i : i + 1], draw(guest, prompt, controls=alone, latents=start[i : i + 1], **how))


@every_kind
def test_negative_prompts_and_copies_are_ordered_as_in_diffusers(sd_pairs, pictures, kind):
    pair, references, start = sd_pairs(kind), pictures(2), noise(4)
    given = {"negative_prompt": ["snow", "a fox"], "num_images_per_prompt": 2, "latents": start}
    generated = draw(guest := attach(pair.theirs), PROMPTS, controls=pair.controls(guest, "all", references), **given)
    controls = pair.controls(pair.ours, "all", references)
    close(generated, draw(pair.ours, PROMPTS, controls=controls, **given))


# Plain, and left as it was


@every_kind
def test_without_an_acting_control_a_guest_is_the_plain_pipeline_bit_by_bit(sd_pairs, pictures, kind):
    pair, picture = sd_pairs(kind), pictures(1)[0]
    plain = draw(pair.theirs, PROMPTS)
    with attach(pair.theirs) as guest:
        never = {"when": When(0, 0.1)}  # none of three steps ends before 0.1
        for controls in (
            [],
            pair.controls(guest, "global", picture, strength=0.0),
            pair.controls(guest, "style", picture, **never),
            pair.controls(guest, "deadiff", picture, **never),
        ):
            assert torch.equal(draw(guest, PROMPTS, controls=controls), plain)


@every_kind
def test_detaching_leaves_the_pipeline_unchanged(sd_pairs, pictures, kind):
    pair, pipe = sd_pairs(kind), sd_pairs(kind).theirs
    before, config = draw(pipe), dict(pipe.config)
    attributes = {name: id(value) for name, value in vars(pipe).items()}
    modules = {path: (id(m), sorted(vars(m))) for path, m in pipe.unet.named_modules()}
    processors = {path: id(processor) for path, processor in pipe.unet.attn_processors.items()}
    weights = {name: (id(p), p.clone()) for name, p in pipe.unet.named_parameters()}
    levels = pipe.scheduler.timesteps.clone()
    with attach(pipe) as guest:
        controls = pair.controls(guest, "all", pictures(2))
        changed = draw(guest, PROMPTS, controls=controls, num_inference_steps=4)
    assert changed.isfinite().all() and torch.equal(pipe.scheduler.timesteps, levels)
    assert {name: id(value) for name, value in vars(pipe).items()} == attributes and dict(pipe.config) == config
    assert {path: (id(m), sorted(vars(m))) for path, m in pipe.unet.named_modules()} == modules
    assert {path: id(processor) for path, processor in pipe.unet.attn_processors.items()} == processors
    for name, parameter in pipe.unet.named_parameters():
        assert id(parameter) == weights[name][0] and torch.equal(parameter, weights[name][1])
    assert torch.equal(draw(pipe), before)
    with pytest.raises(ValueError, match="is detached from its pipeline"):
        guest("snow")


@every_kind
def test_the_shared_layers_hold_the_parameters_of_the_unet_itself(sd_pairs, kind):
    pair = sd_pairs(kind)
    lent = {id(p) for p in attach(pair.theirs).backbone.parameters()}
    assert lent == {id(p) for p in pair.theirs.unet.parameters()}


def test_the_text_is_projected_once_a_run_and_the_unet_itself_predicts_where_no_control_acts(sd_pairs, pictures):
    pair, ran, counts = sd_pairs("sd15"), [], []
    unet = pair.theirs.unet
    hooks = [unet.register_forward_hook(lambda *_: ran.append("unet"))]
    path = next(p for p, m in unet.named_modules() if p.endswith("attn2.to_k"))
    hooks.append(unet.get_submodule(path).register_forward_hook(lambda *_: ran.append("text")))
    with attach(pair.theirs) as guest:
        for when in (When(0, 0.1), When(0.5, 1), When()):
            draw(guest, controls=pair.controls(guest, "global", pictures(1)[0], when=when))
            counts.append((ran.count("unet"), ran.count("text")))
            ran.clear()
    for hook in hooks:
        hook.remove()
    # Of three steps the last one ends and begins behind the middle.
    assert counts == [(3, 3), (2, 3), (0, 1)]


def test_keys_and_values_are_freed_after_the_call(sd_pairs, pictures):
    """No circle of references keeps them until memory is searched for such."""
    pair = sd_pairs("sd15")
    guest = attach(pair.theirs)
    controls = pair.controls(guest, "global", pictures(1)[0])
    gc.collect()
    gc.disable()
    try:
        draw(guest, controls=controls)
        left = [obj for obj in gc.get_objects() if type(obj) is ControlledUNet]
    finally:
        gc.enable()
    assert left == []
