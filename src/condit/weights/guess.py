"""What a weight file is by the names of its tensors: an adapter's kind, and a guess in words for error messages."""

from __future__ import annotations

import re
from collections.abc import Collection

# A piece of a name that one model has -> that model. The first that fits counts: telling pieces stand before loose
# ones.
_SIGNS = {
    ".block.attn.qkv_temb.": "an image-space DiffiT; load it with load_diffit_image",
    ".attn.qkv_temb.": "a latent DiffiT; load it with load_diffit",
    "mlp.w12.": "a rewrite of DiffiT with SwiGLU: another model under the same name",
    "single_transformer_blocks.": "a FLUX transformer of diffusers; load its folder with condit.load",
    "adaln_single.": "a PixArt transformer of diffusers",
    "scale_shift_table": "a PixArt transformer",
    "y_embedder.y_proj.": "a PixArt of its authors",
    "joint_blocks.": "a Stable Diffusion 3",
    "double_blocks.": "a FLUX of its authors",
    "model.diffusion_model.": "a Stable Diffusion checkpoint",
    "encoder.conv_in.": "a VAE",
    "down_blocks.": "a UNet of diffusers",
    "adaLN_modulation.": "a DiT, perhaps incomplete or with other parts",
    "transformer_blocks.": "a diffusion transformer of diffusers",
    "vision_model.": "a CLIP or SigLIP of transformers",
    "visual.": "an open_clip model",
    "norm_pre.": "a CLIP image tower of timm",
    "dist_token": "a DeiT with a distillation token",
    "distillation_token": "a DeiT with a distillation token",
    "layer_scale": "a DINOv2 of transformers",
    "ls1.": "a DINOv2 or another ViT with layer scale",
    "lambda_1": "a BEiT",
    "gamma_1": "a BEiT or CaiT",
    "decoder_": "a masked autoencoder with its decoder",
    "mask_token": "a ViT for masked image modelling",
    "conv_root": "a hybrid of ResNet and ViT (R50+ViT-B/16 and the like), which condit does not have",
    "patch_embed.backbone": "a hybrid of ResNet and ViT, which condit does not have",
    "MAPHead_": "a big_vision model with an attention pool",
    "/encoderblock/": "a big_vision file with stacked layers",
    "MixerBlock": "an MLP-Mixer",
    "relative_position_bias_table": "a Swin transformer",
    "layer1.0.conv1": "a ResNet",
    "cls_token": "a ViT; load it with load_vit",
}
DEADIFF = ("style_blip.", "state_dict.style_blip.")  # as published, and inside Lightning's wrapper
_DEADIFF = (*DEADIFF, "style.qformer.", "content.qformer.")
_LORA = (".lora_A.", ".lora_down.", ".lora.down.", ".hada_w1", ".lokr_w")
_OLD_LORA = re.compile(r"\.processor\.\w+_lora\d?\.down\.|\.diff(_b)?$")  # diffusers in 2023, XLabs; ComfyUI
_IP_ADAPTER = ("image_proj.", "image_proj_model.", "ip_adapter_proj_model.", "adapter_modules.")


def what_is(names: Collection[str]) -> str:
    """The adapter class that reads tensors of these names: "DEADiff", "IPAdapter", "OminiControl" (any LoRA) or
    "unknown"."""
    if any(name.startswith(_DEADIFF) for name in names):
        return "DEADiff"
    if any(piece in name for name in names for piece in _LORA) or any(map(_OLD_LORA.search, names)):
        return "OminiControl"
    if any(name.startswith(_IP_ADAPTER) or ".to_k_ip." in name for name in names):
        return "IPAdapter"
    return "unknown"


def guess(names: Collection[str]) -> str | None:
    """A guess in words at the model whose tensors have these names; None without one."""
    adapter = what_is(names)
    if adapter == "OminiControl":
        return "a LoRA, for condit.OminiControl or condit.StyleLoRA"
    if adapter != "unknown":
        return f"a file for condit.{adapter}"
    return next((model for piece, model in _SIGNS.items() if any(piece in name for name in names)), None)
