"""Text for people: safe to show in a terminal, numbers as short as they can honestly be."""

from __future__ import annotations

import json
import re
from typing import Any

_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]?|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|[ -/]*[0-~]?)"  # CSI, OSC, strings, two-byte
    r"|\x9b[0-?]*[ -/]*[@-~]?"  # CSI as one character
)
_UNSAFE = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"  # controls but tab and newline, half surrogate pairs
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of the writing direction
    r"\ufff9-\ufffb\U000e0000-\U000e007f"  # interlinear notes and tags, which nobody sees
)
_CONTROLS = re.compile(f"[{_UNSAFE}]")


def clean(text: str) -> str:
    """text without escape sequences, control characters (tab and newline stay) and marks that reverse the writing direction."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))


def json_text(value: Any) -> str:
    """value as JSON on one line: text stays readable, but what `clean` would drop is written as \\uXXXX. Nothing is lost, and any terminal
    may show it."""
    text = json.dumps(value, ensure_ascii=False)
    # Such characters stand inside strings only. DEL is the one that the json module never escapes.
    return _CONTROLS.sub(lambda found: json.dumps(found[0])[1:-1].replace("\x7f", "\\u007f"), text)


def code(text: Any) -> str:
    """Any text as a code span of Markdown: one line, in which no mark-up and no HTML is read."""
    line = " ".join(clean(str(text)).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 or not line else f"`{line}`"


def number(value: Any) -> str:
    """A metric in at most six or so characters; other values as clean text."""
    if isinstance(value, bool) or not isinstance(value, float):
        return clean(str(value))
    if value != value:
        return "nan"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """3 s, 2 min 05 s, 1 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def counted(n: int, noun: str) -> str:
    """1 prompt, 2 prompts."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def percent(share: float | None, digits: int = 1) -> str:
    """0.7312 as 73.1 %; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"
