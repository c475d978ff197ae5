"""Samples of a class model as DiT's sample_ddp makes them: an .npz for ADM's evaluator (openai/guided-diffusion,
evaluations), whose arr_0 is (N, H, W, 3) uint8. They are a job, whose rows are batches."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from condit.data.files import atomic_write
from condit.drawing.pipeline import Pipeline
from condit.jobs.plan import Job, Opener, Row, Save


def samples_job(
    folder: Path, count: int, open: Opener, settings: Mapping[str, object], *, batch: int, seed: int, threads: int
) -> Job:
    """`count` images; image i has the seed `seed` + i, and its class depends on both alone."""
    rows = []
    for first in range(0, count, batch):
        work = {"first": first, "size": min(batch, count - first), "seed": seed}
        rows.append(Row(f"batch {first}", (f"{first:08d}.npy",), work))
    return Job(folder, tuple(rows), open, settings={**settings, "batch": batch, "seed": seed}, threads=threads)


def sample(
    pipe: Pipeline, work: Mapping[str, object], *, steps: int | None = None, guidance: float | None = None
) -> Save:
    """A row of the job: its images (n, H, W, 3) as a file of numpy."""
    first, size, seed = (int(str(work[name])) for name in ("first", "size", "seed"))
    classes = pipe.backbone.config.num_classes or 0
    drawn = [random.Random(f"{seed}/{i}").randrange(max(classes, 1)) for i in range(first, first + size)]
    how = {"seed": seed + first, "num_inference_steps": steps, "guidance_scale": guidance}
    images = pipe(drawn if classes else [None] * size, **how).images
    return partial(save_array, array=np.stack([np.asarray(image) for image in images]))


def save_array(path: Path, array: np.ndarray) -> Path:
    def write(target: Path) -> None:
        with open(target, "wb") as file:  # np.save would add a suffix to the name
            np.save(file, array)

    return atomic_write(path, write)


def write_npz(job: Job, out: Path) -> Path:
    """All rows of the job in one file; one of them is in memory at a time."""
    parts = [job.folder / file for row in job.rows for file in row.files]
    shapes = [np.load(part, mmap_mode="r").shape for part in parts]
    header = {"descr": "|u1", "fortran_order": False, "shape": (sum(s[0] for s in shapes), *shapes[0][1:])}

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part).tobytes())

    return atomic_write(out, write)
