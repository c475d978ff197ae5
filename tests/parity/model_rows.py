"""The rows of docs/files.md: models as single files and folders, and IP-Adapters, each with a check on a sample."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import condit
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import Resampler
from condit.drawing.pipeline import Pipeline
from condit.weights.files import save_tensors
from condit.weights.ip_files import read_layout
from condit.weights.ip_projectors import projector_of
from condit.weights.load import identify, kind_of_tensors
from condit.weights.original_sd import ORIGINALS, load_original
from file_rows import Row, World
from single_files import single_file

HOW: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}


def noise() -> Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


# Single files


def in_one_file(world: World, kind: str, marks: Iterable[str] = ()) -> Pipeline:
    """A random pipeline written as one file, with the empty tensors that trainers add, and loaded."""
    pipe = world.theirs(kind)
    pipe.save_pretrained(world.folder / kind)
    file = world.folder / "model.safetensors"
    originals = {n: replace(o, process=ORIGINALS[n].process) for n, o in single_file(pipe, file, kind).items()}
    save_file(load_file(file) | {name: torch.zeros(0) for name in marks}, file)
    return Pipeline(load_original(identify(file).path, torch.float32, "model", originals, tokenizer=pipe.tokenizer))


def equals_pipeline(world: World, kind: str, marks: Iterable[str] = (), **scheduler: Any) -> None:
    """The latents are those of diffusers' pipeline with this Euler scheduler."""
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    ours, theirs = in_one_file(world, kind, marks), world.theirs(kind)
    process = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    before = theirs.scheduler
    theirs.scheduler = EulerDiscreteScheduler(**{**process, **scheduler})
    try:
        wanted = theirs("a red fox", latents=noise(), **HOW).images
    finally:
        theirs.scheduler = before
    actual = ours("a red fox", latents=noise(), sampler="euler", **HOW).images
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-3)


def refuses_mark(world: World, mark: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        in_one_file(world, "sdxl", [mark])


def refuses_width(world: World) -> None:
    """A UNet that reads text of a width that no supported model has (SD 2.x: 1024, the refiner: 1280)."""
    world.theirs("sd15").save_pretrained(world.folder / "sd15")
    single_file(world.theirs("sd15"), world.folder / "model.safetensors", "sd15")
    with pytest.raises(ValueError, match=re.escape("a UNet that reads text of width")):
        condit.load(world.folder / "model.safetensors")


def file_rows() -> list[Row]:
    sd, xl, latents = "SD 1.x", "SDXL", "diffusers' pipeline, latents"
    noob = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    cosxl, playground = "marks a CosXL", "marks a Playground 2.5"
    return [
        Row("one file of the authors", sd, "exact", latents, partial(equals_pipeline, kind="sd15")),
        Row(
            "one file of the authors",
            xl,
            "exact",
            latents,
            partial(equals_pipeline, kind="sdxl", timestep_spacing="leading"),
        ),
        Row(
            "one file with `v_pred`",
            xl,
            "exact",
            latents,
            partial(
                equals_pipeline,
                kind="sdxl",
                marks=["v_pred"],
                prediction_type="v_prediction",
                timestep_spacing="leading",
            ),
        ),
        Row(
            "one file with `v_pred` and `ztsnr` (NoobAI)",
            xl,
            "exact",
            latents,
            partial(equals_pipeline, kind="sdxl", marks=["v_pred", "ztsnr"], **noob),
        ),
        Row(
            "one file with `edm_vpred.sigma_max`",
            "CosXL",
            "refused",
            cosxl,
            partial(refuses_mark, mark="edm_vpred.sigma_max", words=cosxl),
        ),
        Row(
            "one file with `edm_mean`",
            "Playground 2.5",
            "refused",
            playground,
            partial(refuses_mark, mark="edm_mean", words=playground),
        ),
        Row(
            "one file of the authors",
            "SD 2.x, SDXL's refiner",
            "refused",
            "a UNet that reads text of width",
            refuses_width,
        ),
        *(
            Row("one file", name, "refused", "No model", partial(refuses_names, names=names))
            for name, names in OTHERS.items()
        ),
    ]


# A tensor's name that other models have.
OTHERS = {
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "PixArt of its authors": ["blocks.0.cross_attn.q_linear.weight", "y_embedder.y_proj.fc1.weight"],
}


def refuses_names(world: World, names: list[str]) -> None:
    assert kind_of_tensors(names) is None
    save_file({name: torch.zeros(1) for name in names}, world.folder / "other.safetensors")
    with pytest.raises(ValueError, match="No model.*It looks like"):
        condit.load(world.folder / "other.safetensors")


# Folders


def loads_folder(world: World, kind: str, **unet: Any) -> None:
    pipe = world.make(kind, **unet) if unet else world.theirs(kind)
    pipe.save_pretrained(world.folder / "model")
    ours = condit.load(world.folder / "model")
    given = {"latents": noise(), **HOW}
    torch.testing.assert_close(
        ours("a red fox", **given).images, pipe("a red fox", **given).images, rtol=1e-5, atol=1e-4
    )


def refuses_folder(world: World, words: str, kind: str = "sd15", **unet: Any) -> None:
    world.make(kind, **unet).save_pretrained(world.folder / "model")
    with pytest.raises(ValueError, match=re.escape(words)):
        condit.load(world.folder / "model")


def given_autoencoder(world: World, kind: str) -> None:
    """`vae=`: the folder, the file in the authors' names, the module; each decodes as diffusers' does."""
    pipe = world.theirs("sd15")
    pipe.save_pretrained(world.folder / "model")
    other = type(pipe.vae).from_config(pipe.vae.config).eval()
    other.save_pretrained(world.folder / "other")
    pipe.vae, before = other, pipe.vae
    try:
        single_file(pipe, world.folder / "vae.safetensors", "model")
    finally:
        pipe.vae = before
    z = noise() / other.config.scaling_factor
    wanted = other.decode(z).sample
    for source in (world.folder / "other", world.folder / "vae.safetensors", other):
        actual = condit.load(world.folder / "model", vae=source)
        torch.testing.assert_close(actual.parts.vae.decode(z).sample, wanted, rtol=0, atol=0)


def folder_rows() -> list[Row]:
    def same(layout: str, base: str, kind: str, **unet: Any) -> Row:
        return Row(layout, base, "exact", "diffusers' pipeline, latents", partial(loads_folder, kind=kind, **unet))

    def refused(layout: str, base: str, words: str, **given: Any) -> Row:
        return Row(layout, base, "refused", words, partial(refuses_folder, words=words, **given))

    folder = "folder of diffusers"
    ssd = {"transformer_layers_per_block": [1, 2], "reverse_transformer_layers_per_block": [[2, 1], 1]}
    refiner, lcm = (
        "SDXL's refiner, which is told an aesthetic score, is not supported",
        "a UNet that is told the guidance scale",
    )
    return [
        same(folder, "SD 1.x", "sd15"),
        same(folder, "SDXL", "sdxl"),
        same(f"{folder}, no middle block", "BK-SDM", "sd15", mid_block_type=None),
        same(f"{folder}, depths of its own on the way up", "SSD-1B", "sdxl", **ssd),
        same(f"{folder}, `cross_attention_dim` for each level", "SD 1.x", "sd15", cross_attention_dim=[10, 10]),
        Row(
            "another autoencoder: `vae=` a folder, a file or a module",
            "SD 1.x",
            "exact",
            "diffusers' decoder",
            partial(given_autoencoder, kind="sd15"),
        ),
        refused(
            f"{folder}, levels that read texts of several widths",
            "other UNets",
            "the levels of the UNet read one width",
            cross_attention_dim=[10, 12],
        ),
        refused(f"{folder}, `time_cond_proj_dim`", "LCM", lcm, time_cond_proj_dim=8),
        refused(folder, "SDXL's refiner", refiner, kind="sdxl", projection_class_embeddings_input_dim=32),
        refused(f"{folder}, `class_embed_type`", "other UNets", "class_embed_type", class_embed_type="timestep"),
    ]


# IP-Adapters


def adapter_tensors(world: World, projector: Any = None, feature: Any = "hidden") -> dict[str, Tensor]:
    """An IP-Adapter in the official names for a random SD 1.x."""
    world.theirs("sd15").save_pretrained(world.folder / "model")
    pipe = condit.load(world.folder / "model")
    config = IPConfig(16, 3, 10, feature=feature) if projector is not None else IPConfig(12, 3, 10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = IPAdapter.new(pipe, config, projector=projector)
        for tensor in adapter.parameters():
            torch.nn.init.normal_(tensor, std=0.3)
    return {name: tensor.detach() for name, tensor in adapter.tensors().items()}


def reads_as(
    world: World, spell: Callable[[dict[str, Tensor]], dict[str, Tensor]], projector: Callable | None = None
) -> None:
    """A spelling is read under the official names, tensor by tensor, and its projector is built."""
    official = adapter_tensors(world, None if projector is None else projector())
    save_tensors(world.folder / "adapter.safetensors", spell(official))
    actual = read_layout(load_file(world.folder / "adapter.safetensors"), "adapter")
    named = {f"image_proj.{n}": t for n, t in actual.projector.items()}
    named |= {f"ip_adapter.{n}.{part}": t for n, parts in actual.layers.items() for part, t in parts.items()}
    assert named.keys() == official.keys()
    for name, tensor in official.items():
        assert torch.equal(named[name], tensor), name
    projector_of(actual.projector, 64)


def plus() -> Resampler:
    return Resampler(16, 8, 10, inner=64, heads=1, depth=4, hidden=32, queries=3)


def by_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A "plus" projector as diffusers' loader names it."""
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    own = {n.removeprefix("image_proj."): t for n, t in tensors.items() if n.startswith("image_proj.")}
    made = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(own, low_cpu_mem_usage=False)
    others = {n: t for n, t in tensors.items() if not n.startswith("image_proj.")}
    return others | {f"image_proj.{n}": t for n, t in made.state_dict().items()}


def trainer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {n.replace("image_proj.", "image_proj_model.", 1): t for n, t in tensors.items()}
    return {n.replace("ip_adapter.", "adapter_modules.", 1): t for n, t in renamed.items()}


def refuses_instantx(world: World) -> None:
    from condit.weights.ip_load import own_parts

    with pytest.raises(ValueError, match="InstantX's are not"):
        own_parts({"ip_adapter.0.to_k_ip.weight": torch.zeros(1)}, {}, "ip-adapter.bin", object())  # type: ignore[arg-type]


def adapter_rows() -> list[Row]:
    def same(layout: str, spell: Callable, projector: Callable | None = None) -> Row:
        check = partial(reads_as, spell=spell, projector=projector)
        return Row(layout, "SD 1.x, SDXL", "exact", "the official names, every tensor", check)

    return [
        same("h94: `image_proj.*`, `ip_adapter.N.*`", dict),
        same("a checkpoint of the official trainer: `image_proj_model.*`", trainer),
        same('"plus" in the official names', dict, plus),
        same('"plus" in diffusers\' names: `layers.0.attn.to_q`', by_diffusers, plus),
        Row("InstantX's for FLUX.1", "FLUX.1", "refused", "InstantX's are not", refuses_instantx),
    ]
