"""Values that break readers: words of a command line, files, arrays, JSON of any kind."""

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

ESCAPE, REVERSED, LONG = "\x1b[31mred\x1b[0m", "\u202eabc", "x" * 300
TEXTS = [
    "",
    " ",
    "a fox",
    "红苹果",
    ESCAPE,
    REVERSED,
    LONG,
    "x" * 3000,
    "\udcff",
    "a\nb",
    "-",
    "--",
    "=",
    ":",
    "{}",
    "%s",
]
NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "0.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-320",
    "9" * 20,
    "9" * 5000,
    "10000000",
    "x",
    "",
]
INPUTS = ["ref.png", "wide.jpg", "alpha.png", "made.png", "broken.png", "pipe.png", "text.txt", "set", "none.png"]
INPUTS += ["", ".", "..", "../../x.png", "/", "/dev/zero", "/dev/null", LONG, ESCAPE, "https://localhost:1/a.png"]
INPUTS += ["style.safetensors", "gray.safetensors", "classes", "set/metadata.jsonl", "\udcff.png"]
OUTPUTS = [
    "o.png",
    "o.jpg",
    "o.webp",
    "o.txt",
    "o",
    "new/o.png",
    "set",
    "ref.png",
    "/proc/none/o.png",
    "/dev/full",
    LONG,
]
OUTPUTS += [LONG + ".png", "text.txt/o.png", "\udcff.png", ESCAPE + ".png"]

texts, numbers = st.sampled_from(TEXTS) | st.text(max_size=20), st.sampled_from(NUMBERS)
inputs, outputs = st.sampled_from(INPUTS), st.sampled_from(OUTPUTS)
few = st.sampled_from(["1", "2"]) | numbers.filter(lambda n: n not in ("", "1", "2"))
references = inputs | st.builds("{}:{}".format, inputs, numbers)
sides = st.sampled_from(["32", "64", "8", "33", "4096000"]) | numbers
adapters = st.sampled_from(["style", "tiny/style", "style.safetensors", "gray.safetensors", "none", "own.py:f", "set"])
kinds = st.sampled_from(["canny", "edges", "lines", "soft_edges", "gray", "blur", "blur-5", "none", ""])
# JSON of any kind, and what breaks readers of it.
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from([10**7, 10**30, -1, 0, 1.5])
anything = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=5
)


# Options of a command: name -> its values; None: a flag.
SAMPLING = {"--steps": few, "--guidance": numbers, "--seed": numbers, "--negative": texts, "--device": texts}
PICTURE = {"--height": sides, "--width": sides, "-o": outputs, "--json": None}
COMMANDS: dict[str, tuple[list[st.SearchStrategy[str]], Mapping[str, st.SearchStrategy[str] | None]]] = {
    "generate": (
        [texts],
        {"--style": references, "--subject": references, "--edges": references, "--edges-map": references}
        | {"--gray": references, "--control": st.builds("{}={}".format, adapters, references), "--strength": numbers}
        | {"--image-guidance": numbers, "--sampler": texts, "--eta": numbers, "--image": inputs, "--mask": inputs}
        | {
            "--from": inputs,
            "--max-errors": numbers,
            "--threads": numbers,
            "--change": numbers,
            "-n": few,
            "--no-metadata": None,
            "-m": inputs | texts,
            **SAMPLING,
            **PICTURE,
        },
    ),
    "edit": (
        [inputs, texts, texts],
        {
            "--type": texts,
            "--style": references,
            "--mask": inputs,
            "--reweight": st.builds("{}={}".format, texts, numbers),
        }
        | {"--merge": numbers, "--solver": texts, "--method": st.sampled_from(["own.py:f", "none.py:f", "x"])}
        | {"--page": outputs, **SAMPLING, **PICTURE},
    ),
    "replay": ([inputs], {"-o": outputs, "--control": texts, "--json": None}),
    "annotate": ([inputs, kinds], {"--height": sides, "--width": sides, "-o": outputs}),
    "plan": ([inputs | texts], {"--height": sides, "--width": sides, "--steps": few, "-n": few, "--dtype": texts}),
    "train": ([inputs], {"-o": outputs, "--resume": None}),
    "data check": ([inputs], {"--quick": None, "--json": None}),
    "data draw": (
        [],
        {"-o": outputs, "--subjects": inputs, "--styles": inputs, "--per-subject": few, "-n": few, "--template": texts}
        | SAMPLING,
    ),
    "models": ([], {"--json": None}),
    "none": ([texts], {}),
}
ALWAYS = {"generate": ["--steps", "1"], "edit": ["--steps", "1"], "data draw": ["--steps", "1"]}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(list(COMMANDS)))
    positional, options = COMMANDS[name]
    line = [*name.split(), *ALWAYS.get(name, [])]
    chosen = draw(st.lists(st.sampled_from(list(options)), max_size=5)) if options else []
    for option in chosen:
        values = options[option]
        line += [option] if values is None else [option, draw(values)]
    line += [draw(values) for values in positional]
    # The system passes no NUL to a program.
    return [word.replace("\0", "") for word in line]


@st.composite
def damaged(draw: st.DrawFn, make: Callable[[], list[bytes]]) -> bytes:
    """A file with a few bytes replaced, removed or repeated."""
    data = bytearray(draw(st.sampled_from(make())))
    for _ in range(draw(st.integers(0, 4))):
        # Headers are at the start.
        at = draw(st.integers(0, min(len(data), 400)) | st.integers(0, len(data)))
        kind, size = draw(st.sampled_from(["set", "cut", "drop", "grow"])), draw(st.integers(1, 8))
        if kind == "set":
            data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "cut":
            del data[max(at, 1) :]
        elif kind == "drop":
            del data[at : at + size]
        else:
            data[at:at] = data[at : at + size]
    return bytes(data)


def picture_files() -> list[bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    files = []
    for kind, options in {
        "PNG": {"exif": exif},
        "JPEG": {"exif": exif},
        "WEBP": {"exif": exif},
        "GIF": {},
        "BMP": {},
        "TIFF": {"compression": "tiff_lzw"},
    }.items():
        out = io.BytesIO()
        image.save(out, kind, **options)
        files.append(out.getvalue())
    for mode in ("P", "LA", "I;16", "1"):
        out = io.BytesIO()
        (image.convert("L") if mode == "I;16" else image).convert(mode).save(out, "PNG")
        files.append(out.getvalue())
    return files


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from(["uint8", "bool", "int64", "float16", "float32", "float64", "complex64", "uint16", "int8"])
fills = st.sampled_from([0, 1, 0.5, -1, 255, float("nan"), float("inf")])


def with_leaf(value: Any, number: int, new: Any) -> Any:
    """A JSON value with one of its parts replaced, added or, for a new value of None, removed."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(value)
    if not places:
        return new
    part, key = places[number % len(places)]
    if number % 7 == 0:
        del part[key]
    elif number % 7 == 1 and isinstance(part, dict):
        part[str(new)] = new
    else:
        part[key] = new
    return value
