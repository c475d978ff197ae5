"""CLIP's text and image towers (Radford et al. 2021, arXiv:2103.00020) for the embedded model.

Parameter names and results are those of transformers' `CLIPModel` with eager attention. Importing transformers takes
longer than generating an image with the embedded model, so that path has a class of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class TowerConfig:
    """One tower, in the names of transformers' config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    image_size: int
    patch_size: int


@dataclass(frozen=True)
class ClipConfig:
    """Both towers and the width of the space that they share."""

    text_config: TextConfig
    vision_config: VisionConfig
    projection_dim: int

    @classmethod
    def from_fields(cls, config: Mapping[str, Any], source: str | Path) -> ClipConfig:
        """From transformers' config.json. Raises ValueError for a missing field, or for an unsupported CLIP."""

        def tower(part: str, kind: type) -> Any:
            given = config.get(part, {})
            missing = [field.name for field in fields(kind) if field.name not in given]
            if missing:
                raise ValueError(f"{source}: {part} has no {missing[0]!r}. Expected the config.json of a CLIPModel.")
            for name, expected in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-5), ("attention_dropout", 0.0)):
                if given.get(name, expected) != expected:
                    raise ValueError(
                        f"{source}: {part} has {name} {given[name]!r}; the embedded CLIP supports only {expected!r}. "
                        "Use transformers.CLIPModel for other models."
                    )
            return kind(**{field.name: given[field.name] for field in fields(kind)})

        if "projection_dim" not in config:
            raise ValueError(f"{source} has no 'projection_dim'. Expected the config.json of a CLIPModel.")
        towers = tower("text_config", TextConfig), tower("vision_config", VisionConfig)
        return cls(*towers, projection_dim=config["projection_dim"])


class TowerOutput(NamedTuple):
    """What a tower returns, in transformers' names: states (B, L, C) after the last layer (text: after the final norm),
    the pooled vector (B, C), and the states before the first layer and after each (layers + 1 of them)."""

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...]


class Attention(nn.Module):
    """Plain attention: at these lengths its backward is faster on CPUs than SDPA's."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.mT * self.scale
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class ClipMLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, c: TowerConfig):
        super().__init__()
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size)
        self.mlp = ClipMLP(c.hidden_size, c.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class ClipEncoder(nn.Module):
    def __init__(self, c: TowerConfig):
        super().__init__()
        self.layers = nn.ModuleList([Block(c) for _ in range(c.num_hidden_layers)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """The states before the first layer and after each."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return tuple(states)


def table(rows: int, width: int) -> nn.Embedding:
    """An embedding table without initial values: sampling normal numbers on the meta device, where `load_clip` builds
    this model, imports torch._dynamo, which takes more than a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class TextEmbeddings(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.token_embedding = table(c.vocab_size, c.hidden_size)
        self.position_embedding = table(c.max_position_embeddings, c.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[-1]]


class CLIPTextTransformer(nn.Module):
    """Token ids (B, L) -> states, and the state of the first end token as pooled vector."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.embeddings = TextEmbeddings(c)
        self.encoder = ClipEncoder(c)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size)

    def forward(self, ids: Tensor) -> TowerOutput:
        x = self.embeddings(ids)
        length = ids.shape[-1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        states = self.encoder(x, mask)
        last = self.final_layer_norm(states[-1])
        end = (ids == self.config.eos_token_id).int().argmax(-1)
        return TowerOutput(last, last[torch.arange(len(last), device=last.device), end], states)


class VisionEmbeddings(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(c.hidden_size))
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = table((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """Images (B, 3, S, S) of the configured size -> states, and the normalised class token as pooled vector."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size)  # transformers' spelling
        self.encoder = ClipEncoder(c)
        self.post_layernorm = nn.LayerNorm(c.hidden_size)

    def forward(self, pixels: Tensor, *, output_hidden_states: bool = True) -> TowerOutput:
        """`output_hidden_states` is for callers that also take transformers' tower: the states are always returned."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return TowerOutput(states[-1], self.post_layernorm(states[-1][:, 0]), states)


class Clip(nn.Module):
    """Both towers with their projections. Embeddings have no initial values: load weights."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config.text_config)
        self.vision_model = VisionTower(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07), section 2.5

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device
