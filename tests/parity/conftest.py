"""A random FLUX.1 of diffusers with about 50,000 parameters, and random Stable Diffusions."""

import importlib
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import condit
from condit.backbones.mmdit import MMDiTConfig
from condit.weights.flux_names import DOUBLE, NORMS, SINGLE, WHOLE
from flux_guests import dev, flux_pairs, ip_adapter, omini, pair, table  # noqa: F401  (fixtures of the guests' tests)
from sd_guests import sd_pairs  # noqa: F401

WORDS = "a red fox in the snow"  # all that its tokenizers know


def tokenizers():
    """A CLIP and a T5 tokenizer over a handful of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    letters = sorted(set(WORDS.replace(" ", "")))
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=77)
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"]))
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    return clip, t5


def build_flux(config: MMDiTConfig, *, dynamic: bool):
    """A random FluxPipeline of diffusers: FLUX.1-dev's dynamic shift, or -schnell's."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = tokenizers()
    ends: dict[str, Any] = {
        f"{end}_token_id": getattr(clip_tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")
    }
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=10,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        **ends,
    )
    t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
        latent_channels=2,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=dynamic, shift=3.0 if dynamic else 1.0, base_shift=0.5, max_shift=1.15
        ),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(**asdict(config)).eval().requires_grad_(False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def make_flux() -> Callable:
    return build_flux


def build_sd(kind: str, *, scheduler=None, **unet):
    """A random StableDiffusionPipeline ("sd15"), its inpainting form ("sd15-inpainting") or an XL pipeline ("sdxl") of
    diffusers. It draws 32 px from latents of 16; `unet`: other fields of its network."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from condit.backbones.unet import CROSS_DOWN, CROSS_UP, DOWN, UP

    diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for
    torch.manual_seed(0)
    tokenizer, xl = tokenizers()[0], kind == "sdxl"
    shape: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 9 if kind.endswith("inpainting") else 4,
        "block_out_channels": (8, 16),
        "down_block_types": (DOWN, CROSS_DOWN) if xl else (CROSS_DOWN, DOWN),
        "up_block_types": (CROSS_UP, UP) if xl else (UP, CROSS_UP),
        "layers_per_block": 1,
        "attention_head_dim": (1, 2) if xl else 2,
        "transformer_layers_per_block": (1, 2) if xl else 1,
        "cross_attention_dim": 20 if xl else 10,
        "norm_num_groups": 4,
    }
    if xl:
        shape |= {
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 36,
        }
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.18215,
    )
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 10,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": 12,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        "unet": diffusers.UNet2DConditionModel(**{**shape, **unet}),
    }
    if xl:
        parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**text))
    with torch.no_grad():
        for part in parts.values():
            for p in part.eval().requires_grad_(False).parameters():
                p.add_(0.1 * torch.randn(p.shape))
    parts["scheduler"] = scheduler or diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts["tokenizer"] = tokenizer
    if xl:
        pipe = diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizers()[0], add_watermarker=False)
    else:
        made = diffusers.StableDiffusionInpaintPipeline if kind.endswith("inpainting") else None
        made = made or diffusers.StableDiffusionPipeline
        pipe = made(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def make_sd() -> Callable:
    return build_sd


def build_pixart(kind: str):
    """A random PixArtAlphaPipeline ("alpha-512", "alpha-1024") or PixArtSigmaPipeline ("sigma") of diffusers. It draws
    32 px from latents of 16, or says so of 256 px where 128 latent cells make the size embedders."""
    from transformers import T5Config, T5EncoderModel

    diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for
    torch.manual_seed(0)
    tokenizer = tokenizers()[1]
    side = 128 if kind == "alpha-1024" else 16
    parts: dict[str, Any] = {
        "transformer": diffusers.PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=8,
            num_layers=2,
            cross_attention_dim=24,
            sample_size=side,
            caption_channels=12,
            use_additional_conditions=kind == "alpha-1024",
        ),
        "text_encoder": T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.18215,
        ),
    }
    with torch.no_grad():
        for part in parts.values():
            for p in part.eval().requires_grad_(False).parameters():
                p.add_(0.1 * torch.randn(p.shape))
        # Noise that is nearly the input's keeps the clean estimates in bounds.
        parts["transformer"].proj_out.weight.mul_(0.1)
    made = diffusers.PixArtSigmaPipeline if kind == "sigma" else diffusers.PixArtAlphaPipeline
    pipe = made(
        **parts,
        tokenizer=tokenizer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def make_pixart() -> Callable:
    return build_pixart


def dotted(part: str) -> str:
    """The authors' spelling of a rule's name."""
    part = re.sub(r"_(in|out)_layer$", r".\1_layer", part)
    part = re.sub(r"^(img|txt)_(attn|mlp|mod)_", r"\1_\2.", part).replace("modulation_lin", "modulation.lin")
    part = part.replace("final_layer_adaLN_modulation_1", "final_layer.adaLN_modulation.1")
    part = part.replace("final_layer_linear", "final_layer.linear")
    return re.sub(r"norm_(query|key)_norm", r"norm.\1_norm", part)


def authors_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' tensors in the authors' names: the rules backwards."""
    values = {}

    def take(path: str, name: str, kind: str) -> None:
        key = f"{path}.{kind}"
        if key in tensors:
            shift_first = path == "norm_out.linear"
            values[f"{name}.{kind}"] = torch.cat(tensors[key].chunk(2)[::-1]) if shift_first else tensors[key]

    for name, path in WHOLE.items():
        for kind in ("weight", "bias"):
            take(path, dotted(name), kind)
    for theirs, ours, paths_of in (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    ):
        numbers = {n.split(".")[1] for n in tensors if n.startswith(f"{ours}.")}
        for i in numbers:
            for name, paths in paths_of.items():
                for kind in ("weight", "bias"):
                    cut = [tensors[f"{ours}.{i}.{path}.{kind}"] for path in paths]
                    values[f"{theirs}.{i}.{dotted(name)}.{kind}"] = torch.cat(cut)
            for name, path in NORMS[theirs.split("_")[0]].items():
                values[f"{theirs}.{i}.{dotted(name)}.scale"] = tensors[f"{ours}.{i}.{path}.weight"]
    return values


@pytest.fixture(scope="session")
def authors() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return authors_names


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Callable:
    """pairs(make)(kind): a pipeline of diffusers, and ours from the folder that it was saved to."""

    def of(make: Callable):
        made = {}

        def get(kind: str):
            if kind not in made:
                folder = tmp_path_factory.mktemp("models") / kind
                theirs = make(kind)
                theirs.save_pretrained(folder)
                made[kind] = theirs, condit.load(folder)
            return made[kind]

        return get

    return of
