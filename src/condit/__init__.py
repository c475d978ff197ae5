"""condit: a prompt and a reference become a picture. Each name below loads its module on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from condit import interop
    from condit.controls.control import Control, When, Where
    from condit.controls.deadiff import DEADiff
    from condit.controls.dit4edit import DiT4Edit
    from condit.controls.instantstyle import InstantStyle
    from condit.controls.ip_adapter import IPAdapter
    from condit.controls.omini import OminiControl
    from condit.controls.style_lora import StyleLoRA
    from condit.controls.stylealigned import StyleAligned
    from condit.controls.styleid import StyleID
    from condit.controls.token_merging import TokenMerging
    from condit.data.images import load_image, save_image
    from condit.drawing.classifier import ViTPipeline
    from condit.drawing.loading import load
    from condit.drawing.pipeline import Pipeline
    from condit.drawing.pipeline import Pipeline as ClassPipeline
    from condit.drawing.pipeline import Pipeline as LatentPipeline
    from condit.drawing.pipeline import Pipeline as PixelPipeline

__version__ = "0.1.0"

__all__ = [
    "ClassPipeline",
    "Control",
    "DEADiff",
    "DiT4Edit",
    "IPAdapter",
    "InstantStyle",
    "LatentPipeline",
    "OminiControl",
    "Pipeline",
    "PixelPipeline",
    "StyleAligned",
    "StyleID",
    "StyleLoRA",
    "TokenMerging",
    "ViTPipeline",
    "When",
    "Where",
    "__version__",
    "interop",
    "load",
    "load_image",
    "save_image",
]

_HOME = {
    "load": "condit.drawing.loading",
    "Pipeline": "condit.drawing.pipeline",
    "ViTPipeline": "condit.drawing.classifier",
    "IPAdapter": "condit.controls.ip_adapter",
    "InstantStyle": "condit.controls.instantstyle",
    "OminiControl": "condit.controls.omini",
    "DEADiff": "condit.controls.deadiff",
    "StyleLoRA": "condit.controls.style_lora",
    "StyleAligned": "condit.controls.stylealigned",
    "StyleID": "condit.controls.styleid",
    "DiT4Edit": "condit.controls.dit4edit",
    "TokenMerging": "condit.controls.token_merging",
    "Control": "condit.controls.control",
    "Where": "condit.controls.control",
    "When": "condit.controls.control",
    "load_image": "condit.data.images",
    "save_image": "condit.data.images",
    "interop": "condit.interop",  # itself a module
}


# Names of a time when each family of models had a pipeline of its own.
_ALIASES = dict.fromkeys(("LatentPipeline", "ClassPipeline", "PixelPipeline"), "Pipeline")


def __getattr__(name: str) -> object:
    """PEP 562: torch and diffusers cost seconds, `condit --help` must not pay them."""
    if name in _ALIASES:
        return __getattr__(_ALIASES[name])
    if name not in _HOME:
        raise AttributeError(f"condit has no {name!r}; it has {', '.join(sorted({*_HOME, *_ALIASES}))}")
    module = import_module(_HOME[name])
    value = module if module.__name__ == f"condit.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ALIASES})
