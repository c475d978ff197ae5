"""condit.interop on Stable Diffusion: the same controls on diffusers' pipelines and on condit's own, over one random
SD 1.x and one random SDXL."""

import copy
import gc
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import condit
from condit.controls.control import Control, When
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import Resampler
from condit.controls.omini import OminiConfig, OminiControl
from condit.controls.style_lora import StyleLoRA
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import CLIPImage, TextTower
from condit.interop import Guest, attach
from condit.interop.unet import PIPELINES, ControlledUNet, borrow
from condit.nn.lora import LoRA, linear_shapes
from condit.weights.files import save_tensors

diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for
PROMPTS = ["a red fox", "in the snow"]
GIVEN: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
LEFT = np.zeros((32, 32), np.uint8)
LEFT[:, :16] = 255
every_kind = pytest.mark.parametrize("kind", ["sd15", "sdxl"])


def encoder() -> CLIPImage:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=12)
    return CLIPImage(shaken(CLIPVisionModelWithProjection(config).eval(), 0.3))


def shaken(module: Any, scale: float) -> Any:
    """With noise on every weight, so that nothing hides behind a zero or a one."""
    with torch.no_grad():
        for p in module.requires_grad_(False).parameters():
            p.add_(scale * torch.randn(p.shape))
    return module


@dataclass(frozen=True)
class Pair:
    """diffusers' pipeline and condit's over equal weights, files of adapters, and the towers that they read with."""

    theirs: Any
    ours: Pipeline
    files: dict[str, Path]
    image: CLIPImage
    tower: Any

    def host(self, name: str, **parts: Any) -> Any:
        """Another pipeline of diffusers over the same parts, or others."""
        given = {k: v for k, v in (self.theirs.components | parts).items() if v is not None}
        made = getattr(diffusers, name)
        how = {} if "XL" in name else {"safety_checker": None, "feature_extractor": None}
        host = made(**{**given, **how}, **({} if "XL" in name else {"requires_safety_checker": False}))
        host.set_progress_bar_config(disable=True)
        return host

    def controls(self, pipe: Any, name: str, references: Any, **how: Any) -> list[Control]:
        """Of adapters loaded for `pipe`, a guest or condit's pipeline."""
        if name == "all":
            parts = [("global", {"strength": 0.6, "mask": LEFT}), ("style", {}), ("deadiff", {}), ("lora", {})]
            return [c for part, given in parts for c in self.controls(pipe, part, references, **given, **how)]
        if name == "lora":
            return [StyleLoRA.load(self.files["lora"], pipe).control(0.7)]
        if name == "deadiff":
            adapter = condit.DEADiff.load(self.files["deadiff"], pipe, image_encoder=self.tower)
            return [adapter.control(content=references, **how)]
        if name == "style":
            file = self.files["global"]
            style = condit.InstantStyle.load(file, pipe, preset="style", image_encoder=self.image)
            return [style.control(references, **how)]
        adapter = IPAdapter.load(self.files[name], pipe, image_encoder=self.image, head_dim=8)
        return [adapter.control(references, **how)]


@pytest.fixture(scope="module")
def pairs(make_sd, make_deadiff, tmp_path_factory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(kind: str) -> Pair:
        if kind in made:
            return made[kind]
        folder = tmp_path_factory.mktemp("models")
        theirs = make_sd(kind)
        theirs.save_pretrained(folder / kind)
        ours = condit.load(folder / kind)
        width = ours.backbone.config.cross_attention_dim
        with torch.random.fork_rng():
            torch.manual_seed(1)
            image = encoder()
            projector = Resampler(16, 8, width, inner=8, heads=1, depth=1, hidden=16, queries=3)
            adapters: dict[str, Any] = {
                "global": IPAdapter.new(ours, IPConfig(12, 3, width)),
                "plus": IPAdapter.new(ours, IPConfig(16, 3, width, feature="hidden"), projector=projector),
                "lora": LoRA(linear_shapes(ours.backbone, ("to_q", "ff.net.2", "proj_in")), 2),
            }
            tensors = {name: shaken(adapter, 0.3).tensors() for name, adapter in adapters.items()}
        tensors["lora"] = {n.replace("transformer.", "unet.", 1): t for n, t in tensors["lora"].items()}
        files = {name: save_tensors(folder / name, found) for name, found in tensors.items()}
        deadiff = make_deadiff(ours)
        config = {"condit": deadiff.metadata()}
        files["deadiff"] = save_tensors(folder / "deadiff", deadiff.tensors(), config)
        made[kind] = Pair(theirs, ours, files, image, deadiff.tower)
        return made[kind]

    return get


def noise(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, prompts: str | Sequence[str] = PROMPTS[0], **given: Any) -> Tensor:
    """Latents of either pipeline or of a guest."""
    start = noise(1 if isinstance(prompts, str) else len(prompts))
    return pipe(prompts, **{"latents": start, **GIVEN, **given}).images


def close(found: Tensor, expected: Tensor) -> None:
    # Sums in another order, over a few guided steps of a network that amplifies; values reach 10.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@every_kind
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", ["global", "plus", "style", "deadiff", "lora", "all"])
def test_a_guest_draws_what_condits_own_pipeline_draws(pairs, pictures, kind, name, guidance):
    pair, references = pairs(kind), pictures(2)
    with attach(pair.theirs) as guest:
        found = draw(guest, PROMPTS, controls=pair.controls(guest, name, references), guidance_scale=guidance)
    controls = pair.controls(pair.ours, name, references)
    close(found, draw(pair.ours, PROMPTS, controls=controls, guidance_scale=guidance))
    assert (found - draw(pair.theirs, PROMPTS, guidance_scale=guidance)).abs().max() > 1e-2


@every_kind
def test_all_of_them_act_in_one_call_in_any_order(pairs, pictures, kind):
    """IP-Adapter in a region, InstantStyle, DEADiff's content and a LoRA."""
    pair = pairs(kind)
    guest = attach(pair.theirs)
    controls = pair.controls(guest, "all", pictures(1)[0])
    whole = draw(guest, controls=controls)
    close(draw(guest, controls=controls[::-1]), whole)
    for left_out in range(len(controls)):
        others = [control for i, control in enumerate(controls) if i != left_out]
        assert (draw(guest, controls=others) - whole).abs().max() > 1e-3


@every_kind
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_references_of_a_batch_equal_single_runs(pairs, pictures, kind, guidance):
    pair, references, start = pairs(kind), pictures(4), noise(4)
    prompts = [*PROMPTS, "a fox", "snow"]
    with attach(pair.theirs) as guest:
        how = {"guidance_scale": guidance}
        batch = draw(guest, prompts, controls=pair.controls(guest, "all", references), latents=start, **how)
        for i, prompt in enumerate(prompts):
            alone = pair.controls(guest, "all", references[i])
            close(batch[i : i + 1], draw(guest, prompt, controls=alone, latents=start[i : i + 1], **how))


@every_kind
def test_negative_prompts_and_copies_stand_where_diffusers_puts_them(pairs, pictures, kind):
    pair, references, start = pairs(kind), pictures(2), noise(4)
    given = {"negative_prompt": ["snow", "a fox"], "num_images_per_prompt": 2, "latents": start}
    found = draw(guest := attach(pair.theirs), PROMPTS, controls=pair.controls(guest, "all", references), **given)
    controls = pair.controls(pair.ours, "all", references)
    close(found, draw(pair.ours, PROMPTS, controls=controls, **given))


# Plain, and left as it was


@every_kind
def test_without_an_acting_control_a_guest_is_the_plain_pipeline_bit_by_bit(pairs, pictures, kind):
    pair, picture = pairs(kind), pictures(1)[0]
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
def test_leaving_leaves_the_pipeline_as_it_was(pairs, pictures, kind):
    pair, pipe = pairs(kind), pairs(kind).theirs
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
def test_the_lent_layers_hold_the_very_parameters_of_the_unet(pairs, kind):
    pair = pairs(kind)
    lent = {id(p) for p in attach(pair.theirs).backbone.parameters()}
    assert lent == {id(p) for p in pair.theirs.unet.parameters()}


def test_the_text_is_projected_once_a_run_and_the_unet_itself_predicts_where_no_control_acts(pairs, pictures):
    pair, ran, counts = pairs("sd15"), [], []
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


def test_a_calls_keys_and_values_end_with_it(pairs, pictures):
    """No circle of references keeps them until memory is searched for such."""
    pair = pairs("sd15")
    guest = attach(pair.theirs)
    controls = pair.controls(guest, "global", pictures(1)[0])
    gc.collect()
    gc.disable()
    try:
        draw(guest, controls=controls)
        left = [found for found in gc.get_objects() if type(found) is ControlledUNet]
    finally:
        gc.enable()
    assert left == []


# What diffusers brings along


class Present(Control):
    """Does nothing, but acts: the prediction is condit's."""

    def around(self, call, attend):
        return attend(call)

    def negative(self) -> Control:
        return self


def controlnet(unet: Any) -> Any:
    torch.manual_seed(3)
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))  # halves once
    return shaken(made.eval(), 0.2)  # it starts with layers of zeros


PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
MASK = (torch.arange(32) < 16).float().expand(1, 1, 32, 32)


def asked(name: str) -> dict[str, Any]:
    """The arguments of a kind of pipeline."""
    change = "Img2Img" in name or "Inpaint" in name
    found: dict[str, Any] = {"image": PICTURE, "strength": 0.8} if change else {"latents": noise(1)}
    if "Inpaint" in name:
        found |= {"mask_image": MASK, "height": 32, "width": 32}
    if "ControlNet" in name:
        found["control_image" if change else "image"] = PICTURE
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_every_host_draws_the_same_by_condits_prediction_and_takes_controls(pairs, pictures, name):
    pair = pairs("sdxl" if "XL" in name else "sd15")
    host = pair.host(name, **({"controlnet": controlnet(pair.theirs.unet)} if "ControlNet" in name else {}))

    def call(pipe: Any, **given: Any) -> Tensor:
        start = torch.Generator().manual_seed(4)
        return pipe("a red fox", generator=start, **{**GIVEN, "num_inference_steps": 4, **asked(name), **given}).images

    with attach(host) as guest:
        plain = call(host)
        assert torch.equal(call(guest), plain)
        close(call(guest, controls=[Present()]), plain)
        controlled = call(guest, controls=pair.controls(guest, "all", pictures(1)[0]))
    assert (controlled - plain).abs().max() > 1e-2
    assert torch.equal(call(host), plain)
    if "ControlNet" in name:
        assert (plain - call(host, controlnet_conditioning_scale=0.0)).abs().max() > 1e-2


@every_kind
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_controlnet_adds_up_with_controls_in_each_of_its_modes(pairs, pictures, kind, guess, guidance):
    """Guess mode leaves the negative side alone; a LoRA makes the sides run apart."""
    pair, xl = pairs(kind), "XL" if kind == "sdxl" else ""
    host = pair.host(f"StableDiffusion{xl}ControlNetPipeline", controlnet=controlnet(pair.theirs.unet))
    given = {"image": PICTURE, "guess_mode": guess, "guidance_scale": guidance, "prompts": PROMPTS}
    none = pair.controls(guest := attach(host), "global", pictures(1)[0], strength=1e-9)
    lora = [StyleLoRA.load(pair.files["lora"], guest).control(1e-9)]
    plain = draw(host, **given)
    close(draw(guest, controls=[Present()], **given), plain)
    close(draw(guest, controls=[*none, *lora], **given), plain)


def test_a_lora_of_diffusers_acts_beside_controls(pairs, pictures):
    peft = pytest.importorskip("peft")
    pair = pairs("sd15")
    unet = copy.deepcopy(pair.theirs.unet)
    targets = ["to_q", "to_v", "ff.net.0.proj", "proj_in", "time_emb_proj"]
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    host = pair.host("StableDiffusionPipeline", unet=unet)
    close(draw(attach(host), controls=[Present()]), draw(host))
    assert (draw(host) - draw(pair.theirs)).abs().max() > 1e-2
    guest = attach(host)
    both = draw(guest, controls=pair.controls(guest, "all", pictures(1)[0]))
    assert (both - draw(host)).abs().max() > 1e-2


def test_an_offloaded_unet_draws_the_same(pairs, pictures):
    """Sequential offloading brings each layer in by a hook of its own; the weights rest on no device."""
    from accelerate import cpu_offload

    pair = pairs("sdxl")
    unet = copy.deepcopy(pair.theirs.unet)
    cpu_offload(unet, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in unet.parameters())
    with attach(pair.host("StableDiffusionXLPipeline", unet=unet)) as guest, attach(pair.theirs) as plain:
        found = draw(guest, controls=pair.controls(guest, "all", pictures(1)[0]))
        close(found, draw(plain, controls=pair.controls(plain, "all", pictures(1)[0])))


def test_layers_stored_in_8_bits_are_lent_as_they_are(pairs, pictures):
    """A hook on each layer casts its weights for its use."""
    pair = pairs("sd15")
    unet = copy.deepcopy(pair.theirs.unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    host = pair.host("StableDiffusionPipeline", unet=unet)
    guest, plain = attach(host), draw(host)
    close(draw(guest, controls=[Present()]), plain)
    assert guest.dtype == torch.float32
    assert (draw(guest, controls=pair.controls(guest, "all", pictures(1)[0])) - plain).abs().max() > 1e-2


def test_a_compiled_unet_is_taken(pairs):
    host = pairs("sd15").host("StableDiffusionPipeline")
    host.unet = torch.compile(host.unet, backend="eager")
    close(draw(attach(host), controls=[Present()]), draw(pairs("sd15").theirs))


def test_words_are_subtracted_by_sdxls_own_text_tower(pairs, pictures):
    pair = pairs("sdxl")
    guest = attach(pair.theirs)
    style = condit.InstantStyle.load(pair.files["global"], guest, image_encoder=pair.image)
    assert isinstance(style.text, TextTower) and style.text.model is pair.theirs.text_encoder_2
    other = condit.InstantStyle.load(pair.files["global"], pair.ours, image_encoder=pair.image)
    words = {"content": "a fox", "content_scale": 0.5}
    found, expected = (s.control(pictures(1)[0], **words) for s in (style, other))
    path = next(iter(found.kv))  # type: ignore[attr-defined]
    close(found.kv[path][0], expected.kv[path][0])  # type: ignore[attr-defined]
    plain = style.control(pictures(1)[0])
    assert not torch.equal(found.kv[path][0], plain.kv[path][0])  # type: ignore[attr-defined]
    alone = condit.InstantStyle.load(
        pairs("sd15").files["global"], attach(pairs("sd15").theirs), image_encoder=pair.image
    )
    assert alone.text is None  # SD 1.x has no projection


@every_kind
def test_deadiffs_content_layers_may_read_another_prompt(pairs, pictures, kind):
    pair, found = pairs(kind), []
    for pipe in (attach(pair.theirs), pair.ours):
        controls = pair.controls(pipe, "deadiff", pictures(1)[0], content_prompt="snow")
        found.append(draw(pipe, controls=controls))
    close(*found)
    guest = attach(pair.theirs)
    assert (found[0] - draw(guest, controls=pair.controls(guest, "deadiff", pictures(1)[0]))).abs().max() > 1e-3


# What is refused


def test_what_a_unet_does_not_take_is_told_before_drawing(pairs, pictures, make_omini, make_pipe):
    pair = pairs("sd15")
    guest = attach(pair.theirs)
    omini = make_omini(make_pipe(), seed=1).control(pictures(1)[0])
    assert isinstance(omini.adapter, OminiControl) and isinstance(omini.adapter.config, OminiConfig)
    with pytest.raises(ValueError, match="joins tokens to the sequence, and a UNet has none"):
        draw(guest, controls=[omini])
    with pytest.raises(ValueError, match="controls must be made by adapter.control"):
        draw(guest, controls=["style"])
    foreign = pairs("sdxl").controls(pairs("sdxl").ours, "global", pictures(1)[0])
    with pytest.raises(ValueError, match="loaded for sdxl, whose unet is not like that of"):
        draw(guest, controls=foreign)
    foreign = pairs("sdxl").controls(pairs("sdxl").ours, "deadiff", pictures(1)[0])
    with pytest.raises(ValueError, match="DEADiff .* was loaded for sdxl"):
        draw(guest, controls=foreign)
    controls = pair.controls(guest, "global", pictures(3))
    with pytest.raises(ValueError, match="3 references for 2 images"):
        draw(guest, PROMPTS, controls=controls)
    with pytest.raises(ValueError, match=r"cross_attention_kwargs \['scale'\].*set_adapters"):
        draw(guest, controls=[Present()], cross_attention_kwargs={"scale": 0.5})


def test_adapters_of_another_base_or_encoder_are_told(pairs, make_deadiff):
    guest = attach(pairs("sd15").theirs)
    with pytest.raises(ValueError, match="made for another base"):
        IPAdapter.load(pairs("sdxl").files["global"], guest, image_encoder=pairs("sdxl").image)
    with pytest.raises(ValueError, match="Was it made for another model|DEADiff was made for"):
        condit.DEADiff.load(pairs("sdxl").files["deadiff"], guest, image_encoder=pairs("sdxl").tower)
    with pytest.raises(ValueError, match="needs image embeddings"):
        IPAdapter.load(pairs("sd15").files["global"], guest)


def test_what_diffusers_put_into_the_unet_is_not_left_out_silently(pairs):
    host = pairs("sd15").host("StableDiffusionPipeline", unet=copy.deepcopy(pairs("sd15").theirs.unet))
    guest = attach(host)
    host.enable_freeu(0.9, 0.2, 1.2, 1.4)
    draw(guest)  # without controls it is diffusers' own
    with pytest.raises(ValueError, match="FreeU.*disable_freeu"):
        draw(guest, controls=[Present()])
    host.disable_freeu()
    close(draw(guest, controls=[Present()]), draw(pairs("sd15").theirs))

    class Other(nn.Module):
        def forward(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    host.unet.set_attn_processor(Other())
    with pytest.raises(ValueError, match="Other of diffusers.*set_default_attn_processor"):
        draw(guest, controls=[Present()])


def test_other_pipelines_and_networks_are_refused_by_name(pairs):
    pair = pairs("sd15")
    with pytest.raises(ValueError, match="attach takes diffusers' .*StableDiffusionPipeline.*; found Pipeline"):
        attach(pair.ours)
    odd = copy.copy(pair.theirs)
    vars(odd)["unet"] = nn.Identity()
    with pytest.raises(ValueError, match="unet of this StableDiffusionPipeline must be .*UNet2DConditionModel; found"):
        attach(odd)
    unet = copy.deepcopy(pair.theirs.unet)
    unet.register_to_config(class_embed_type="timestep")
    vars(odd)["unet"] = unet
    with pytest.raises(ValueError, match="class_embed_type = 'timestep', which Stable Diffusion's does not have"):
        attach(odd)
    with pytest.raises(ValueError, match=r"multiples of 2; found \(33, 32\)"):
        attach(pair.theirs, size=(33, 32))
    guest = attach(pair.theirs)
    assert isinstance(guest, Guest) and guest.size == (32, 32)


def test_group_offloading_is_refused_beside_controls_only(pairs):
    pair = pairs("sd15")
    unet = copy.deepcopy(pair.theirs.unet)
    unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    guest = attach(pair.host("StableDiffusionPipeline", unet=unet))
    assert torch.equal(draw(guest), draw(pair.theirs))
    with pytest.raises(ValueError, match="Group offloading.*enable_model_cpu_offload"):
        draw(guest, controls=[Present()])


def test_the_residuals_of_a_controlnet_must_be_as_many_as_the_skips(pairs):
    backbone = borrow(pairs("sd15").theirs.unet)
    given = torch.randn(1, 4, 16, 16), torch.tensor([5.0]), torch.randn(1, 3, 10)
    with pytest.raises(ValueError, match="zip"):
        backbone(*given, residuals=[torch.zeros(1)] * 2)
