"""Reading back what a run wrote about itself, before it is gone on from: a file that says something else is named, with what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from srppo.errors import RunFolderError
from srppo.files import read_json, read_lines
from srppo.json_shape import ANY, NUMBER, TEXT, fitted

_SCORES = ("sampled", "sampled_low", "sampled_high", "greedy", "greedy_low", "greedy_high", "mean_length", "greedy_mean_length", "eos_rate")
_GROUP = {**dict.fromkeys((*_SCORES, "n", "samples"), NUMBER)}
_SHARE = {"share": NUMBER, "step": NUMBER, "folder": TEXT, "*": ANY}
_TRAINED = {"compute": {"*": NUMBER}, "seconds": NUMBER, "kept": _SHARE, "checkpoints": [_SHARE], "loaded": TEXT, "*": ANY}
_SHAPES: dict[str, Any] = {
    "evaluate": {"groups": {"*": _GROUP}, "heldout_nll": NUMBER, "lost_and_gained": {"*": {"*": NUMBER}}, "forgetting": {"*": NUMBER}},
    "sft": _TRAINED,
    "ppo": _TRAINED,
    "sft_continued": _TRAINED,
    "start": {"held": TEXT},
    "diagnose": {
        "verdict": TEXT,
        "reasons": [TEXT],
        "decision": {"start": TEXT, "numerator": TEXT, "beta": NUMBER, "automatic": [TEXT], "*": ANY},
    },
}
_NEEDED = {"evaluate": ("groups",), "sft": ("compute",), "ppo": ("compute",), "sft_continued": ("compute",), "start": ("held",)}
_ANSWER = {
    "group": TEXT,
    "row": NUMBER,
    "prompt": TEXT,
    "sampled": [TEXT],
    "sampled_scores": [NUMBER],
    "greedy": TEXT,
    "greedy_score": NUMBER,
    "lengths": [NUMBER],
}
_PLACE = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")  # of a checkpoint, below the run folder
CURE = "put the file back as it was, or begin anew with --overwrite"


def read_outcome(path: Path, name: str, cure: str = CURE) -> dict[str, Any]:
    """stages/<name>.json. Raises RunFolderError, which ends with the cure, where it is not what a finished stage leaves."""
    content = read_json(path)
    kind = name.split("-", 1)[0]
    found, wrong = fitted(content, _SHAPES.get(kind, {"*": ANY}))
    if not isinstance(found, dict):
        wrong = wrong or ["all of it: null, not an object"]
    else:
        wrong += [f"{key}: not there" for key in _NEEDED.get(kind, ()) if found.get(key) is None]
        wrong += [f"groups.{g}: lacks {k}" for g, r in _dict(found.get("groups")).items() for k in _GROUP if r is None or k not in r]
        wrong += [f"groups.{g}.{k}: unknown" for g, r in _dict(found.get("groups")).items() for k in _dict(r) if k not in _GROUP]
        named = [(_dict(c).get("folder"), "folder") for c in [found.get("kept"), *(found.get("checkpoints") or [])]]
        named += [(found.get("held"), "held")] + [(_dict(found.get("decision")).get(k), k) for k in ("start", "numerator")]
        wrong += [f"{key}: {text[:80]!r} is no checkpoint of this run" for text, key in named if text is not None and not _inside(text)]
    if wrong:
        raise RunFolderError(f"{path}: damaged ({_few(wrong)}); {cure}")
    assert isinstance(found, dict)
    return found


def read_answers(path: Path) -> list[dict[str, Any]]:
    """evaluation/<stage>.jsonl; [] without it. Raises RunFolderError with the line that is not an answer."""
    rows = read_lines(path)
    for number, row in enumerate(rows, 1):
        _, wrong = fitted(row, _ANSWER)
        wrong += [f"{key}: not there" for key in _ANSWER if key not in row] + [f"{key}: unknown" for key in row if key not in _ANSWER]
        wrong += [f"{key}: null" for key in ("group", "row", "prompt", "sampled", "greedy", "lengths") if key in row and row[key] is None]
        if not wrong and any(None in (row[key] or []) for key in ("sampled", "sampled_scores", "lengths")):
            wrong = ["null in a list"]
        if wrong:
            raise RunFolderError(f"{path}, row {number}: damaged ({_few(wrong)}); {CURE}")
    return rows


def read_elapsed(path: Path) -> dict[str, Any]:
    """elapsed.json: seconds, peak_rss_mb and stages; {} without it. Raises RunFolderError where it is damaged."""
    if not path.exists():
        return {}
    found, wrong = fitted(read_json(path), {"seconds": NUMBER, "peak_rss_mb": NUMBER, "stages": ANY})
    if wrong or not isinstance(found, dict):
        raise RunFolderError(f"{path}: damaged ({_few(wrong or ['null'])}); delete it, and the time spent is counted from now on")
    return {key: value for key, value in found.items() if value is not None}


def read_environment(path: Path) -> dict[str, Any]:
    """environment.json. Raises RunFolderError where it is damaged."""
    found, wrong = fitted(read_json(path), {"before_resume": [{"*": ANY}], "*": ANY})
    if wrong or not isinstance(found, dict):
        raise RunFolderError(f"{path}: damaged ({_few(wrong or ['null'])}); delete it, and it is written anew")
    return found


def _inside(place: str) -> bool:
    return _PLACE.fullmatch(place) is not None and ".." not in place


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _few(wrong: list[str]) -> str:
    return "; ".join(wrong[:3]) + (f"; {len(wrong) - 3} more" if len(wrong) > 3 else "")
