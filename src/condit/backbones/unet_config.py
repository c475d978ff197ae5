"""Configurations of Stable Diffusion's UNet (`backbones/unet.py`), in the fields of diffusers' UNet2DConditionModel."""

from __future__ import annotations

from dataclasses import dataclass, replace

CROSS_DOWN, CROSS_UP, DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UpBlock2D"
CROSS_MID, MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"
Depth = int | tuple[int, ...]  # transformer blocks of a level, the same in each of its `Transformer`s or one by one


@dataclass(frozen=True)
class UNetConfig:
    """Fields and names of diffusers' `UNet2DConditionModel`; the defaults are Stable Diffusion 1.5.

    attention_head_dim is, despite its name, the number of heads, of all levels or of each; this is how it is published.
    So is transformer_layers_per_block; for pruned models (SSD-1B) each entry may have a number for each layer, and
    reverse_transformer_layers_per_block those of the way up, coarsest level first. mid_block_type: MID is one resnet,
    None no middle (BK-SDM). addition_embed_type "text_time": SDXL's pooled text and sizes. time_cond_proj_dim: width of
    the embedded guidance scale (LCM).
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN)
    up_block_types: tuple[str, ...] = (UP, CROSS_UP, CROSS_UP, CROSS_UP)
    layers_per_block: int = 2
    mid_block_type: str | None = CROSS_MID
    transformer_layers_per_block: int | tuple[Depth, ...] = 1
    reverse_transformer_layers_per_block: tuple[Depth, ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    time_cond_proj_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64

    def __post_init__(self):
        levels = len(self.block_out_channels)
        per_level = {
            "down_block_types": self.down_block_types,
            "up_block_types": self.up_block_types,
            "transformer_layers_per_block": self.transformer_layers_per_block,
            "attention_head_dim": self.attention_head_dim,
        }
        for name, value in per_level.items():
            if not isinstance(value, int) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries for {levels} levels (block_out_channels).")
        unknown = {*self.down_block_types, *self.up_block_types} - {CROSS_DOWN, CROSS_UP, DOWN, UP}
        if unknown:
            raise ValueError(
                f"Block type {sorted(unknown)[0]!r} is not supported; "
                f"expected {CROSS_DOWN}, {DOWN}, {CROSS_UP} or {UP}."
            )
        if self.mid_block_type not in (CROSS_MID, MID, None):
            raise ValueError(
                f"mid_block_type {self.mid_block_type!r} is not supported; expected {CROSS_MID}, {MID} or None."
            )
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"addition_embed_type must be None or 'text_time'; found {self.addition_embed_type!r}.")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level, finest first."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else tuple(heads)

    @property
    def depths(self) -> tuple[Depth, ...]:
        """Transformer blocks of a level on the way down, finest level first."""
        depths = self.transformer_layers_per_block
        return (depths,) * len(self.block_out_channels) if isinstance(depths, int) else tuple(depths)

    @property
    def depths_up(self) -> tuple[Depth, ...]:
        """Those on the way up, coarsest level first."""
        return self.reverse_transformer_layers_per_block or self.depths[::-1]

    @property
    def time_dim(self) -> int:
        return 4 * self.block_out_channels[0]


_SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
    up_block_types=(CROSS_UP, CROSS_UP, UP),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    sample_size=128,
)
PRESETS: dict[str, UNetConfig] = {
    "sd15": UNetConfig(),  # stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json; 860 M, 686 tensors
    "sd15-inpainting": UNetConfig(in_channels=9),  # stable-diffusion-v1-5/stable-diffusion-inpainting
    "sd21": UNetConfig(  # stabilityai/stable-diffusion-2-1; predicts v at 768 px
        attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True, sample_size=96
    ),
    "sdxl": _SDXL,  # stabilityai/stable-diffusion-xl-base-1.0, unet/config.json; 2.57 B, 1680 tensors
    "sdxl-inpainting": replace(_SDXL, in_channels=9),  # diffusers/stable-diffusion-xl-1.0-inpainting-0.1
    # SDXL's blocks on 16 x 16 latents of 32 channels. Text enters by attention alone, as in SD 1.5; docs/tiny.md
    "tiny-unet": replace(
        _SDXL,
        in_channels=32,
        out_channels=32,
        block_out_channels=(64, 80, 48),
        transformer_layers_per_block=1,
        attention_head_dim=(4, 5, 3),
        cross_attention_dim=192,
        addition_embed_type=None,
        addition_time_embed_dim=None,
        projection_class_embeddings_input_dim=None,
        norm_num_groups=16,
        sample_size=16,
    ),
}
