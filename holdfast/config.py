"""Configurations: frozen dataclasses whose fields are checked against their annotations.

The annotations are the one schema: Python, YAML and the command line all end here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Self, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from holdfast.errors import Refused
from holdfast.files import only_keys

# A float below 1 is a share of a total, an integer a count; see `count`.
Share = Annotated[float | int, Field(gt=0)]

LARGEST = 1e15  # the square of which float32 still holds


def count(amount: float | int, total: int, *, what: str = "amount", least: int = 1) -> int:
    """A number of things out of `total`: an integer is a count, a float below 1 a share.

    A share is rounded down, as the published stages of DPS are, but not below `least`. `what`
    names the amount in errors.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not amount >= 0:
        raise Refused(f"{what} {amount!r} is neither a share nor a count")
    if isinstance(amount, int):
        return amount
    if not amount < 1:
        raise Refused(f"{what} {amount} is neither a share below 1 nor a whole number",
                      remedy="an integer counts")  # fmt: skip
    return max(least, math.floor(exactly(amount, total)))


def exactly(share: float | Fraction, total: int) -> Fraction:
    """share · total, with the share as it is written in decimal: .29 of 100 is 29, not 28.999…"""
    return Fraction(str(share)) * total


@functools.cache
def _validators(cls: Any) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(cls, include_extras=True)
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return {f.name: TypeAdapter(hints[f.name], config=strict) for f in fields(cls)}


def _takes(validator: TypeAdapter[Any], value: Any) -> bool:
    try:
        validator.validate_python(value)
    except ValidationError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration that is always valid: `Refused` names a wrong field and its value."""

    shares: ClassVar[tuple[str, ...]] = ()  # fields that take a `Share`: 1.0 is refused

    def __post_init__(self) -> None:
        for name, validator in _validators(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            try:
                checked = validator.validate_python(value)
            except ValidationError as error:
                problem, remedy = error.errors()[0]["msg"], None
                if isinstance(value, str) and _takes(validator, (value,)):
                    remedy = f"a single one goes in a list too: [{value!r}]"
                raise Refused(f"{problem}, not {value!r}", where=self.where(name),
                              remedy=remedy) from None  # fmt: skip
            if name in self.shares and isinstance(checked, float) and not checked < 1:
                raise Refused(f"{checked} is neither a share below 1 nor a whole number",
                              where=self.where(name))  # fmt: skip
            if isinstance(checked, float) and abs(checked) > LARGEST:
                raise Refused(f"must be at most {LARGEST:g}, not {checked:g}",
                              where=self.where(name))  # fmt: skip
            object.__setattr__(self, name, checked)

    @classmethod
    def where(cls, name: str) -> str:
        """The name of a field in errors."""
        return name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str | None = None) -> Self:
        """The configuration in `values`; errors name `where` as their source."""
        needed = [f.name for f in fields(cls)
                  if f.default is MISSING and f.default_factory is MISSING]  # fmt: skip
        only_keys(values, [f.name for f in fields(cls)], required=needed, where=where,
                  called=cls.where)  # fmt: skip
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except Refused as error:
            raise error.within(where) from None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, as in a file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
