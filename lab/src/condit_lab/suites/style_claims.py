"""The claims on style transfer in docs/claims.md, from what `condit evaluate style` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from condit_lab.suites.claims import Claim, Measured, block
from condit_lab.suites.style_rulers import ALIGNMENT, LEAKAGE, LIKENESS, SCORE, SUBJECT, TOP5

_COMMAND = "condit evaluate style --data data/icons --count 96 --bf16 --claims docs/claims.md"
_INSTANTSTYLE = ("subtract", "subtract-concept", "block", "unet-subtract", "unet-preset")
_CURVE = (
    "Differences are to the plain adapter's curve on the same model at the same style score. Where a method has "
    "another style than every point of that curve there is none, and its own figures stand."
)
_BEYOND = 0.05  # share of resamples outside the curve from which it is said

CLAIMS: dict[str, Claim] = {
    "instantstyle-leakage": Claim(
        "InstantStyle (arXiv:2404.02733, sections 3.2 and 4; pictures, no figures): with the content's words "
        "subtracted, or with the image in the style blocks alone, a style is carried over without the reference's "
        "content. A whole IP-Adapter leaks it or, at a lower strength, loses the style.",
        _COMMAND,
    ),
    "deadiff-prompt": Claim(
        "DEADiff (arXiv:2403.06951, section 4): it carries a reference's style over and keeps to the prompt, where "
        "methods whose encoder reads the whole picture, IP-Adapter among them, let the reference drown the words.",
        _COMMAND,
    ),
    "ip-subject": Claim(
        "IP-Adapter (arXiv:2308.06721, section 5): results resemble the reference in content and style; the subject "
        "itself is not kept. OminiControl (arXiv:2411.15098, section 4) keeps it: its tokens join the sequence.",
        _COMMAND,
    ),
}


def style_claims(result: Mapping[str, Any]) -> dict[str, str]:
    """Claim -> text, for each that the methods of a result (`evaluate_style`) answer."""
    names, blocks = {entry["name"]: entry["what"] for entry in result["methods"]}, {}
    for claim, methods, measure, note in (
        ("instantstyle-leakage", _INSTANTSTYLE, LEAKAGE, "Leakage: cosine with the label of the reference's concept"),
        ("deadiff-prompt", ("unet-deadiff",), ALIGNMENT, "Text alignment: cosine of picture and prompt"),
    ):
        entries = [entry for entry in result["methods"] if entry["name"] in methods and entry["baseline"]]
        rows = []
        for baseline in dict.fromkeys(entry["baseline"] for entry in entries):
            rows += _best(result, baseline, names[baseline], measure)
            held = [entry for entry in entries if entry["baseline"] == baseline]
            rows += [row for entry in held for row in _against(result, entry["name"], entry["what"], measure)]
        if rows:
            above = ", above no reference" if measure == LEAKAGE else ""
            text = f"{note}{above}, in the concept half of our CLIP. {_CURVE}"
            blocks[claim] = block(CLAIMS[claim], rows, note=text, command=result["command"])
    if {"subject", "subject-tokens"} <= names.keys():
        blocks["ip-subject"] = block(
            CLAIMS["ip-subject"],
            _subject(result, names),
            note="Both adapters are shown the prompt's concept drawn by another hand. Likeness: correlation of soft "
            "edges with what was shown, above no reference; fidelity: with the true icon, which no model saw.",
            command=result["command"],
        )
    return blocks


def _row(result: Mapping[str, Any], method: str, measure: str, strength: float) -> Mapping[str, Any]:
    wanted = (method, measure, strength)
    return next(r for r in result["rows"] if (r["method"], r["measure"], r["strength"]) == wanted)


def _best(result: Mapping[str, Any], method: str, what: str, measure: str) -> list[Measured]:
    """Style and another measure of a method at the strength with the most style."""
    styles = [r for r in result["rows"] if (r["method"], r["measure"]) == (method, SCORE)]
    strength = max(styles, key=lambda row: row["value"])["strength"]
    return _own(result, method, f"{what} at {strength:g}, where it has most style", strength, measure)


def _own(result: Mapping[str, Any], method: str, what: str, strength: float, measure: str) -> list[Measured]:
    return [Measured.of(f"{m}, {what}", _row(result, method, m, strength)) for m in (SCORE, measure)]


def _against(result: Mapping[str, Any], method: str, what: str, measure: str) -> list[Measured]:
    """At every strength the difference at equal style, or the method's own figures beyond the curve's ends."""
    rows = []
    for entry in result["comparisons"]:
        # Subtracting nothing is the plain adapter.
        if (entry["method"], entry["measure"]) != (method, measure) or not entry["strength"]:
            continue
        gap, strength = entry["gap"], entry["strength"]
        if gap["difference"] is None:
            rows += _own(result, method, f"{what} at {strength:g} ({gap['side']} the curve)", strength, measure)
            continue
        beyond = f" ({gap['outside']:.0%} of resamples beyond the curve)" if gap["outside"] >= _BEYOND else ""
        difference = {"value": gap["difference"], "low": gap["low"], "high": gap["high"]}
        n, name = _row(result, method, SCORE, strength)["n"], measure.removesuffix(", increase")
        rows.append(Measured.of(f"{name} at equal style, {what} at {strength:g}{beyond}", {**difference, "n": n}))
    return rows


def _subject(result: Mapping[str, Any], names: Mapping[str, str]) -> list[Measured]:
    rows = []
    for measure in (LIKENESS, SUBJECT, TOP5):
        for row in result["rows"]:
            shown = ("subject", "subject-tokens") if measure == LIKENESS else ("none", "subject", "subject-tokens")
            if row["measure"] == measure and row["method"] in shown:
                at = f" at {row['strength']:g}" if row["method"] in result["swept"] else ""
                rows.append(Measured.of(f"{measure}, {names[row['method']]}{at}", row))
    for pair in result["pairs"]:
        if pair["measure"] in (LIKENESS, SUBJECT) and (pair["method"], pair["other"]) == ("subject-tokens", "subject"):
            what = f"{pair['measure']}, OminiControl less IP-Adapter at {pair['other_strength']:g}, the same noise"
            rows.append(Measured.of(what, pair))
    return rows
