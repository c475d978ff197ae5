"""What is tried: a strategy of inputs and a function that gives one to condit, for each target."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import condit
from condit.data.annotators import canny, edges, lines, soft_edges
from condit.data.grouped import GroupedPairs
from condit.data.images import load_image, load_masks, read_recipe
from condit.data.pairs import check, open_pairs
from condit.weights.files import names_in, read_metadata, read_tensors
from condit.weights.load import identify
from rules import expect, run_command, watched
from values import anything, command_lines, damaged, dtypes, fills, picture_files, shapes, with_leaf
from world import SIDE, World, world


def run_line(line: list[str], world: World) -> None:
    folder = world.fresh()
    (folder / "own.py").write_text("def f(*a, **k):\n    return None\n")
    with watched(folder):
        run_command(line)


# Images


def run_image(data: bytes, world: World) -> None:
    folder = world.empty()
    (folder / "x.png").write_bytes(data)
    with watched(folder):
        expect(lambda: read_recipe("x.png"))
        for source in (data, "x.png", io.BytesIO(data)):
            images: list[Image.Image] = []
            expect(lambda s=source, images=images: images.append(load_image(s, mode="RGBA")))
        for image in images:
            load_image(image)  # what was read once can be read again
            if image.width * image.height < 10_000:
                for annotate in (canny, edges, lines, soft_edges):
                    annotate(image)


def run_array(case: tuple, world: World) -> None:
    shape, dtype, fill, as_tensor = case
    with np.errstate(all="ignore"):
        array = np.full(shape, fill).astype(dtype)
    with watched(world.empty()):
        expect(lambda: load_image(torch.from_numpy(array) if as_tensor else array))
        expect(lambda: load_masks([array, array]))


# Weights


@dataclass(frozen=True)
class Change:
    """What is done to one tensor (by number) of a file, or to an entry of its configuration."""

    kind: str
    number: int
    value: Any


changes = st.builds(
    Change,
    st.sampled_from(["drop", "rename", "dtype", "shape", "fill", "grow", "metadata", "config"]),
    st.integers(0, 10**6),
    anything,
)
DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64, torch.float64]


def changed(tensors: dict[str, torch.Tensor], change: Change) -> dict[str, torch.Tensor]:
    name = sorted(tensors)[change.number % len(tensors)]
    tensor, rest = tensors[name], {k: v for k, v in tensors.items() if k != name}
    if change.kind == "drop":
        return rest
    if change.kind == "rename":
        return {**rest, str(change.value).encode("utf-8", "replace").decode(): tensor}
    if change.kind == "dtype":
        return {**rest, name: tensor.to(DTYPES[change.number % len(DTYPES)])}
    if change.kind == "shape":
        return {**rest, name: tensor.flatten()[: change.number % 50].clone()}
    if change.kind == "fill":
        return {**rest, name: torch.full_like(tensor, [float("nan"), float("inf"), 1e30][change.number % 3])}
    if change.kind == "grow":
        return {**rest, name: torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(2)}
    return tensors


def run_weights(case: tuple[str, list[Change], bool], world: World) -> None:
    """An adapter or a part of the model, changed, in safetensors or PyTorch's format."""
    which, todo, pickled = case
    folder = world.fresh()
    source = world.tiny / which
    tensors, metadata = load_file(source), read_metadata(source)
    for change in todo:
        if change.kind == "metadata" and "condit" in metadata:
            fields = with_leaf(json.loads(metadata["condit"]), change.number, change.value)
            metadata = {"condit": json.dumps(fields).encode("utf-8", "replace").decode()}
        tensors = changed(tensors, change) if tensors else tensors
    name = "x.bin" if pickled else "x.safetensors"
    if pickled:
        torch.save(tensors, folder / name)
    else:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / name, metadata)
    kind = condit.OminiControl if "gray" in which else condit.IPAdapter
    pipe = world.pipe
    with watched(folder):
        expect(lambda: names_in(Path(name)))
        expect(lambda: identify(name))

        def use() -> None:
            control = kind.load(name, pipe).control("ref.png")
            pipe("a fox", controls=[control], num_inference_steps=1, seed=0)

        expect(use)


def run_model(case: tuple[str, list[Change]], world: World) -> None:
    """The model's folder with changed configurations and weights."""
    part, todo = case
    folder = world.fresh()
    model = folder / "model"
    for other in ("clip", "canvas", "vae", "transformer"):
        (model / other).mkdir(parents=True)
        for file in (world.tiny / "model" / other).iterdir():
            (model / other / file.name).symlink_to(file)
    for change in todo:
        configs = sorted((model / part).glob("*.json")) if change.kind in ("config", "metadata") else []
        if configs:
            file = configs[change.number % len(configs)]
            fields = with_leaf(json.loads(file.read_text()), change.number, change.value)
            file.unlink()
            file.write_text(json.dumps(fields))
        else:
            file = next((model / part).glob("*.safetensors"))
            tensors = load_file(file)
            file.unlink()
            save_file({k: v.contiguous().clone() for k, v in changed(tensors, change).items()}, file)
    with watched(folder):
        expect(lambda: condit.load("model")("a fox", num_inference_steps=1, seed=0))
        run_command(["generate", "a fox", "-m", "model", "--steps", "1", "-o", "o.png"])


def torch_files() -> list[bytes]:
    out = []
    for zipped in (True, False):
        buffer = io.BytesIO()
        state = {"ema": {"a.weight": torch.zeros(3, 4)}, "step": 3, "b": torch.ones(2).half()}
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
        out.append(buffer.getvalue())
    arrays = io.BytesIO()
    np.savez(arrays, **{"cls": np.zeros((1, 1, 4)), "Transformer/encoder_norm/bias": np.zeros(4)})  # type: ignore[arg-type]
    out.append(arrays.getvalue())
    return [*out, (world().base / "gray.safetensors").read_bytes()[:20_000], b"{}", b"\x80\x02}q\x00."]


def run_weight_bytes(data: bytes, world: World) -> None:
    folder = world.empty()
    (folder / "x.bin").write_bytes(data)
    with watched(folder):
        for read in (read_tensors, names_in, read_metadata, identify, condit.load):
            expect(lambda r=read: r(Path("x.bin")))


# Recipes


def run_png_recipe(case: list[tuple[int, Any]], world: World) -> None:
    folder, recipe = world.fresh(), world.recipe
    for number, value in case:
        recipe = with_leaf(recipe, number, value)
    text = json.dumps(recipe) if isinstance(recipe, dict) else "[]"
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("condit", text)
    Image.new("RGB", (SIDE, SIDE)).save(folder / "x.png", pnginfo=info)
    with watched(folder):
        run_command(["replay", "x.png", "-o", "o.png"])


def run_request_rows(case: list[tuple[int, Any]], world: World) -> None:
    folder = world.fresh()
    rows: list[Any] = [
        {"prompt": "a fox", "steps": 1, "style": "ref.png:0.5"},
        {"prompt": "b", "steps": 1, "name": "c"},
    ]
    for number, value in case:
        row = number % 2
        rows[row] = value if number % 11 == 0 else with_leaf(rows[row], number, value)
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with watched(folder, 20):
        run_command(["generate", "--from", "x.jsonl", "-o", "out"])


TRAIN = {"steps": 1, "batch": 2, "precision": "no", "warmup": 1}
# Small networks: task -> fields of [data] beside `folder` and `size`, or beside `model` and `pairs`.
NETWORKS: dict[str, dict[str, Any]] = {
    "classify": {"sizes": {"patch_size": 8, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}},
    "pixels": {"sizes": {"blocks": [1, 1], "widths": [16, 16], "head_dim": 8, "window": 4, "time_features": 16}},
    "class-conditional": {"backbone": "DiT", "sizes": {"depth": 1, "hidden_size": 16, "num_heads": 2}},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "ip-adapter": {},
    "deadiff": {},
    "omini": {"rank": 4, "conditions": [{"role": "style", "delta": [0, 0]}]},
}
RECIPES: list[dict[str, Any]] = [
    {"task": task, "data": {"folder": "classes", "size": 16, **fields}, "train": TRAIN}
    for task, fields in NETWORKS.items()
] + [
    {"task": task, "data": {"model": "none", "pairs": "set", **fields}, "train": TRAIN}
    for task, fields in ADAPTERS.items()
]


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def run_toml_recipe(case: tuple[int, list[tuple[int, Any]]], world: World) -> None:
    number, todo = case
    folder, recipe = world.fresh(), RECIPES[number % len(RECIPES)]
    for at, value in todo:
        recipe = with_leaf(recipe, at, value)
    if isinstance(recipe, dict):
        text = "\n".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in recipe.items())
        (folder / "x.toml").write_bytes(text.encode("utf-8", "replace"))
        table = recipe.get("train")
        numbers = [n for n in table.values() if type(n) is int] if isinstance(table, dict) else []
        if any(n > 3 for n in numbers):
            return  # the work asked
    with watched(folder, 20):
        run_command(["train", "x.toml", "-o", "run"])


# Metadata


def run_rows(case: list[tuple[int, Any]], world: World) -> None:
    folder = world.fresh()
    rows = [json.loads(line) for line in (folder / "set" / "metadata.jsonl").read_text().splitlines()]
    for number, value in case:
        row = number % len(rows)
        rows[row] = value if number % 11 == 0 else with_leaf(rows[row], number, value)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "set" / "metadata.jsonl").write_text(text)
    with watched(folder):
        run_command(["data", "check", "set"])
        check("set")
        run_command(["data", "pair", "groups", "set", "-o", "pairs", "--across", "--caption", "style"])

        def use() -> None:
            pairs = GroupedPairs(open_pairs("set"))
            pairs.need(["style"])
            pairs.draw(random.Random(0), "style")

        expect(use)


# Python

odd = st.sampled_from([None, "", "x", -1, 0, 1, 2, 10**30, float("nan"), float("inf"), 1.5, True, [], {}, (1, 2), b"x"])
odd |= st.sampled_from(
    [np.int64(2), np.float32(0.5), torch.tensor(1.0), torch.zeros(2, 2), np.zeros((4, 4, 3)), "ref.png"]
)
CALL = "negative_prompt height width num_inference_steps guidance_scale num_images_per_prompt seed generator latents"
CALL += " output_type image_guidance_scale controls image mask_image strength sampler eta callback_on_step_end"
CONTROL = "strength when where mask annotate"


def some(names: str) -> st.SearchStrategy[dict[str, object]]:
    return st.dictionaries(st.sampled_from(names.split()), odd, max_size=3)


def run_call(case: tuple, world: World) -> None:
    prompt, call, reference, control, adapter = case
    pipe = world.pipe
    folder = world.fresh()
    call = {"num_inference_steps": 1, **call}
    with watched(folder, 20):
        kind = condit.IPAdapter if adapter == "style" else condit.OminiControl
        loaded = kind.load(f"tiny/{adapter}", pipe)
        controls = []
        expect(lambda: controls.append(loaded.control(reference, **control)))
        expect(lambda: pipe(prompt, **{"controls": controls, **call}))


def run_edit(case: tuple, world: World) -> None:
    image, source, target, call = case
    with watched(world.fresh(), 20):
        expect(lambda: world.pipe.edit(image, source, target, **{"num_inference_steps": 1, **call}))


EDIT = "negative_prompt height width num_inference_steps guidance_scale seed mask controls solver maps method"
PARTS = ["style/adapter.safetensors", "gray/adapter.safetensors"]
leaves = st.lists(st.tuples(st.integers(0, 10**6), anything), max_size=3)
todo = st.lists(changes, max_size=3)
TARGETS: dict[str, tuple[st.SearchStrategy, Callable[[Any, World], None]]] = {
    "command line": (command_lines(), run_line),
    "image files": (st.deferred(lambda: damaged(picture_files)), run_image),
    "arrays": (st.tuples(shapes, dtypes, fills, st.booleans()), run_array),
    "adapters": (st.tuples(st.sampled_from(PARTS), todo, st.booleans()), run_weights),
    "models": (st.tuples(st.sampled_from(["clip", "canvas", "vae", "transformer"]), todo), run_model),
    "weight bytes": (st.deferred(lambda: damaged(torch_files)), run_weight_bytes),
    "recipes of images": (leaves, run_png_recipe),
    "recipes of training": (st.tuples(st.integers(0, 5), leaves), run_toml_recipe),
    "rows of requests": (leaves, run_request_rows),
    "metadata rows": (leaves, run_rows),
    "Python calls": (st.tuples(odd, some(CALL), odd, some(CONTROL), st.sampled_from(["style", "gray"])), run_call),
    "Python edits": (st.tuples(odd, odd, odd, some(EDIT)), run_edit),
}
