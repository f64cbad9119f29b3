"""What a JSON value of ours should look like, and what is left of one that does not: for files that a disk or a stranger changed.

A shape is NUMBER, TEXT, SWITCH or ANY, a list [shape], a dict of keys to shapes ("*" for all others), or a tuple of shapes (one of them).
"""

from __future__ import annotations

import math
from typing import Any, Final

NUMBER: Final = "a number"
TEXT: Final = "text"
SWITCH: Final = "true or false"
ANY: Final = "anything"
DEEPEST = 24  # levels; ours have six at most
LARGEST = 1e15  # of a number: plots, sums and texts of larger ones break down
_DROPPED = object()


def fitted(value: Any, shape: Any) -> tuple[Any, list[str]]:
    """value without the parts that do not fit, and where those were: "groups.all.n: text, not a number".

    Null fits everywhere but in a list of one kind.
    What a dict lacks is not missed. None where the value as a whole does not fit.
    """
    wrong: list[str] = []
    out = _fit(value, shape, "", 0, wrong)
    return (None if out is _DROPPED else out), wrong


def _fit(value: Any, shape: Any, path: str, depth: int, wrong: list[str]) -> Any:
    if value is None:
        return None
    if depth > DEEPEST:
        wrong.append(f"{path[:200]}: nested too deeply")
        return _DROPPED
    if isinstance(shape, tuple):
        return _one_of(value, shape, path, depth, wrong)
    if isinstance(value, dict) and (shape is ANY or isinstance(shape, dict)):
        shapes: dict[str, Any] = shape if isinstance(shape, dict) else {}
        rest = shapes.get("*", ANY)
        pairs = {str(k): _fit(v, shapes.get(k, rest), f"{path}.{k}" if path else str(k), depth + 1, wrong) for k, v in value.items()}
        return {k: v for k, v in pairs.items() if v is not _DROPPED}
    if isinstance(value, list) and (shape is ANY or isinstance(shape, list)):
        inner = ANY if shape is ANY else shape[0]
        items = [_fit(item, inner, f"{path}[{i}]", depth + 1, wrong) for i, item in enumerate(value)]
        if inner is not ANY and None in items:
            wrong.append(f"{path or 'all of it'}: null among its items")
        return [item for item in items if item is not _DROPPED and (item is not None or inner is ANY)]
    if _is(value, shape) or (shape is ANY and any(_is(value, kind) for kind in (NUMBER, TEXT, SWITCH))):
        return value
    wrong.append(f"{path or 'all of it'}: {_kind(value)}, not {_wanted(shape)}")
    return _DROPPED


def _one_of(value: Any, shapes: tuple[Any, ...], path: str, depth: int, wrong: list[str]) -> Any:
    """By the shape that leaves most of it."""
    tries: list[tuple[Any, list[str]]] = []
    for shape in shapes:
        errors: list[str] = []
        tries.append((_fit(value, shape, path, depth, errors), errors))
    out, errors = min(tries, key=lambda t: (t[0] is _DROPPED, len(t[1])))
    if out is _DROPPED:
        errors = [f"{path or 'all of it'}: {_kind(value)}, not {_wanted(shapes)}"]
    wrong += errors
    return out


def _is(value: Any, shape: Any) -> bool:
    if shape is NUMBER:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST  # NaN is neither
    return (shape is TEXT and isinstance(value, str)) or (shape is SWITCH and isinstance(value, bool))


def _kind(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        finite = isinstance(value, int) or math.isfinite(value)
        return NUMBER if _is(value, NUMBER) else "a number beyond reason" if finite else "no finite number"
    return {bool: str(SWITCH), str: str(TEXT), list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


def _wanted(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(_wanted(s) for s in shape)
    return "an object" if isinstance(shape, dict) else "a list" if isinstance(shape, list) else str(shape)
