"""Scores of a completion against its row, in 0..1: the two built-in ones and the user's own `module:function`."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from srppo.errors import ConfigError, MissingAnswer, ScorerFailed, SrppoError

Scorer = Callable[[str, dict[str, Any]], float]

FINAL = re.compile(r"####\s*([-$ ]*(?:\d[\d,]*(?:\.\d+)?|\.\d+))")


def load_scorer(spec: str) -> Scorer | None:
    """The scorer evaluation.scorer names: exact_match, final_number, `module:function` (importable, from the current directory
    too), or none, which gives None. Raises ConfigError for anything else."""
    if spec == "none":
        return None
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if ":" in spec:
        return _checked(spec, _import(spec))
    raise ConfigError(f"evaluation.scorer: {spec!r} is none of {', '.join(BUILT_IN)}, none, or module:function")


def exact_match(completion: str, row: dict[str, Any]) -> float:
    """1 where the completion is the row's answer, white space at the ends aside.

    The answer is the first of the row's fields answer, completion and reference that is a string or number.

    >>> exact_match(" 42\\n", {"answer": "42"}), exact_match("42.", {"answer": "42"})
    (1.0, 0.0)
    """
    return float(completion.strip() == _answer(row, "exact_match").strip())


def final_number(completion: str, row: dict[str, Any]) -> float:
    """1 where the first number after `####` equals the answer's, as in GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

    A completion without `####` scores 0: the format is part of the task. Thousands commas, a dollar sign, trailing dots and
    trailing zeros do not matter. The answer is found as in exact_match; it may also be the bare number.

    >>> final_number("so 1,200.\\n#### 1,200.", {"answer": "2 * 600\\n#### 1200"}), final_number("1200", {"answer": "#### 1200"})
    (1.0, 0.0)
    """
    answer = _answer(row, "final_number")
    wanted = final_value(answer) if "####" in answer else _number(answer)
    if wanted is None:
        raise MissingAnswer(f"evaluation.scorer final_number: the row's answer holds no number: {answer[:80]!r}")
    return float(final_value(completion) == wanted)


def final_value(text: str) -> Decimal | None:
    """The first number after `####`, None without one."""
    match = FINAL.search(text)
    return _number(match[1]) if match else None


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(re.sub(r"[\s,$]", "", text))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _answer(row: dict[str, Any], scorer: str) -> str:
    for field in ("answer", "completion", "reference"):
        value = row.get(field)
        if isinstance(value, (str, int, float)):
            return str(value)
    raise MissingAnswer(
        f"evaluation.scorer {scorer}: the rows have no answer to compare with (a field answer, completion or reference); "
        f"found {', '.join(row) or 'no fields'}. Use scorer: none, or a function of your own"
    )


BUILT_IN: dict[str, Scorer] = {"exact_match": exact_match, "final_number": final_number}


def _import(spec: str) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module can fail in any way while it is imported; the cause is kept and shown
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"evaluation.scorer: cannot import {module_name!r} (also looked for in {here}): {reason}") from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ConfigError(f"evaluation.scorer: {module_name!r} has no function {name!r}; it has {names or 'none'}")
    return function


def _checked(spec: str, function: Callable[..., Any]) -> Scorer:
    """The user's function, its result checked on every call."""

    def score(completion: str, row: dict[str, Any]) -> float:
        try:
            value = function(completion, dict(row))
        except SrppoError:
            raise
        except (Exception, SystemExit) as error:  # the user's code; its traceback stays as the cause
            reason = f"{type(error).__name__}: {error}"
            raise ScorerFailed(f"evaluation.scorer {spec} failed on the completion {completion[:80]!r}: {reason}") from error
        try:
            number = float(value) if not isinstance(value, str) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise ConfigError(f"evaluation.scorer {spec} must return a number in 0..1, got {value!r}; completion {completion[:80]!r}")
        return number

    return score
