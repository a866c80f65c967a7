"""The base class and value types of every section of the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(value: Any) -> Any:
    """Return 600k, 2.5M, 1B or a plain number as an int.

    Raises:
        PydanticCustomError: it is not a positive whole number.
    """
    text = "" if isinstance(value, bool) else str(value).strip()
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)([kKmMbB]?)", text)
    number = float(match[1].replace("_", "")) * SUFFIXES[match[2].lower()] if match else 0.0
    if not 1 <= number < 2**63 or number != int(number):
        raise PydanticCustomError("count", "must be a positive number such as 600k, 100M, 1B or 4096")
    return int(number)


COUNT_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9][0-9_.]*[kKmMbB]?$"}]}
Count = Annotated[int, BeforeValidator(parse_count), WithJsonSchema(COUNT_SCHEMA)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A section of the configuration: immutable, and without unknown fields.

    Attributes:
        known_as: what others call a field, in other projects or in the founding documents -> what to write instead.
    """

    known_as: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def filled(self, **values: Any) -> Self:
        """Return the section with values that follow from others: `model_fields_set` does not have them."""
        return self.model_construct(self.model_fields_set - values.keys(), **(dict(self) | values))


def problem(message: str, *values: Any) -> PydanticCustomError:
    """Return an error of a validator.

    Args:
        message: with a pair of braces for each value.
        values: what was configured.
    """
    return PydanticCustomError("problem", message.format(*values).replace("{", "{{").replace("}", "}}"))
