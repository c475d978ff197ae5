"""A random FLUX.1 of diffusers with about 50,000 parameters."""

import re
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from condit.backbones.mmdit import MMDiTConfig
from condit.weights.flux_names import DOUBLE, NORMS, SINGLE, WHOLE

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
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=10,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
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


def dotted(part: str) -> str:
    """The authors' spelling of a rule's name."""
    part = re.sub(r"_(in|out)_layer$", r".\1_layer", part)
    part = re.sub(r"^(img|txt)_(attn|mlp|mod)_", r"\1_\2.", part).replace("modulation_lin", "modulation.lin")
    part = part.replace("final_layer_adaLN_modulation_1", "final_layer.adaLN_modulation.1")
    part = part.replace("final_layer_linear", "final_layer.linear")
    return re.sub(r"norm_(query|key)_norm", r"norm.\1_norm", part)


def authors_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' tensors in the authors' names: the rules backwards."""
    found = {}

    def take(path: str, name: str, kind: str) -> None:
        key = f"{path}.{kind}"
        if key in tensors:
            shift_first = path == "norm_out.linear"
            found[f"{name}.{kind}"] = torch.cat(tensors[key].chunk(2)[::-1]) if shift_first else tensors[key]

    for name, path in WHOLE.items():
        for kind in ("weight", "bias"):
            take(path, dotted(name), kind)
    for theirs, ours, table in (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    ):
        numbers = {n.split(".")[1] for n in tensors if n.startswith(f"{ours}.")}
        for i in numbers:
            for name, paths in table.items():
                for kind in ("weight", "bias"):
                    cut = [tensors[f"{ours}.{i}.{path}.{kind}"] for path in paths]
                    found[f"{theirs}.{i}.{dotted(name)}.{kind}"] = torch.cat(cut)
            for name, path in NORMS[theirs.split("_")[0]].items():
                found[f"{theirs}.{i}.{dotted(name)}.scale"] = tensors[f"{ours}.{i}.{path}.weight"]
    return found


@pytest.fixture(scope="session")
def authors() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return authors_names
