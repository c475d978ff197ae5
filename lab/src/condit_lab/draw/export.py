"""A small copy of a run: averaged weights in bf16, code, tokenizer and card, without the optimisers' state.

python -m condit_lab.draw.export RUN OUT [--average 0]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.encoders.clip_tokenizer import ClipTokenizer
from condit.weights.files import load_strict, read_tensors, save_tensors
from condit_lab.draw.code import RgbaCode
from condit_lab.draw.model import DrawModel, ModelConfig, new_text

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
SKETCH, EMBEDDER = "text.sketch.", "transformer.x_embedder.weight"


def export(run: Path, out: Path, *, average: int = 0) -> None:
    """Write an average of the run's weights (0: the shortest) to the folder `out`."""
    state = torch.load(run / "state.pt", weights_only=True, map_location="cpu")
    tensors: dict[str, Tensor] = {k: v.bfloat16() for k, v in state["averages"][average]["shadow"].items()}
    tensors |= {name: x.bfloat16() if name.startswith("text.") else x.float() for name, x in state["fitted"].items()}
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out / WEIGHTS, tensors, {"condit": "draw"})
    if (run / TOKENIZER).exists():
        shutil.copy(run / TOKENIZER, out / TOKENIZER)
    card = {"images": state["images"], "step": state["step"], "average": average, **json.loads(state["recipe"])}
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def load_tokenizer(export: Path, run: Path) -> None:
    """Give a run that starts from an export the export's tokenizer."""
    if (export / TOKENIZER).exists():
        shutil.copy(export / TOKENIZER, run / TOKENIZER)


def load_export(export: Path, model: nn.Module) -> tuple[int, bool]:
    """Set a model's weights; returns the number of images they have seen, and whether the sketch is among them. Exports
    from before the sketch have a linear map to the first channels of its codes in its place, which is left out."""
    tensors = {name: x.float() for name, x in read_tensors(export / WEIGHTS).items()}
    own, sketched = model.state_dict(), any(name.startswith(SKETCH) for name in tensors)
    if not sketched:
        left_out = ("text.canvas_weight", "text.canvas_bias")
        tensors = {name: x for name, x in tensors.items() if name not in left_out}
        tensors |= {name: x for name, x in own.items() if name.startswith(SKETCH)}
        columns = own[EMBEDDER].shape[1] - tensors[EMBEDDER].shape[1]
        tensors[EMBEDDER] = F.pad(tensors[EMBEDDER], (0, columns))
    load_strict(model, tensors, source=export)
    return json.loads((export / "card.json").read_text(encoding="utf-8"))["images"], sketched


def load_model(folder: Path) -> DrawModel:
    """The model of an export, to draw with. ValueError for one without a sketch."""
    config = ModelConfig(**json.loads((folder / "card.json").read_text(encoding="utf-8"))["model"])
    text = new_text(config, ClipTokenizer.load(folder, config.text_tokens))
    model = DrawModel(config, RgbaCode(config.components), text)
    if not load_export(folder, model)[1]:
        raise ValueError(f"{folder} is from before the sketch. Start a run from it (--init), which fits one.")
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--average", type=int, default=0, help="which of the run's averages; 0: the shortest")
    chosen = parser.parse_args()
    export(chosen.run, chosen.out, average=chosen.average)


if __name__ == "__main__":
    main()
