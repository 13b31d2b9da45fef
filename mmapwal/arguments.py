"""What callers give, checked: an error names the argument, what it may be, and what it was."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from mmapwal import format as fmt
from mmapwal._native import ffi

__all__ = ["check_kind", "check_op", "integer", "kinds_column", "out_of_range"]


def integer(name: str, value: object, low: int, high: int, multiple: int = 1) -> int:
    """`value`, numpy's too, as an int in low .. high. TypeError for what is none (a bool too), ValueError."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not bool")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if not low <= number <= high or number % multiple:
        of = f", a multiple of {multiple}" if multiple > 1 else ""
        raise ValueError(f"{name} must be {low} .. {high}{of}, not {number}")
    return number


def check_op(op: object, name: str = "op", low: int = 1) -> int:
    """As integer()."""
    return integer(name, op, low, fmt.OP_MAX)


def check_kind(kind: object) -> None:
    """ValueError or TypeError, as C would have it: an int itself."""
    if type(kind) is not int or not 0 <= kind <= fmt.KIND_MAX:
        raise out_of_range(TypeError() if not isinstance(kind, int) else ValueError(), kind, 0)


def kinds_column(kinds: Iterable[int], count: int) -> Any:
    """The kinds of a batch, one each, for C. ValueError, TypeError."""
    try:
        values = [operator.index(each) for each in kinds]
        column = ffi.new("uint16_t[]", values)
    except (OverflowError, TypeError) as e:
        raise out_of_range(e, kinds, None) from None
    if len(values) != count:
        raise ValueError(f"{len(values)} kinds for {count} payloads")
    if max(values, default=0) > fmt.KIND_MAX:
        raise out_of_range(ValueError(), kinds, None)
    return column


def out_of_range(error: Exception, kind: Any, timestamp: Any) -> Exception:
    """What to raise where C did not take one of the two."""
    if isinstance(error, TypeError):
        return TypeError(
            f"kind and timestamp are ints, not {type(kind).__name__} and {type(timestamp).__name__}"
        )
    return ValueError(f"kind is 0 .. {fmt.KIND_MAX}, timestamp 64 bits; not {kind} and {timestamp}")
