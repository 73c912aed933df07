"""A number that changes over a stage: from where to where, between which shares of it, and in which shape.

    value(p) = shape(start, end, s),  s = (p - from) / (until - from) clamped to [0, 1],  p the share of the stage done
    linear       start + (end - start) s
    cosine       end + (start - end) (1 + cos(pi s)) / 2      half a period: flat at both ends
    exponential  start^(1 - s) end^s                          the same factor in every part of the ramp
    gaussian     end + (start - end) 10^(-12.5 s^2)           CLIP-Mesh's: a step k of 5000 multiplies by 10^(-1e-6 k)

Shares, never steps: a run of twice the steps then has the same shape. Before `from` the value is `start`, from `until`
on it is `end`; where both are one share it jumps there. In YAML a ramp is a number, which stays, or a short list:

    orientation: 10                             always 10
    orientation: [1, 100]                       linear over the whole stage
    orientation: [1, 100, 0.2, 0.5]             between these shares of the stage
    lr: [0.03, 0.003, 0, 1, cosine]             in another shape
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

FORM = "a number, or [start, end], [start, end, from, until] or [start, end, from, until, shape]"
DECADES = 12.5  # that a gaussian ramp has fallen by at its end

SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, s: start + (end - start) * s,
    "cosine": lambda start, end, s: end + (start - end) * 0.5 * (1 + math.cos(math.pi * s)),
    "exponential": lambda start, end, s: start ** (1 - s) * end**s,
    "gaussian": lambda start, end, s: end + (start - end) * 10 ** (-DECADES * s**2),
}


@dataclass(frozen=True)
class Ramp:
    """A number over the shares of a stage.

    It compares with a number as all of its values do, which is how a field's bounds (gt, ge, lt, le) reach it.

    Args:
        start: the value up to the share `from_`.
        end: the value from the share `until` on.
        from_: where the ramp begins, in [0, 1].
        until: where it ends, in [from_, 1].
        shape: a name of SHAPES.
    Raises: ValueError, whose message says what is wanted.
    """

    start: float
    end: float
    from_: float = 0.0
    until: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        if not math.isfinite(self.start) or not math.isfinite(self.end):
            raise ValueError(f"wanted finite numbers, got {self.start:g} and {self.end:g}")
        if not 0 <= self.from_ <= self.until <= 1:
            raise ValueError(
                f"wanted shares of the stage with 0 <= from <= until <= 1, got {self.from_:g} and {self.until:g}"
            )
        if self.shape not in SHAPES:
            raise ValueError(f"the shapes are {', '.join(SHAPES)}, got {self.shape!r}")
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError(f"an exponential ramp is between positive numbers, got {self.start:g} and {self.end:g}")

    def at(self, share: float) -> float:
        """Return the value at a share of the stage done, in [0, 1]."""
        if share >= self.until:
            return self.end
        if share <= self.from_:
            return self.start
        return SHAPES[self.shape](self.start, self.end, (share - self.from_) / (self.until - self.from_))

    def written(self) -> float | list[float | str]:
        """Return the shortest form that :func:`read_ramp` reads back as an equal ramp."""
        values = [self.start, self.end, self.from_, self.until, self.shape]
        if self.shape != "linear":
            return values
        if (self.from_, self.until) != (0, 1):
            return values[:4]
        return self.start if self.start == self.end else values[:2]

    def __gt__(self, bound: float) -> bool:
        return min(self.start, self.end) > bound

    def __ge__(self, bound: float) -> bool:
        return min(self.start, self.end) >= bound

    def __lt__(self, bound: float) -> bool:
        return max(self.start, self.end) < bound

    def __le__(self, bound: float) -> bool:
        return max(self.start, self.end) <= bound

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        serialization = core_schema.plain_serializer_function_ser_schema(cls.written)
        return core_schema.no_info_plain_validator_function(read_ramp, serialization=serialization)


def constant(value: float) -> Ramp:
    """Return the ramp that stays at one value."""
    return Ramp(float(value), float(value))


def read_ramp(value: Any) -> Ramp:
    """Return the ramp that a setting's value stands for.

    Args:
        value: a number, a list as the module's docstring shows it, or a ramp.
    Raises: ValueError for anything else.
    """
    if isinstance(value, Ramp):
        return value
    if _is_number(value):
        return constant(value)
    if not isinstance(value, list | tuple) or len(value) not in (2, 4, 5):
        raise ValueError(f"wanted {FORM}")
    if not all(_is_number(part) for part in value[:4]):
        raise ValueError(f"wanted {FORM}, all numbers but the shape")
    if len(value) == 5 and not isinstance(value[4], str):
        raise ValueError(f"wanted {FORM}, the shape one of {', '.join(SHAPES)}")
    return Ramp(*map(float, value[:4]), *value[4:])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
