"""OminiControl (arXiv:2411.15098, 2503.08280) against fixtures: tensors written by the official code, both generations.

The official code runs every branch apart, ours runs them joined: sums are taken in another order, about 1.5e-6 on
outputs of deviation 1.3.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.controls.control import Control, Fill, Run, Step, When
from condit.controls.omini import OminiConfig, OminiControl, OminiReference, condition_stream
from condit.controls.omini_official import official_guidance
from condit.controls.omini_picture import from_official_mask
from condit.data.images import to_tensor
from condit.diffusion.objectives import add_noise, flow_loss
from condit.drawing.pipeline import Pipeline
from condit.encoders.text import Text
from condit.encoders.vae import encode_tokens, pack
from condit.nn.lora import LoRA
from condit.nn.streams import Sees, Stream, grid_ids
from condit.verify.check import Check, Differences, compare, difference, part
from condit.weights.load import Parts

TOLERANCE = 1e-5  # the fixtures' own


class FixedText(nn.Module):
    """Stands for the text encoders: the fixture holds their output."""

    def __init__(self, text: Text):
        super().__init__()
        self.text = text

    def forward(self, prompts: list[str]) -> Text:
        assert len(prompts) == 1
        return self.text


class Seeded(Pipeline):
    """Draws every encoding with the fixture's seed: 1234 + k for the k-th image or black image."""

    count = 0

    def encode_condition(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        self.count += 1
        return super().encode_condition(images, torch.Generator().manual_seed(1233 + self.count))


class Golden:
    """The fixtures of a folder, with the network, adapters and pipeline of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.grid: tuple[int, int] = (self.config["grid_h"], self.config["grid_w"])
        self.text_tokens: int = self.config["text_tokens"]
        self.loras = {name: self.lora(name) for name in ("canny", "subject")}

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def lora(self, name: str) -> LoRA:
        return LoRA.from_tensors(self.tensors(f"lora_{name}"))

    @cached_property
    def forward(self) -> dict[str, Tensor]:
        return self.tensors("forward")

    @cached_property
    def trajectory(self) -> dict[str, Tensor]:
        return self.tensors("trajectory")

    @cached_property
    def model(self) -> MMDiT:
        fields = self.config["transformer"]
        model = MMDiT(MMDiTConfig(**{**fields, "axes_dims_rope": tuple(fields["axes_dims_rope"])}))
        model.load_state_dict(self.tensors("transformer"), strict=True)
        return model.eval().requires_grad_(False)

    @cached_property
    def vae(self) -> nn.Module:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        vae = AutoencoderKL(**self.config["vae"])
        vae.load_state_dict(self.tensors("vae"), strict=True)
        return vae.eval().requires_grad_(False)

    def pipe(self, kind: type[Pipeline] = Pipeline) -> Pipeline:
        t = self.trajectory
        return kind(
            Parts(
                name="golden",
                hash="",
                backbone=self.model,
                text=FixedText(Text(t["text"], t["pooled"])),
                vae=self.vae,
                image=None,
                prediction="velocity",
                shift=None,
                size=(self.grid[0] * self.config["px"], self.grid[1] * self.config["px"]),
                steps=4,
                guidance=3.5,
                distilled=True,
            )
        )

    @property
    def left(self) -> Tensor:
        """Positions one width to the left."""
        return grid_ids(*self.grid, delta=(0, -self.grid[1]))

    # One prediction

    def image(self, later: bool = False, lora: LoRA | None = None) -> Stream:
        f, ending = self.forward, "_next" if later else ""
        return Stream(f[f"x{ending}"], f["img_ids"], f[f"timestep{ending}"], f["pooled"], f["guidance"], lora)

    def condition(
        self,
        which: str = "a",
        ids: str = "",
        adapter: str = "",
        *,
        sees: Sees = "main",
        gamma: float | None = None,
        weight_text: bool = True,
    ) -> Stream:
        """Of `cond_a` as edges, `cond_b` as a subject, or what is named."""
        f = self.forward
        ids = ids or {"a": "aligned", "b": "delta_minus_w"}[which]
        lora = self.loras[adapter or ("subject" if which == "b" else "canny")]
        clock = torch.zeros_like(f["timestep"])
        weight = None if gamma is None else torch.tensor(gamma).log()
        tokens, guidance = f[f"cond_{which}"], clock + 1
        return Stream(tokens, f[f"ids/{ids}"], clock, f["pooled"], guidance, lora, sees, weight, weight_text)

    @torch.no_grad()
    def predict(self, *conditions: Stream, image: Stream | None = None, controls: tuple[Control, ...] = ()) -> Tensor:
        f = self.forward
        return self.model(image or self.image(), f["text"], f["txt_ids"], conditions=conditions, controls=controls)

    # Controls

    def reference(
        self,
        tokens: Tensor,
        ids: Tensor,
        adapter: str,
        *,
        independent: bool = False,
        black: Tensor | None = None,
        given: Fill | None = None,
    ) -> OminiReference:
        control = OminiControl(self.loras[adapter], OminiConfig(independent=independent))
        black = tokens if black is None else black
        return OminiReference(tokens, black, ids, control, 1.0, When(), given=given)

    def references(self, *, independent: bool) -> list[OminiReference]:
        """Those of the file of caches."""
        f = self.forward
        pairs = ("cond_a", "aligned", "canny"), ("cond_b", "delta_minus_w", "subject")
        return [self.reference(f[x], f[f"ids/{ids}"], name, independent=independent) for x, ids, name in pairs]

    def run(self, pooled: str = "pooled") -> Run:
        f = self.forward
        return Run(self.model, len(f["x"]), self.grid, f[pooled], f["guidance"], self.model.config.in_channels)

    @torch.no_grad()
    def cached(self, pooled: str = "pooled") -> tuple[OminiReference, ...]:
        return tuple(c.prepare(self.run(pooled)) for c in self.references(independent=True))

    def encoded(self, case: str, k: int, adapter: str, ids: Tensor | None = None, **how) -> OminiReference:
        """The k-th encoding of a trajectory. The file keeps positions as encoded, before they are moved or scaled."""
        tokens = self.trajectory[f"{case}/encoded_{k}/tokens"]
        return self.reference(tokens, self.forward["img_ids"] if ids is None else ids, adapter, **how)

    def guided(self) -> list[OminiReference]:
        """The two cached conditions under image guidance; the black image of each was encoded right after it."""
        case = "image_guidance_1.5_two_kv"
        black = [self.trajectory[f"{case}/encoded_{k}/tokens"] for k in (1, 3)]
        return [
            self.encoded(case, 0, "canny", black=black[0], independent=True),
            self.encoded(case, 2, "subject", self.left, black=black[1], independent=True),
        ]

    def integrated(self, case: str, *, independent: bool) -> OminiReference:
        """The known cells of an image as the condition, the others to be generated."""
        tokens = self.trajectory[f"{case}/encoded_0/tokens"]
        mask = from_official_mask(self.trajectory["integration/condition_mask_wh"])
        known = ~mask.flatten()
        ids, given = self.forward["img_ids"][known], Fill(tokens, mask)
        return replace(
            self.encoded(case, 0, "canny", ids, independent=independent, given=given), tokens=tokens[:, known]
        )

    def cases(self) -> dict[str, list[Control]]:
        """The controls of every trajectory."""
        black = self.trajectory["image_guidance_1.5/encoded_1/tokens"]
        two = [self.encoded("two", 0, "canny"), self.encoded("two", 1, "subject", self.left)]
        small = grid_ids(self.grid[0] // 2, self.grid[1] // 2, scale=2)
        return {
            "none": [],
            "aligned": [self.encoded("aligned", 0, "canny")],
            "subject": [self.encoded("subject", 0, "subject", self.left)],
            "compact": [self.encoded("compact", 0, "canny", small)],
            "two": [*two],
            # The official cache hides text and image from conditions, whatever their adapter was trained for.
            "two_kv": [replace(c, independent=True) for c in two],
            "v1_gamma_0.5": [replace(self.encoded("aligned", 0, "canny"), strength=0.5)],
            "v1_gamma_1.5": [replace(self.encoded("aligned", 0, "canny"), strength=1.5)],
            "image_guidance_1.5": [self.encoded("image_guidance_1.5", 0, "canny", black=black)],
            "image_guidance_1.5_two_kv": official_guidance(self.guided()),
            "integration": [self.integrated("integration", independent=False)],
            "integration_kv": [self.integrated("integration_kv", independent=True)],
        }

    def generate(self, case: str, controls: list[Control]) -> tuple[Tensor, Tensor]:
        """The latents after each of four steps, and the last."""
        steps: list[Tensor] = []
        result = self.pipe()(
            "",
            controls=controls,
            latents=self.trajectory["latents_init"],
            image_guidance_scale=1.5 if case.startswith("image_guidance") else None,
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, kept: steps.append(kept["latents"]),
        )
        return torch.stack(steps), result.images


@cache
def read(folder: Path) -> Golden:
    return Golden(folder)


# What is compared


def compare_forward(folder: Path, name: str) -> Differences:
    """One prediction with one or two conditions; conditions never see each other but in one case."""
    g = read(folder)
    condition = g.condition
    later, earlier = "scale2_then_delta_trainer_order", "delta_then_scale2_inference_order"
    cases = {
        "native_no_condition": [],
        "no_condition": [],
        "aligned": [condition()],
        "aligned_independent": [condition(sees="self")],
        "subject_delta_minus_w": [condition("b")],
        "subject_delta_plus_w": [condition("b", "delta_plus_w")],
        "scale2": [condition("small", "scale2")],
        "scale2_delta_inference_order": [condition("small", earlier)],
        "scale2_delta_trainer_order": [condition("small", later)],
        "two_conditions": [condition(), condition("b")],
        "two_conditions_independent": [condition(sees="self"), condition("b", sees="self")],
        "two_conditions_no_group_mask": [condition(sees="all"), condition("b", sees="all")],
        "two_conditions_same_adapter": [condition(), condition("b", adapter="canny")],
    }
    return compare({f"out/{case}": g.predict(*cases[case]) for case in cases}, g.forward, "out/")


def compare_residuals(folder: Path, name: str) -> Differences:
    """The residual streams behind every block."""
    g, seen = read(folder), {}
    blocks: dict[str, nn.Module] = {f"double_{i}": b for i, b in enumerate(g.model.transformer_blocks)}
    blocks |= {f"single_{i}": b for i, b in enumerate(g.model.single_transformer_blocks)}
    hooks = [
        block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: list(out)}))
        for name, block in blocks.items()
    ]
    g.predict(g.condition())
    for hook in hooks:
        hook.remove()
    streams = {}
    for block, xs in seen.items():
        if block.startswith("single"):  # text and image run as one stream there
            xs = [xs[0][:, : g.text_tokens], xs[0][:, g.text_tokens :], xs[1]]
        for branch, x in zip(("text", "image", "cond"), xs, strict=True):
            streams[f"hidden/aligned/{block}/{branch}"] = x
    return compare(streams, g.forward, "hidden/")


def compare_positions(folder: Path, name: str) -> Differences:
    g = read(folder)
    (height, width), small = g.grid, (g.grid[0] // 2, g.grid[1] // 2)
    delta = (0, -(width // 2))
    ids = {
        "aligned": grid_ids(*g.grid),
        "delta_minus_w": g.left,
        "delta_plus_w": grid_ids(height, width, delta=(0, width)),
        "scale2": grid_ids(*small, scale=2),
        "scale2_then_delta_trainer_order": grid_ids(*small, delta=delta, scale=2),
        "delta_then_scale2_inference_order": grid_ids(*small, delta=delta, scale=2, order="official-inference"),
    }
    return compare({f"ids/{key}": value for key, value in ids.items()}, g.forward, "ids/")


def compare_strengths(folder: Path, name: str) -> Differences:
    """gamma: as the first generation's code has it, as Eq. 5 of the paper, and on two conditions."""
    g, recorded = read(folder), read(folder).tensors(name)
    forms = {
        "v1_gamma_": lambda gamma: [g.condition(gamma=gamma)],
        "v1_subject_gamma_": lambda gamma: [g.condition("b", gamma=gamma)],
        "derived_paper_gamma_": lambda gamma: [g.condition(gamma=gamma, weight_text=False)],
        "derived_two_conditions_code_blocks_gamma_": lambda gamma: [
            g.condition(gamma=gamma),
            g.condition("b", gamma=gamma),
        ],
    }
    found = {
        "out/v1_gamma_none": g.predict(g.condition()),
        "out/v1_independent": g.predict(g.condition(sees="self")),
        "out/v1_no_union_attention": g.predict(),  # blocked both ways
        "out/v1_latent_lora": g.predict(g.condition(), image=g.image(lora=g.loras["canny"])),
    }
    for key in recorded.keys() - found.keys():
        form = next((form for form in forms if key.startswith(f"out/{form}")), None)
        if form is not None:
            found[key] = g.predict(*forms[form](float(key.removeprefix(f"out/{form}"))))
    return compare(found, recorded, "out/")


def compare_cache(folder: Path, name: str) -> Differences:
    """kv_cache: the cached keys and values, the passes that write and read them, and two caches that are wrong on
    purpose: of another prompt, and of conditions that see text and image."""
    g, recorded = read(folder), read(folder).tensors(name)
    later, controls = g.image(later=True), g.cached()
    found = {
        "out/write_pass": g.predict(controls=controls),
        "out/read_pass": g.predict(image=later, controls=controls),
        "out/full_recompute": g.predict(g.condition(sees="self"), g.condition("b", sees="self"), image=later),
        "out/read_pass_cache_from_other_pooled": g.predict(image=later, controls=g.cached("pooled_other")),
        "out/full_recompute_not_independent": g.predict(g.condition(), g.condition("b"), image=later),
        "out/read_pass_not_independent": first_step_cache(g)[1],
    }
    for number, control in enumerate(controls):
        assert control.memory is not None and list(control.memory) == [site.path for site in g.model.sites]
        for layer, (key, value) in enumerate(control.memory.values()):
            found[f"cache/attn_{layer}/cond_{number}/key"] = key
            found[f"cache/attn_{layer}/cond_{number}/value"] = value
    return compare(found, recorded)


def first_step_cache(g: Golden) -> tuple[Tensor, Tensor]:
    """Predictions of the first and of a later step, with the cache of the first one."""
    prepared = [replace(c, first_step=True).prepare(g.run()) for c in g.references(independent=False)]
    found = []
    for i in range(2):
        acting = tuple(c for c in (c.at(Step(i, 2, 1 - i / 2)) for c in prepared) if c is not None)
        streams = [stream for c in acting for stream in c.streams()]
        assert bool(streams) == (i == 0)  # a later step runs no condition
        found.append(g.predict(*streams, image=g.image(later=i == 1), controls=acting))
    return found[0], found[1]


def compare_encoding(folder: Path, name: str) -> Differences:
    """vae_encode: pixels, the posterior, packed tokens."""
    g, t = read(folder), read(folder).tensors(name)
    pixels = t["image"] if t["image"].shape[-1] == 3 else t["image"].movedim(0, -1)
    height, width = t["preprocessed"].shape[-2:]
    posterior = g.vae.encode(t["preprocessed"]).latent_dist
    shift, scaling = g.vae.config.shift_factor, g.vae.config.scaling_factor
    own = posterior.mean + posterior.std * t["noise"]
    found = {
        "preprocessed": to_tensor(pixels.numpy(), (height, width))[None],
        "mean": posterior.mean,
        "std": posterior.std,
        "tokens": pack((own - shift) * scaling),
        "ids": grid_ids(height // g.config["px"], width // g.config["px"]),
    }
    mode = encode_tokens(g.vae, t["preprocessed"], sample=False)
    return compare(found, {key: x for key, x in t.items() if key not in ("image", "noise")}) | {
        "mode": difference(mode, pack((t["mean"] - shift) * scaling))
    }


def compare_conditions(folder: Path, name: str) -> Differences:
    """trajectory: images to tokens and positions, by the public call, and the black images of image guidance."""
    g, t, found = read(folder), read(folder).trajectory, {}
    edges = {"adapter": "canny", "image": "image_a"}
    subject = {"adapter": "subject", "image": "image_b", "delta": "left"}
    cases: dict[str, list[dict]] = {
        "aligned": [edges],
        "subject": [subject],
        "compact": [{"adapter": "canny", "image": "image_small", "scale": 2}],
        "two": [edges, subject],
        "two_kv": [edges, subject],
        "image_guidance_1.5": [edges],
        "image_guidance_1.5_two_kv": [edges, subject],
        "integration": [edges],
        "integration_kv": [edges],
    }
    for case, conditions in cases.items():
        pipe, black = g.pipe(Seeded), case.startswith("image_guidance")
        assert isinstance(pipe, Seeded)
        for i, given in enumerate(conditions):
            placed = {key: value for key, value in given.items() if key in ("delta", "scale")}
            pipe.count = 2 * i if black else i  # without guidance no black image is encoded in between
            control = OminiControl(g.loras[given["adapter"]], OminiConfig(**placed), pipe).control(
                t[given["image"]].numpy()
            )
            key = f"{case}/encoded_{2 * i if black else i}"
            found[f"{key}/tokens"] = control.tokens
            if not placed:
                found[f"{key}/ids"] = control.ids
            if black:
                found[f"{case}/encoded_{2 * i + 1}/tokens"] = control.negative().tokens
    recorded = {k: x for k, x in t.items() if k.endswith("/tokens") or k in found}
    return compare(found, recorded)


def compare_trajectories(folder: Path, name: str) -> Differences:
    """trajectory: the latents after each of four steps of `generate`."""
    g, found = read(folder), {}
    for case, controls in g.cases().items():
        found[f"{case}/trajectory"], found[f"{case}/final"] = g.generate(case, controls)
    recorded = {k: x for k, x in g.trajectory.items() if k.endswith(("/trajectory", "/final"))}
    return compare({k: x for k, x in found.items() if k in recorded}, recorded)


_ADAPTERS = {"subject": "subject"}  # others train the adapter of edges


def compare_training(folder: Path, name: str) -> Differences:
    """train_step: prediction, loss, and the LoRA's gradients as a part of their global norm."""
    g, out = read(folder), {}
    recorded = g.tensors(name)
    for case in sorted({key.split("/")[0] for key in recorded}):
        given = part(recorded, f"{case}/")
        out |= {f"{case}/{key}": value for key, value in training_step(g, case, given).items()}
    return out


def training_step(g: Golden, case: str, given: dict[str, Tensor]) -> Differences:
    loras, adapter = {name: g.lora(name) for name in g.loras}, _ADAPTERS.get(case, "canny")
    config = OminiConfig(independent=case.endswith("independent"))
    # Guidance 1 for every branch, whatever the model is given later.
    run = Run(g.model, 1, g.grid, g.trajectory["pooled"], torch.ones(1), g.model.config.in_channels)
    conditions = [
        condition_stream(
            OminiControl(loras[adapter], config),
            given[f"cond_{i}/tokens"].reshape(1, -1, run.in_channels),
            given[f"cond_{i}/ids"],
            run,
        )
        for i in range(2)
        if f"cond_{i}/ids" in given
    ]
    t, target = given["t"], given["target_velocity"]
    noisy = Stream(given["x_t"], given["img_ids"], t, run.pooled, run.guidance)
    prediction = g.model(noisy, g.trajectory["text"], torch.zeros(g.text_tokens, 3), conditions=conditions)
    x0 = given["x_t"] - t * target
    loss = flow_loss(prediction, x0, x0 + target, t).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in loras[adapter].parameters() if p.grad is not None]).norm()
    whole = float(given["grad_global_norm"])
    out = {
        "prediction": difference(prediction, given["prediction"]),
        "x_t": difference(add_noise(x0, x0 + target, t), given["x_t"]),
        "loss": difference(loss[None], given["loss"]),
        "grad_global_norm": difference(norm[None], given["grad_global_norm"]) / whole,
    }
    for key, expected in part(given, "grad/").items():
        path, side, owner = key.removesuffix(".weight").rsplit(".", 2)
        parameter = {"lora_A": loras[owner].a, "lora_B": loras[owner].b}[side][loras[owner].keys[path]]
        # Of an adapter that is not in use the file holds zeros.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        out[f"grad/{key}"] = difference(gradient, expected) / whole
    return out


_CODE, _FIRST = "official code", "official code, first generation"
CHECKS = (
    Check("one prediction, 13 kinds of conditions", _CODE, TOLERANCE, "forward*.safetensors", compare_forward),
    Check("hidden states after every block", _CODE, TOLERANCE, "forward*.safetensors", compare_residuals),
    Check("positions", _CODE, 0, "forward*.safetensors", compare_positions),
    Check("strength, latent LoRA, blocked conditions", _FIRST, TOLERANCE, "gamma*.safetensors", compare_strengths),
    Check("cached keys and values, write and read pass", _CODE, TOLERANCE, "kv_cache*.safetensors", compare_cache),
    Check("tokens by the autoencoder", _CODE, TOLERANCE, "vae_encode*.safetensors", compare_encoding),
    Check("images to conditions, black images", _CODE, TOLERANCE, "trajectory*.safetensors", compare_conditions),
    Check("four steps of generate", _CODE, TOLERANCE, "trajectory*.safetensors", compare_trajectories),
    Check("training step: loss, gradients", _CODE, TOLERANCE, "train_step*.safetensors", compare_training),
)
INPUTS = ("config", "transformer", "vae", "lora_*")
