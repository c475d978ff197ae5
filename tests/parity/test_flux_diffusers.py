"""The MM-DiT and its pipeline against diffusers' FLUX classes on tiny random models; FLUX.1-dev by names and shapes."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

import condit
from condit.backbones.mmdit import PRESETS, MMDiT, MMDiTConfig
from condit.controls.omini_tasks import omini_targets
from condit.nn.lora import LoRA
from condit.nn.streams import Stream, grid_ids

TINY = MMDiTConfig(
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(4, 6, 6),
)


def diffusers_flux(config: MMDiTConfig):
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel(**asdict(config)).eval().requires_grad_(False)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


CONFIGS = {
    "dev": replace(TINY, guidance_embeds=True),
    "schnell": TINY,
    "fill": replace(TINY, in_channels=24, out_channels=8, guidance_embeds=True),
    "double_only": replace(TINY, num_layers=1, num_single_layers=0),
    "single_only": replace(TINY, num_layers=0, num_single_layers=1),
    "three_heads": replace(TINY, num_attention_heads=3, attention_head_dim=8, axes_dims_rope=(2, 2, 4)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_diffusers_on_a_rectangular_grid(name):
    torch.manual_seed(0)
    config = CONFIGS[name]
    theirs, ours = diffusers_flux(config), MMDiT(config)
    for parameter in theirs.parameters():  # norms of weight one and biases of zero would hide a mistake
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids, text_ids = grid_ids(2, 5), torch.zeros(7, 3)
    x, text = torch.randn(2, 10, config.in_channels), torch.randn(2, 7, config.joint_attention_dim)
    pooled, t = torch.randn(2, config.pooled_projection_dim), torch.tensor([0.9, 0.2])
    guidance = torch.tensor([3.5, 1.0]) if config.guidance_embeds else None
    with torch.no_grad():
        expected = theirs(x, text, pooled, t, ids, text_ids, guidance).sample
        actual = ours(Stream(x, ids, t, pooled, guidance), text, text_ids)
    assert actual.shape == (2, 10, config.out_channels or config.in_channels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # SDPA may sum in another order


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-fill"])
def test_names_and_shapes_of_the_published_transformers_equal_diffusers(name):
    with torch.device("meta"):
        ours, theirs = MMDiT(PRESETS[name]), diffusers_flux(PRESETS[name])
    assert shapes(ours) == shapes(theirs)


def test_flux_dev_has_1160_tensors_and_11_9_billion_parameters_that_load_strictly():
    with torch.device("meta"):
        theirs, ours = diffusers_flux(PRESETS["flux-dev"]), MMDiT(PRESETS["flux-dev"])
    assert len(theirs.state_dict()) == 1160  # as in the index of black-forest-labs/FLUX.1-dev
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 11_901_408_320


@pytest.mark.parametrize(
    ("rank", "suffixes", "count"),
    [
        (4, None, 14_487_808),  # the "14.5M" of OminiControl's Table 1
        (16, ("norm1.linear", "norm.linear", "to_q", "to_k"), 25_214_976),
        (4, ("to_q", "to_k", "to_v"), 4_202_496),
    ],
)
def test_lora_on_flux_dev_has_the_published_number_of_parameters(rank, suffixes, count):
    with torch.device("meta"):
        targets = omini_targets(MMDiT(PRESETS["flux-dev"]))
        if suffixes is not None:
            targets = {path: shape for path, shape in targets.items() if path.endswith(suffixes)}
        lora = LoRA(targets, rank)
    assert sum(p.numel() for p in lora.parameters()) == count


# The pipeline: a folder as diffusers saves it.

PROMPT = "a red fox in the snow"


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def both(request, tmp_path_factory, make_flux):
    """diffusers' pipeline, and ours loaded from the folder that it saved."""
    theirs = make_flux(replace(TINY, guidance_embeds=request.param), dynamic=request.param)
    folder = tmp_path_factory.mktemp("flux")
    theirs.save_pretrained(folder)
    return theirs, condit.load(folder, dtype=torch.float32)


def test_a_folder_saved_by_diffusers_generates_the_same_latents_and_image(both):
    theirs, ours = both
    height, width = 24, 32  # 6 x 8 tokens of 4 px
    noise = torch.randn(2, 6 * 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = [PROMPT, "snow"]

    def call(output_type: str) -> Tensor:
        return theirs(
            prompts,
            height=height,
            width=width,
            num_inference_steps=4,
            guidance_scale=3.5,
            latents=noise,
            output_type=output_type,
        ).images

    given = {"height": height, "width": width, "num_inference_steps": 4, "guidance_scale": 3.5, "latents": noise}
    images = ours(prompts, output_type="latent", **given).images
    # Four steps, and diffusers forms sigmas in float32 where ours are rounded from float64.
    torch.testing.assert_close(images, call("latent"), rtol=0, atol=1e-4)
    picture = ours(prompts, output_type="pt", **given).images
    torch.testing.assert_close((picture + 1) / 2, call("pt"), rtol=0, atol=1e-4)


def test_the_prompt_reaches_both_text_encoders_as_in_diffusers(both):
    theirs, ours = both
    with torch.no_grad():
        tokens, pooled, _ = theirs.encode_prompt([PROMPT, "snow"], None)
    text = ours.encode_text([PROMPT, "snow"])
    torch.testing.assert_close(text.tokens, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-5)
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


def test_the_schedule_is_read_from_the_folder(both):
    theirs, ours = both
    dynamic = theirs.scheduler.config.use_dynamic_shifting
    assert ours.parts.shift == (None if dynamic else 1.0)
    assert ours.parts.steps == (28 if dynamic else 4)
    assert ours.parts.distilled


def test_a_folder_of_another_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline.*FLUX"):
        condit.load(tmp_path)


def test_an_unknown_model_raises_with_the_known_ones():
    with pytest.raises(ValueError, match="No model 'no-such'.*model_index.json"):
        condit.load("no-such")
