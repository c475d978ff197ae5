"""Samples of a class model as DiT's sample_ddp.py makes them: an .npz for ADM's evaluator (openai/guided-diffusion,
evaluations), whose arr_0 is (N, H, W, 3) uint8. Batches are files of their own, so that a run can be resumed and shared
by processes."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from condit.data.files import atomic_write
from condit.data.progress import progress_bar
from condit.data.prompt_table import SETTINGS, check_settings, keep_settings
from condit.drawing.pipeline import Pipeline


def sample_npz(
    pipe: Pipeline,
    out: Path,
    count: int,
    *,
    batch: int = 32,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Path | None:
    """`count` images of random classes; image i has the seed `seed` + i, and its class depends on `seed` and i alone.
    Batches are in the folder OUT.parts, from which a run continues. rank makes every ranks-th batch; the last to finish
    writes `out`, the others return None. ValueError for a model without classes, and for a folder of other settings."""
    if pipe.model.reads != "class":
        raise ValueError(f"{pipe.name} generates no classes. Use DiT or DiffiT.")
    if not (count >= 1 and batch >= 1 and 0 <= rank < ranks):
        raise ValueError(f"expected count and batch of at least 1, rank below ranks; found {count}, {batch}, {rank}.")
    classes = pipe.backbone.config.num_classes or 0
    drawn = torch.randint(max(classes, 1), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = drawn if classes else [None] * count
    folder = out.with_name(f"{out.name}.parts")
    parts = [folder / f"{first:08d}.npy" for first in range(0, count, batch)]
    settings = {"model": pipe.name, "hash": pipe.parts.hash, "seed": seed, "batch": batch, "count": count}
    settings |= {"steps": steps, "guidance": guidance}
    if (folder / SETTINGS).exists():
        check_settings(folder, settings)
    keep_settings(folder, settings)
    mine = parts[rank::ranks]
    done = sum(part.exists() for part in mine)
    with progress_bar(len(mine), "sampling", unit="batch", images=batch * len(mine), done=done) as advance:
        for part in mine:
            first = int(part.stem)
            if not part.exists():
                how = {"num_inference_steps": steps, "guidance_scale": guidance, "seed": seed + first}
                images = np.stack([np.asarray(image) for image in pipe(labels[first : first + batch], **how).images])
                atomic_write(part, lambda path, images=images: save_array(path, images))
                advance()
    if not all(part.exists() for part in parts):
        return None
    atomic_write(out, lambda path: join(parts, path, count))
    if ranks == 1:  # another process may read the parts
        shutil.rmtree(folder, ignore_errors=True)
    return out


def save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would add a suffix to the name
        np.save(file, array)


def join(parts: Sequence[Path], path: Path, count: int) -> None:
    """An .npz with the rows of all parts, of which one is in memory at a time."""
    shape = count, *np.load(parts[0], mmap_mode="r").shape[1:]
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.load(part).tobytes())
