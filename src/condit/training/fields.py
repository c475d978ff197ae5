"""What the tables of a recipe may hold: types of fields, and the base of every task's `[data]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Larger numbers are typing errors, for which no memory could be allocated.
Count = Annotated[int, Field(ge=1, le=100_000)]
Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
# Recorded in an export as the recipe writes it: 4 stays 4 and does not become 4.0.
Number = int | float
# Fields of a network's configuration; `labelled.with_sizes` compares their types with the preset's.
Sizes = Mapping[str, int | float | bool | str | list[int]]


class Data(BaseModel):
    """`[data]` of a recipe, checked before anything is loaded. Raises ValueError (pydantic's) that names the field.

    Types are strict: "no" is not a bool, "3" is not a number. NaN and infinity are refused everywhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, fields: object) -> object:
        """TOML has lists only; fields of sequences are tuples, as the models are frozen."""
        if not isinstance(fields, dict):
            return fields
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def check_shares(shares: tuple[float, ...]) -> tuple[float, ...]:
    """How often a batch is of style pairs, content pairs and reconstruction. Raises ValueError unless it can be."""
    if len(shares) != 3 or min(shares) < 0 or not sum(shares):
        raise ValueError(
            f"shares must be three numbers >= 0, not all 0 (style, content, reconstruction); found {list(shares)}."
        )
    return shares


def first_error(error: ValidationError) -> str:
    """The first field that is wrong, in one line: `held_out: Input should be ... (found -3)`."""
    first = error.errors()[0]
    # pydantic names the members of a union by their validators: tuple[...], literal[...].
    where = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    text = f"{where}: {first['msg'].removeprefix('Value error, ')}"
    # The messages of our own validators include the value.
    return text.rstrip(".") if first["type"] == "value_error" else f"{text} (found {repr(first.get('input'))[:100]})"
