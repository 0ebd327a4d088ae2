"""Configurations: frozen dataclasses whose fields are checked against their annotations.

The annotations are the one schema: Python, YAML and the command line all end here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, ClassVar, Self, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from holdfast.errors import Refused, nearest

# A float below 1 is a share of a total, an integer a count; see `count`.
Share = Annotated[float | int, Field(gt=0)]


def count(share: float | int, total: int) -> int:
    """A number of things out of `total`: a share (0 < share < 1, rounded down) or a count; ≥ 1."""
    if isinstance(share, int):
        return share
    if not 0 < share < 1:
        raise Refused(f"{share} is neither a share below 1 nor a whole number")
    return max(1, math.floor(share * total))


@functools.cache
def _validators(cls: Any) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(cls, include_extras=True)
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return {f.name: TypeAdapter(hints[f.name], config=strict) for f in fields(cls)}


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration that cannot be made wrong: `Refused` names the field and the value."""

    shares: ClassVar[tuple[str, ...]] = ()  # fields in which 1.0 means neither a share nor a count

    def __post_init__(self) -> None:
        for name, validator in _validators(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            try:
                checked = validator.validate_python(value)
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise Refused(f"{problem}, not {value!r}", where=self.where(name)) from None
            if name in self.shares and isinstance(checked, float) and not checked < 1:
                raise Refused(f"{checked} is neither a share below 1 nor a whole number",
                              where=self.where(name))  # fmt: skip
            object.__setattr__(self, name, checked)

    @classmethod
    def where(cls, name: str) -> str:
        """How an error calls a field."""
        return name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """The configuration in `values`; a key that is no field is refused with the nearest."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise Refused(f"no setting {cls.where(key)!r}", where=where,
                              remedy=nearest(key, known))  # fmt: skip
        for f in fields(cls):
            if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
                raise Refused("must be given", where=f"{where}: {cls.where(f.name)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, as it stands in a file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
