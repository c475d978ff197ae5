"""IP-Adapter (arXiv:2308.06721) against fixtures: tensors written by the official classes, and by diffusers for masks
and for the adapters of transformers. Tolerances are those of the fixtures' README.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.backbones.unet import UNetContext
from condit.controls.control import Control, Run, Step, region_levels
from condit.controls.host import Host
from condit.controls.ip_adapter import IPAdapter, IPConfig, IPReference
from condit.controls.ip_projectors import ImageProjection
from condit.nn.attention import split_heads
from condit.nn.streams import Stream
from condit.weights.catalog import AdapterFile, read_adapter
from condit.weights.ip_files import read_layout
from condit.weights.ip_projectors import projector_of
from condit_lab.parity.check import Check, Differences, compare, difference, part
from condit_lab.parity.sd3 import SD3Adapter, sd3_adapter
from condit_lab.parity.unets import CALL, TOKENS, TRAJECTORY, GoldenPipe, golden_pipe, unet_of


@cache
def adapter_of(folder: Path, tag: str, variant: str, ending: str = "safetensors") -> IPAdapter:
    pipe = golden_pipe(folder, tag)
    return IPAdapter.load(pipe.file(f"{variant}_adapter.{ending}"), cast("Host", pipe), head_dim=pipe.head_dim)


def features(pipe: GoldenPipe, variant: str) -> tuple[Tensor, Tensor]:
    """What the projector reads of the fixture's images, and of none."""
    given = pipe.tensors("inputs")
    if variant == "global":
        return given["clip_image_embeds"], torch.zeros_like(given["clip_image_embeds"])
    return given["clip_hidden_penultimate"], given["clip_hidden_penultimate_zero_image"]


@torch.no_grad()
def reference(folder: Path, tag: str, variant: str, strength: float = 1.0) -> IPReference:
    given, empty = features(golden_pipe(folder, tag), variant)
    return adapter_of(folder, tag, variant).reference(given, strength, empty=empty)


# Stable Diffusion


@torch.no_grad()
def compare_encoder(folder: Path, name: str) -> Differences:
    """*_inputs: what the image encoder says of the images and of a black one."""
    pipe = golden_pipe(folder, name.removesuffix("_inputs"))
    given, encoder = pipe.tensors("inputs"), pipe.image
    assert encoder is not None
    zeros = encoder.hidden(encoder.zeros())
    outputs = {
        "clip_image_embeds": encoder.embeds(given["pixel_values"]),
        "clip_hidden_penultimate": encoder.hidden(given["pixel_values"]),
        "clip_hidden_penultimate_zero_image": zeros.expand_as(given["clip_hidden_penultimate_zero_image"]),
    }
    return compare(outputs, given, "clip_")


def compare_plain(folder: Path, name: str) -> Differences:
    """*_inputs: the UNet alone."""
    pipe = golden_pipe(folder, name.removesuffix("_inputs"))
    given = pipe.tensors("inputs")
    return {"noise_pred/no_adapter": difference(pipe.predict(given), given["noise_pred/no_adapter"])}


@torch.no_grad()
def compare_tokens(folder: Path, name: str) -> Differences:
    """The projector's tokens, of images and of none; K', V' of every layer."""
    tag, _, variant = name.partition("_")
    pipe, adapter = golden_pipe(folder, tag), adapter_of(folder, tag, variant)
    given, empty = features(pipe, variant)
    outputs = {"tokens": adapter.tokens(given), "uncond_tokens": adapter.tokens(empty)}
    (acting,) = pipe.at_work(reference(folder, tag, variant, 0.5), len(given))
    assert isinstance(acting, IPReference)
    recorded = pipe.tensors(variant)
    for path in layers_of(recorded):
        key, value = (x.transpose(1, 2).flatten(2) for x in acting.kv[path])
        outputs |= {f"layer/{path}/k_ip": key, f"layer/{path}/v_ip": value}
    numbers = {f"{layer.path}.processor": layer.number for layer in adapter.layers}
    published = pipe.config["variants"][variant]["attn_processor_index"]
    recorded = {k: x for k, x in recorded.items() if k.endswith(("tokens", "k_ip", "v_ip")) and "noise" not in k}
    return compare(outputs, recorded) | {"numbers of the layers": float(numbers != published)}


def layers_of(recorded: dict[str, Tensor]) -> list[str]:
    return sorted({name.split("/")[1] for name in recorded if name.startswith("layer/")})


@torch.no_grad()
def compare_calls(folder: Path, name: str) -> Differences:
    """One prediction at every scale, that of the unconditional tokens, and the output of every layer."""
    tag, _, variant = name.partition("_")
    pipe, recorded = golden_pipe(folder, tag), golden_pipe(folder, tag).tensors(variant)
    given, outputs = pipe.tensors("inputs"), {}
    for key in (k for k in recorded if k.startswith("noise_pred")):
        scale = key.partition("scale_")[2]
        if scale == "1_uncond_tokens":
            control: Control = reference(folder, tag, variant).negative()
        else:
            control = reference(folder, tag, variant, float(scale))
        outputs[key] = pipe.predict(given, control)  # v1's processors write the softmax out
    (acting,) = pipe.at_work(reference(folder, tag, variant, 0.5), len(given["sample"]))
    text = pipe.backbone.text_keys_values(given["text_embeds"])
    frame = UNetContext(torch.zeros(len(given["sample"]), 1), text, None, (acting,))
    for path in layers_of(recorded):
        layer = f"layer/{path}"
        outputs[f"{layer}/out_scale_0.5"] = pipe.backbone.get_submodule(path)(recorded[f"{layer}/hidden_in"], frame)
    return compare(outputs, {k: x for k, x in recorded.items() if k.startswith("noise_pred") or "/out_" in k})


def compare_trajectory(folder: Path, name: str) -> Differences:
    """*_ddim: the latents of the official generate(), from the image on."""
    tag, variant = name.removesuffix("_ddim").split("_", 1)
    pipe, adapter = golden_pipe(folder, tag), adapter_of(folder, tag, variant)
    given = pipe.tensors(f"{variant}_ddim")
    image = Image.fromarray(given["image_uint8"].numpy())
    steps = pipe.ddim(given, adapter.control(image, strength=pipe.config["ddim"]["adapter_scale"]))
    latents = {f"latents/step_{i + 1}": x for i, x in enumerate(steps)} | {"final": steps[-1]}
    return compare(latents, {k: x for k, x in given.items() if k.startswith("latents/") or k == "final"})


@torch.no_grad()
def compare_prompts(folder: Path, name: str) -> Differences:
    """*_ddim: the image's pixels and tokens."""
    tag, variant = name.removesuffix("_ddim").split("_", 1)
    pipe, adapter = golden_pipe(folder, tag), adapter_of(folder, tag, variant)
    given, image = pipe.tensors(f"{variant}_ddim"), pipe.tensors(f"{variant}_ddim")["image_uint8"]
    assert pipe.image is not None
    read = adapter.features([Image.fromarray(image.numpy())])
    outputs = {
        "pixel_values": pipe.image.pixels([Image.fromarray(image.numpy())]),
        "image_prompt_embeds": adapter.tokens(read),
        "uncond_image_prompt_embeds": adapter.tokens(adapter.nothing(read)),
    }
    return compare(outputs, {k: x for k, x in given.items() if k in outputs})


def compare_regions(folder: Path, name: str) -> Differences:
    """*_regional_diffusers: two images, two adapters, masks."""
    pipe = golden_pipe(folder, name.removesuffix("_regional_diffusers"))
    t = pipe.tensors("regional_diffusers")
    scales = json.loads(pipe.file("regional_diffusers_config.json").read_text())["scales"]
    a, b = (IPAdapter.load(pipe.file("global_adapter.safetensors"), cast("Host", pipe)) for _ in range(2))
    b.load_state_dict(part(t, "adapter_b/"))
    first, second = t["image_embeds_a"], t["image_embeds_b"]
    of_a, of_b = scales["two_adapters_masked"]
    controls: dict[str, Sequence[Control]] = {
        "one_image": [a.control(embeds=first[:, 0], strength=scales["one_image"])],
        "two_images_token_concat": [a.control(embeds=first, strength=scales["two_images_token_concat"])],
        "two_images_embed_mean": [a.control(embeds=first, strength=scales["two_images_embed_mean"], combine="mean")],
        "two_images_two_masks": masked(a, first, t["masks_a"], scales["two_images_two_masks"]),
        "two_adapters_masked": [*masked(a, first, t["masks_a"], of_a), *masked(b, second, t["mask_b"], of_b)],
    }
    for case in ("two_adapters", "two_adapters_b_off"):
        strengths = scales[case]
        pair = a.control(embeds=first[:, :1], strength=strengths[0]), b.control(embeds=second, strength=strengths[1])
        controls[case] = pair
    predictions = {case: pipe.predict(t, *given) for case, given in controls.items()}
    return compare(predictions, {k: x for k, x in t.items() if k.startswith(("one_image", "two_"))})


def compare_masks(folder: Path, name: str) -> Differences:
    """*_regional_diffusers: the first mask on the token grid of every level."""
    t = load_file(folder / f"{name}.safetensors")
    rows, columns = t["sample"].shape[2:]
    levels = region_levels(t["masks_a"][:, 0], (rows, columns), "bicubic")
    recorded = part(t, "mask_downsampled/")
    return compare({k: levels[int(k.rpartition("_")[2])].reshape(x.shape) for k, x in recorded.items()}, recorded)


@torch.no_grad()
def masked(adapter: IPAdapter, embeds: Tensor, masks: Tensor, scales: list[float]) -> list[Control]:
    """A control for each image, in its region; bicubic as in diffusers."""
    references = [adapter.reference(embeds[:, i], scale) for i, scale in enumerate(scales)]
    return [replace(r, mask=masks[:, i], mask_mode="bicubic") for i, r in enumerate(references)]


# Projectors and training


@torch.no_grad()
def compare_projectors(folder: Path, name: str) -> Differences:
    """projections: every projector, recognised by its tensors."""
    t, outputs = load_file(folder / f"{name}.safetensors"), {}
    facts = json.loads((folder / f"{name}_config.json").read_text())
    for case in sorted({key.split("/")[0] for key in t}):
        # FaceID-Plus always has heads of 64.
        projector = projector_of(part(t, f"{case}/weights/"), head_dim=facts[case].get("dim_head", 64))
        inputs = [t[key] for key in (f"{case}/in0", f"{case}/in1") if key in t]
        if "shortcut" in facts[case]:
            outputs[f"{case}/out"] = projector(*inputs, facts[case]["scale"] if facts[case]["shortcut"] else None)
        else:
            outputs[f"{case}/out"] = projector(*inputs)
    return compare(outputs, {k: x for k, x in t.items() if k.endswith("/out")})


def training_step(folder: Path, name: str) -> dict[str, Tensor]:
    """What the fixture records of a step."""
    config, t = json.loads((folder / "train_config.json").read_text()), load_file(folder / f"{name}.safetensors")
    unet = unet_of(config["unet"], folder / "train_unet.safetensors")
    sizes = config["clip_projection_dim"], unet.config.cross_attention_dim, config["num_tokens"]
    adapter = IPAdapter.new(unet, IPConfig(sizes[0], sizes[2], sizes[1]), projector=ImageProjection(*sizes))
    fresh = {k: x.clone() for k, x in adapter.state_dict().items() if k.startswith("ip_adapter.")}
    outputs = {f"init/{k}": x for k, x in fresh.items()}  # copies of the text's K, V
    adapter.load_state_dict(part(t, "init/"))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, weight_decay=0.01)
    kept = (1 - t["drop_image_embed"])[:, None]
    pipe = GoldenPipe("train", folder, config, unet, None)
    controls = pipe.at_work(adapter.reference(t["image_embeds"] * kept), len(kept))
    outputs["noise_pred"] = unet(t["noisy_latents"], t["timesteps"].float(), t["text_embeds"], controls=controls)
    outputs["loss"] = (outputs["noise_pred"] - t["noise"]).square().mean()
    outputs["loss"].backward()
    outputs |= {f"grad/{k}": p.grad for k, p in adapter.named_parameters() if p.grad is not None}
    optimizer.step()
    outputs |= {f"after/{k}": p.detach() for k, p in adapter.named_parameters()}
    return outputs


def compare_training(folder: Path, name: str) -> Differences:
    """train_step: the loss, its gradients, and K', V' before the step: copies of the text's K, V."""
    recorded = load_file(folder / f"{name}.safetensors")
    outputs = ("init/ip_adapter.", "loss", "grad/")
    ours = {k: x for k, x in training_step(folder, name).items() if k.startswith(outputs)}
    return compare(ours, {k: x for k, x in recorded.items() if k.startswith(outputs)})


def compare_trained(folder: Path, name: str) -> Differences:
    """train_step: the weights after a step of AdamW."""
    recorded = load_file(folder / f"{name}.safetensors")
    return compare(part(training_step(folder, name), "after/"), part(recorded, "after/"))


def compare_training_prediction(folder: Path, name: str) -> Differences:
    prediction = training_step(folder, name)["noise_pred"]
    return {"noise_pred": difference(prediction, load_file(folder / f"{name}.safetensors")["noise_pred"])}


# Transformers


def flux_of(folder: Path, name: str) -> tuple[MMDiT, dict[str, Tensor]]:
    """The FLUX network of a fixture, and its tensors."""
    t, fields = load_file(folder / f"{name}.safetensors"), transformer_of(folder, name)
    model = MMDiT(MMDiTConfig(**{**fields, "axes_dims_rope": tuple(fields["axes_dims_rope"])}))
    model.load_state_dict(part(t, "weights/"), strict=True)
    return model.eval().requires_grad_(False), t


@dataclass
class FluxPipe:
    """What an adapter asks of a pipeline, over the FLUX network of a fixture."""

    backbone: MMDiT
    image: object
    name: str = "golden"
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def adapter_file(self, source: Path, method: str) -> AdapterFile:
        return read_adapter(source, method)


@dataclass
class WidthOnlyEncoder:
    """Stands for the image encoder: the fixture holds its embeddings of this width."""

    features: int


def flux_adapter(model: MMDiT, tensors: dict[str, Tensor], width: int) -> IPAdapter:
    """An adapter through the loader of files."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "adapter.safetensors"
        save_file(tensors, file)
        return IPAdapter.load(file, cast("Host", FluxPipe(model, WidthOnlyEncoder(width))))


def transformer_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}_config.json").read_text())["transformer"]


@torch.no_grad()
def compare_flux(folder: Path, name: str) -> Differences:
    """dit_flux: tokens and predictions with XLabs' adapter."""
    model, t = flux_of(folder, name)
    adapter = flux_adapter(model, part(t, "adapter/"), t["image_embeds"].shape[-1])
    image = Stream(t["hidden_states"], t["img_ids"], t["timestep"], t["pooled"], t["guidance"])
    grid = tuple(int(n) + 1 for n in t["img_ids"][:, 1:].amax(0))
    run = Run(model, len(t["pooled"]), grid, t["pooled"], t["guidance"], model.config.in_channels)  # type: ignore[arg-type]
    outputs = {"image_tokens": adapter.tokens(t["image_embeds"]).reshape(t["image_tokens"].shape)}
    for key in (k for k in t if k.startswith("out/")):
        acting = []
        if key != "out/no_adapter":
            control = adapter.control(embeds=t["image_embeds"], strength=float(key.removeprefix("out/scale_")))
            acting = [c for c in [control.prepare(run).at(Step(0, 1, 1.0))] if c is not None]
        outputs[key] = model(image, t["encoder_hidden_states"], t["txt_ids"], controls=acting)
    return compare(outputs, {k: x for k, x in t.items() if k.startswith("out/") or k == "image_tokens"})


def recorded_sd3(folder: Path, tensors: dict[str, Tensor], name: str = "dit_sd3") -> SD3Adapter:
    config = json.loads((folder / f"{name}_config.json").read_text())
    sizes = config["transformer"]["attention_head_dim"], config["image_proj"]["dim_head"]
    return sd3_adapter(read_layout(tensors, name), *sizes).eval().requires_grad_(False)


@torch.no_grad()
def compare_sd3(folder: Path, name: str) -> Differences:
    """dit_sd3: tokens and clock at each row's time; our branch within diffusers' transformer."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    t = load_file(folder / f"{name}.safetensors")
    adapter = recorded_sd3(folder, part(t, "adapter_diffusers/"), name)
    model = SD3Transformer2DModel(**transformer_of(folder, name)).eval().requires_grad_(False)
    model.load_state_dict(part(t, "weights/"), strict=True)
    given = {key: t[key] for key in ("hidden_states", "encoder_hidden_states", "timestep")}
    tokens, clock = adapter.tokens(t["image_hidden"], t["timestep"])
    outputs = {"image_tokens": tokens, "time_emb": clock}
    for key in sorted(k for k in t if k.startswith("out/")):  # that without an adapter is first
        if key != "out/no_adapter":
            strength = float(key.removeprefix("out/scale_"))
            for i, block in enumerate(model.transformer_blocks):
                branch = adapter.ip_adapter[str(i)]
                block.attn.set_processor(Branched(branch, branch.keys_values(tokens, clock), strength))  # type: ignore[operator]
        outputs[key] = model(**given, pooled_projections=t["pooled"], return_dict=False)[0]
    return compare(outputs, {k: x for k, x in t.items() if k.startswith("out/") or k in outputs})


class Branched:
    """diffusers' joint attention, with our branch added in front of the output projection."""

    def __init__(self, branch, added, strength: float):
        self.branch, self.added, self.strength = branch, added, torch.tensor(strength)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        def qkv(x, linears, norms):
            q, k, v = (split_heads(linear(x), attn.heads) for linear in linears)
            return norms[0](q), norms[1](k), v, q, k

        image = qkv(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        linears = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        text = qkv(encoder_hidden_states, linears, (attn.norm_added_q, attn.norm_added_k))
        q, k, v = (torch.cat([i, t], 2) for i, t in zip(image[:3], text[:3], strict=True))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        n = hidden_states.shape[1]
        own = out[:, :n] + self.branch(image[3], image[4], image[2], self.added, self.strength)
        rest = out[:, n:] if attn.context_pre_only else attn.to_add_out(out[:, n:])
        return attn.to_out[0](own), rest


_CODE, _DIFFUSERS = "official code", "diffusers 0.42.1"
_VARIANTS = "*_global.safetensors *_plus.safetensors *_full.safetensors"
_INPUTS, _DDIM = "sd*_inputs.safetensors", "*_ddim.safetensors"
_TRAIN, _REGIONS = "train_step*.safetensors", "*_regional_diffusers.safetensors"
CHECKS = (
    Check("image encoder", _CODE, TOKENS, _INPUTS, compare_encoder),
    Check("UNet without an adapter", _CODE, CALL, _INPUTS, compare_plain),
    Check("tokens, K', V' of every layer", _CODE, TOKENS, _VARIANTS, compare_tokens),
    Check("UNet at every strength, every layer's output", _CODE, CALL, _VARIANTS, compare_calls),
    Check("image to tokens", _CODE, TOKENS, _DDIM, compare_prompts),
    Check("4 guided DDIM steps", _CODE, TRAJECTORY, _DDIM, compare_trajectory),
    Check("projectors", _CODE, TOKENS, "projections*.safetensors", compare_projectors),
    Check("training step: prediction", _CODE, CALL, _TRAIN, compare_training_prediction),
    # A gradient moves AdamW by a thousandth of a step at worst.
    Check("training step: loss, gradients", _CODE, 1e-6, _TRAIN, compare_training),
    Check("training step: weights after AdamW", _CODE, 2e-6, _TRAIN, compare_trained),
    Check("regions, two images, two adapters", _DIFFUSERS, CALL, _REGIONS, compare_regions),
    Check("masks on every level", _DIFFUSERS, 1e-6, _REGIONS, compare_masks),
    Check("FLUX, XLabs' adapter", _DIFFUSERS, TOKENS, "dit_flux*.safetensors", compare_flux),
    Check("SD 3.5, InstantX's adapter", _DIFFUSERS, TOKENS, "dit_sd3*.safetensors", compare_sd3),
)
INPUTS = ("*_config", "*_unet", "*_clip_vision", "*_adapter")
