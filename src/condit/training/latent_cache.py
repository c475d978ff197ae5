"""Latents of pictures, encoded once by a frozen autoencoder: kept in memory, or in a file that the next run finds."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from condit.data.files import atomic_write
from condit.encoders.vae import Autoencoder, scale_shift
from condit.training.labelled import Pictures

log = logging.getLogger(__name__)

ENCODE_BATCH = 16


@dataclass(frozen=True)
class LatentSet:
    """moments (N, views, 1 or 2, C, h, w) fp16: mean and, where the encoder is no point, deviation, both scaled.
    views: as it is and, if asked for, mirrored; mirroring a latent is not encoding a mirrored picture."""

    moments: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.moments)

    def mean(self, indices: Sequence[int]) -> Tensor:
        """Latents (B, C, h, w) of unmirrored pictures, without chance."""
        return torch.from_numpy(self.moments[list(indices), 0, 0].astype(np.float32))

    def draw(self, indices: Sequence[int], views: Sequence[int], generator: torch.Generator) -> Tensor:
        """Samples of the posterior (B, C, h, w), as DiT trains on them; the mean where it is a point."""
        moments = torch.from_numpy(self.moments[list(indices), list(views)].astype(np.float32))
        if moments.shape[1] == 1:
            return moments[:, 0]
        return moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 0].shape, generator=generator)


@torch.no_grad()
def moments_of(vae: Any, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> scaled mean [and deviation], (B, 1 or 2, C, h, w), on the CPU."""
    scale, shift = scale_shift(vae)
    posterior = vae.encode(images.to(next(vae.parameters()).device)).latent_dist
    parts = [(posterior.mode() - shift) * scale]
    if hasattr(posterior, "std"):
        parts.append(posterior.std * scale)
    return torch.stack(parts, 1).float().cpu()


def encode(vae: nn.Module, pictures: Pictures, *, flip: bool, cache: str | None = None) -> LatentSet:
    """Every picture through the autoencoder. `cache`: a folder whose files carry a hash of pictures and autoencoder."""
    labels = torch.tensor(pictures.labels, dtype=torch.long)
    if not len(pictures):
        return LatentSet(np.empty((0,), np.float16), labels)
    target = None
    if cache is not None:
        target = Path(cache) / f"{key_of(vae, pictures, flip)}.npy"
        if target.exists():
            log.info("Latents of %d pictures from %s.", len(pictures), target)
            return LatentSet(np.load(target, mmap_mode="r", allow_pickle=False), labels)
    shape = (len(pictures), 1 + flip, *moments_of(vae, pictures.read([0])).shape[1:])
    log.info("Encoding %d pictures once.", len(pictures))
    if target is None:
        found = np.empty(shape, np.float16)
        fill(found, vae, pictures)
        return LatentSet(found, labels)

    def write(path: Path) -> None:
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        fill(file, vae, pictures)
        file.flush()

    atomic_write(target, write)
    return LatentSet(np.load(target, mmap_mode="r", allow_pickle=False), labels)


def fill(found: np.ndarray, vae: nn.Module, pictures: Pictures) -> None:
    """Moments into an array, on the device that training will use."""
    home = next(vae.parameters()).device
    # The first state of accelerate decides for all later ones, and only an Accelerator looks for this wish.
    vae.to(PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device)
    for begin in range(0, len(pictures), ENCODE_BATCH):
        chosen = range(begin, min(begin + ENCODE_BATCH, len(pictures)))
        images = pictures.read(chosen)
        for view in range(found.shape[1]):
            moments = moments_of(vae, images.flip(-1) if view else images)
            bad = [pictures.names[i] for i, row in zip(chosen, moments, strict=True) if not row.half().isfinite().all()]
            if bad:
                raise ValueError(
                    f"The autoencoder gives NaN or values beyond fp16 for {bad[0]} ({len(bad)} of {len(moments)} in "
                    "this batch). Are its weights whole?"
                )
            found[begin : begin + len(moments), view] = moments.half().numpy()
    vae.to(home)


def key_of(vae: nn.Module, pictures: Pictures, flip: bool) -> str:
    """Another name for other pictures, another autoencoder, or other views."""
    digest = hashlib.sha256(f"{pictures.key}/{flip}/{scale_shift(cast('Autoencoder', vae))}".encode())
    for name, value in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]
