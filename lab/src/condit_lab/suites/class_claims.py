"""The claims about ViT, DiT and DiffiT in docs/claims.md, from what `condit evaluate classes` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from condit_lab.suites.claims import Claim, Measured, block

_RUNS = "runs/small-dit/export runs/small-diffit/export runs/small-dit-adaln/export"
_VITS = "runs/small-vit/export runs/small-vit-concept/export"


def _command(runs: str) -> str:
    return f"condit evaluate classes {runs} --data data/icons --claims docs/claims.md"


CLAIMS: dict[str, Claim] = {
    "diffit-dit": Claim(
        "DiffiT (arXiv:2312.02139, Tables 2 and 9): FID 1.73 on ImageNet-256 with 561M parameters; DiT-XL/2 has 2.27 "
        "with 675M. Better pictures with fewer parameters.",
        _command(_RUNS),
    ),
    "adaln-zero": Claim(
        "DiT (arXiv:2212.09748, Table 4, section 3.2): XL/2 after 400K steps has FID 19.47 with adaLN-Zero (gates, "
        "zero start) and 25.21 with plain adaLN.",
        _command(_RUNS),
    ),
    "vit-style": Claim(
        "ViT (arXiv:2010.11929, section 4.3, Table 5): pre-trained on enough pictures a plain transformer tells "
        "classes as well as convolutional networks do; trained on few, worse (ViT-L/16 on ImageNet alone: 76.53 %).",
        _command(_VITS),
    ),
    "vit-concept": Claim(
        "The same claim, with concepts (drawn by another hand than those of training) in place of styles.",
        _command(_VITS),
    ),
}


def class_claims(result: Mapping[str, Any]) -> dict[str, str]:
    """Claim -> text, for each that the runs of a result (`evaluate_classes`) answer."""
    from condit_lab.suites.classes import ACCURACY, AGREEMENT, CLIP, CONCEPT, CONCEPT5, DISTANCE, ERROR, JUDGE

    blocks: dict[str, str] = {}
    models = result["models"]
    drawing = {_kind(described): name for name, described in models.items() if described["backbone"] != "ViT"}
    for claim, one, other in (("diffit-dit", "DiffiT", "DiT"), ("adaln-zero", "DiT", "DiT, plain adaLN")):
        if one not in drawing or other not in drawing:
            continue
        pair = {kind: models[drawing[kind]] for kind in (one, other)}
        sizes = ("depth", "width", "steps", "images_seen")
        if any(pair[one].get(size) != pair[other].get(size) for size in sizes):
            continue  # at another depth, width or training it would be another claim
        rows = [
            Measured(f"parameters, {kind}", described["parameters"], None, None, None, 0)
            for kind, described in pair.items()
        ]
        for measure, digits in ((ERROR, 4), (AGREEMENT, 3), (DISTANCE, 2)):
            rows += [Measured.of(f"{measure}, {k}", _of(result, drawing[k], measure)["interval"], digits) for k in pair]
        # `less` is the difference to the run that came first, of the same icons with the same noise.
        for kind in pair:
            if result["first"][ERROR] == drawing[_other(pair, kind)]:
                less = _of(result, drawing[kind], ERROR)["less"]
                rows.append(Measured.of(f"{ERROR}, {kind} minus {_other(pair, kind)}, the same icons", less, 4))
        of = pair[one]
        note = f"Depth {of['depth']}, width {of['width']}, {_trained(of)}; error and distance: less is better."
        blocks[claim] = block(CLAIMS[claim], rows, note=note, command=result["command"])
    for claim, measures, baseline in (("vit-style", (ACCURACY,), JUDGE), ("vit-concept", (CONCEPT, CONCEPT5), CLIP)):
        figures = [f for f in result["figures"] if f["measure"] in measures]
        described = next((models[f["model"]] for f in figures if f["model"] in models), None)
        if described is None:
            continue
        rows = [Measured("parameters, ViT", described["parameters"], None, None, None, 0)]
        rows += [
            Measured.of(f"{f['measure']}, {'ViT' if f['model'] in models else baseline}", f["interval"], 1)
            for f in figures
        ]
        rows += [
            Measured.of(f"{f['measure']}, {baseline} minus ViT, the same icons", f["less"], 1)
            for f in figures
            if f["model"] == baseline and f["less"] is not None
        ]
        blocks[claim] = block(
            CLAIMS[claim], rows, note=f"{_trained(described).capitalize()}.", command=result["command"]
        )
    return blocks


def _kind(described: Mapping[str, Any]) -> str:
    return described["backbone"] + (", plain adaLN" if described["adaln"] == "plain" else "")


def _other(pair: Mapping[str, Any], kind: str) -> str:
    return next(name for name in pair if name != kind)


def _of(result: Mapping[str, Any], model: str, measure: str) -> Mapping[str, Any]:
    return next(f for f in result["figures"] if (f["model"], f["measure"]) == (model, measure))


def _trained(described: Mapping[str, Any]) -> str:
    if "steps" not in described:
        return "trained as its folder does not tell"
    return f"trained for {described['steps']:,} steps on {described['images_seen']:,} pictures of the icon world"
