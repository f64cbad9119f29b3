"""What every section of the configuration has in common: strict, frozen, documented by its fields' docstrings. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


def members(annotation: Any) -> set[type]:
    """The plain types that an annotation is made of: {str, float} of `Literal["sft"] | float`, {list, str} of `list[str]`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in inner}
    own = {origin} if origin in (list, dict) else set() if inner else {annotation}
    return own.union(*(members(a) for a in inner))


def _scalars(value: Any) -> Iterator[str | int]:
    """Every string, boolean and integer in a value, in its lists and mappings too."""
    if isinstance(value, (str, int)):
        yield value
    elif isinstance(value, (list, dict)):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _scalars(item)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would let pass: true as the number 1, numbers of hundreds of digits, and text that no file, path or
        tokenizer can hold."""
        kinds = members(cls.model_fields[info.field_name or ""].annotation)
        if any(issubclass(kind, Section) for kind in kinds):
            return value  # its own keys are looked at in there
        for found in _scalars(value):
            if isinstance(found, bool):
                if kinds & {int, float} and bool not in kinds:
                    raise ValueError("Input should be a number, not true or false")
            elif isinstance(found, int):
                if not -(2**63) <= found < 2**63:
                    raise ValueError("Input should be a number of at most 64 bits")
            elif re.search("[\0\ud800-\udfff]", found):
                raise ValueError("Input should be text, without NUL characters and undecodable bytes")
        return value
