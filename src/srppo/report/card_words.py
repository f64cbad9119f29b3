"""Values of a reward card as words: whatever the card holds or lacks, safe to show and as short as it can honestly be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from srppo.text import clean, percent

Row = dict[str, Any]
NONE = "–"
AUTHORS = {"demonstration": "demonstration", "sft": "SFT", "base": "base"}


class Cell(NamedTuple):
    text: str
    interval: str = ""  # 95 %: "0.10 to 0.73"
    half: str = ""  # its wider side, where there is no room: "0.32"


def items(card: Row, key: str) -> list[Row]:
    found = card.get(key)
    return [r for r in found if isinstance(r, dict)] if isinstance(found, list) else []


def part(card: Row, key: str) -> Row:
    found = card.get(key)
    return found if isinstance(found, dict) else {}


def real(value: Any) -> float | None:
    """A finite number, or None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def line(value: Any, limit: int = 60) -> str:
    """Any text on one line."""
    text = " ".join(clean(str(value)).split()) if value is not None else NONE
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def group(name: Any) -> str:
    return "all prompts" if name == "all" else line(name).replace("_", " ")


def author(name: Any) -> str:
    return AUTHORS.get(name, line(name)) if isinstance(name, str) else line(name)


def checkpoint(name: Any, brief: bool = False) -> str:
    """ "share-0.5" as words."""
    text = line(name)
    done = text.removeprefix("share-")
    if text == "sft":
        return "SFT" if brief else "the SFT model"
    if text == "reward":
        return "another model" if brief else "another model (the recipe's reward.checkpoint)"
    if done == text or not done.replace(".", "", 1).isdecimal():
        return text
    return f"SFT at {percent(float(done), 0)}" if brief else f"the SFT checkpoint at {percent(float(done), 0)} of its training"


def nats(value: Any, sign: bool = False) -> str:
    """To two decimals, fewer for large ones."""
    found = real(value)
    if found is None:
        return NONE
    text = f"{found:{'+' if sign else ''}.{2 if abs(found) < 99.5 else 0}f}"
    return text.replace("-", "−")


def tokens(value: Any) -> str:
    found = real(value)
    return NONE if found is None else f"{found:.1f}" if found < 99.95 else f"{found:.0f}"


def plain_number(value: Any) -> str:
    found = real(value)
    return NONE if found is None else f"{found:.4g}".replace("-", "−")


def short_percent(value: Any) -> str:
    """A share as 46 %, small ones as 3.1 %."""
    found = real(value)
    return percent(found, 1 if found is not None and 0 < found < 0.0995 else 0)


def estimate(value: Any, sign: bool = False) -> Cell:
    found = value if isinstance(value, dict) else {}
    return Cell(nats(found.get("value"), sign), *_interval(found, nats))


def share(value: Any) -> Cell:
    found = value if isinstance(value, dict) else {}
    return Cell(percent(real(found.get("value")), 0), *_interval(found, lambda v: f"{100 * v:.0f}"))


def points(value: Any) -> Cell:
    """A difference of shares in percentage points."""
    found = {k: None if (n := real(v)) is None else 100 * n for k, v in value.items()} if isinstance(value, dict) else {}

    def text(v: float) -> str:
        return f"{v:.1f}".replace("-", "−")

    middle = found.get("value")
    return Cell(NONE if middle is None else f"{'+' * (middle > 0)}{text(middle)}", *_interval(found, text))


def _interval(found: Row, text: Callable[[float], str]) -> tuple[str, str]:
    middle, low, high = (real(found.get(k)) for k in ("value", "low", "high"))
    if middle is None or low is None or high is None:
        return "", ""
    return f"{text(low)} to {text(high)}", text(max(middle - low, high - middle))
