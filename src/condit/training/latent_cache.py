"""Latents of images, encoded once by a frozen autoencoder and kept in memory, or in a file that later runs read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from condit.data.files import atomic_write
from condit.encoders.vae import scale_shift
from condit.training.denoising import posterior_of
from condit.training.labelled import Images

log = logging.getLogger(__name__)

ENCODE_BATCH = 16


@dataclass(frozen=True)
class LatentSet:
    """moments (N, views, 1 or 2, C, h, w) fp16: the posterior's mean and, unless the encoder is deterministic, its
    deviation, both scaled. views: the image and, with `flip`, the mirrored image, whose latent is not the mirrored
    latent."""

    moments: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.moments)

    def mean(self, indices: Sequence[int]) -> Tensor:
        """The posterior's mean (B, C, h, w) of unmirrored images."""
        return torch.from_numpy(self.moments[list(indices), 0, 0].astype(np.float32))

    def sample(self, indices: Sequence[int], views: Sequence[int], generator: torch.Generator) -> Tensor:
        """Samples of the posterior (B, C, h, w), which DiT trains on; the mean of a deterministic encoder."""
        moments = torch.from_numpy(self.moments[list(indices), list(views)].astype(np.float32))
        if moments.shape[1] == 1:
            return moments[:, 0]
        return moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 0].shape, generator=generator)


@torch.no_grad()
def moments_of(vae: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> scaled mean [and deviation], (B, 1 or 2, C, h, w), on the CPU."""
    scale, shift = scale_shift(vae)
    mean, deviation = posterior_of(vae, images.to(next(vae.parameters()).device))
    parts = [(mean - shift) * scale]
    if deviation is not None:
        parts.append(deviation * scale)
    return torch.stack(parts, 1).float().cpu()


def encode(vae: nn.Module, images: Images, *, flip: bool, cache: str | None = None) -> LatentSet:
    """The latents of all images. cache: a folder of files, named by a hash of the images and the autoencoder."""
    labels = torch.tensor(images.labels, dtype=torch.long)
    if not len(images):
        return LatentSet(np.empty((0,), np.float16), labels)
    target = None
    if cache is not None:
        target = Path(cache) / f"{key_of(vae, images, flip)}.npy"
        if target.exists():
            log.info("Latents of %d images from %s.", len(images), target)
            return LatentSet(np.load(target, mmap_mode="r", allow_pickle=False), labels)
    shape = (len(images), 1 + flip, *moments_of(vae, images.read([0])).shape[1:])
    log.info("Encoding %d images once.", len(images))
    if target is None:
        moments = np.empty(shape, np.float16)
        fill(moments, vae, images)
        return LatentSet(moments, labels)

    def write(path: Path) -> None:
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        fill(file, vae, images)
        file.flush()

    atomic_write(target, write)
    return LatentSet(np.load(target, mmap_mode="r", allow_pickle=False), labels)


def fill(array: np.ndarray, vae: nn.Module, images: Images) -> None:
    """Writes the moments into an array; encodes on the device that training will use."""
    home = next(vae.parameters()).device
    # accelerate's first state fixes the device of all later ones, and only an Accelerator reads this variable.
    vae.to(PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device)
    for begin in range(0, len(images), ENCODE_BATCH):
        chosen = range(begin, min(begin + ENCODE_BATCH, len(images)))
        pixels = images.read(chosen)
        for view in range(array.shape[1]):
            moments = moments_of(vae, pixels.flip(-1) if view else pixels)
            bad = [images.names[i] for i, row in zip(chosen, moments, strict=True) if not row.half().isfinite().all()]
            if bad:
                raise ValueError(
                    f"The autoencoder returns NaN or values beyond fp16 for {bad[0]} ({len(bad)} of {len(moments)} in "
                    "this batch). Check its weights."
                )
            array[begin : begin + len(moments), view] = moments.half().numpy()
    vae.to(home)


def key_of(vae: nn.Module, images: Images, flip: bool) -> str:
    """A hash of the images, the autoencoder and the views."""
    digest = hashlib.sha256(f"{images.key}/{flip}/{scale_shift(vae)}".encode())
    for name, value in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]
