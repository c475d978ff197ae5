"""DiT4Edit's claims in docs/claims.md, from what `condit evaluate edit` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from condit_lab.suites.claims import Claim, Measured, block
from condit_lab.suites.edit import DIRECTION, KEPT, KEPT_SSIM, METHODS, NEAR, PAIRS, STRUCTURE
from condit_lab.suites.edit_rows import difference
from condit_lab.suites.edit_trips import MERGED_STEP, MERGED_TOKENS, TRIP

MODELS = ("tiny-pixart", "tiny")
_PAPER = "DiT4Edit (arXiv:2411.03286, abstract and section 4)"
SOLVER, UNIFIED, MERGING = "dit4edit-solver", "dit4edit-unified", "dit4edit-merging"


def _command(model: str) -> str:
    return f"condit evaluate edit{f' --model {model}' * (model != 'tiny')} --data data/icons --claims docs/claims.md"


CLAIMS: dict[str, Claim] = {
    f"{SOLVER}/{MODELS[0]}": Claim(
        f"{_PAPER}: DPM-Solver inversion takes fewer steps than DDIM inversion for as good a reconstruction.",
        _command(MODELS[0]),
    ),
    **{
        f"{UNIFIED}/{model}": Claim(
            f"{_PAPER}: unified control of cross- and self-attention keeps what an edit shall leave alone better than "
            "control of cross-attention.",
            _command(model),
        )
        for model in MODELS
    },
    **{
        f"{MERGING}/{model}": Claim(
            f"{_PAPER}: merging similar patches makes an edit faster at little loss.", _command(model)
        )
        for model in MODELS
    },
}


def edit_claims(result: Mapping[str, Any]) -> dict[str, str]:
    """Claim -> text, for each that the tasks of a result (`evaluate_edit`) answer. ValueError for a model of which the
    page claims nothing."""
    model, rows = result["model"], result["rows"]
    if model not in MODELS:
        raise ValueError(f"Claims are about {' and '.join(MODELS)}; {model!r} was measured. Leave --claims out.")
    by_claim: dict[str, list[Measured]] = {
        SOLVER: _rows_of(rows, "icons", (TRIP,), None, 1) + _rows_of(rows, "photographs", (TRIP,), None, 1),
        UNIFIED: _rows_of(rows, "concept", (KEPT, KEPT_SSIM, STRUCTURE, NEAR, DIRECTION), PAIRS[0], 3),
        MERGING: _rows_of(rows, "concept", (KEPT, STRUCTURE, NEAR, DIRECTION), PAIRS[1], 3)
        + _rows_of(rows, "speed", (MERGED_STEP,), PAIRS[1], 3),
    }
    tokens = f"Edits at 128 px have 64 tokens; a step of {MERGED_TOKENS} tokens is timed, in seconds of the processor."
    notes = {
        SOLVER: "Each solver walks up and down on its own, without stored trajectory; dpmpp2m is the paper's, "
        "first_order DDIM on the same levels, entered DDIM as diffusers inverts with it, on fewer of them.",
        UNIFIED: f"Concept edits of held-out icons, {result['steps']} steps, both on the stored, anchored trajectory.",
        MERGING: f"{result['steps']} steps. {tokens}",
    }
    return {
        name: block(CLAIMS[name], measured, note=notes[claim], command=result["command"])
        for claim, measured in by_claim.items()
        if measured and (name := f"{claim}/{model}") in CLAIMS
    }


def _rows_of(
    rows: Sequence[Mapping[str, Any]],
    task: str,
    measures: Sequence[str],
    pair: tuple[str, str] | None,
    digits: int,
) -> list[Measured]:
    """Figures of a task; of a pair of methods both and their difference."""
    wanted = None if pair is None else (*pair, difference(*pair))
    assert pair is None or set(pair) <= set(METHODS)
    return [
        Measured.of(f"{row['measure']}, {task}: {row['case']}", row, digits)
        for measure in measures
        for row in rows
        if (row["task"], row["measure"]) == (task, measure) and (wanted is None or row["case"] in wanted)
    ]
