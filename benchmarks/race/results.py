"""Results as JSON files with machine, versions and date, and the page that shows them."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.race.job import ROOT

from srppo.environment import environment

FOLDER = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "speed.md"


def place(text: str) -> Path:
    """A folder named on a command line, as it lies now: what a benchmark starts may run elsewhere."""
    return Path(text).resolve()


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers to so many significant digits, in lists and mappings too."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, list | tuple) else value


def machine(packages: Mapping[str, str]) -> dict[str, Any]:
    """Where and with what: versions of this environment, those given instead of its own."""
    out = environment()
    out["packages"] |= dict(packages)
    return out


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")


def load_average() -> float | None:
    """Processes that wanted a core over the last minute, this one's among them: how quiet the machine was."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def write(name: str, content: dict[str, Any], packages: Mapping[str, str] | None = None, folder: Path = FOLDER) -> Path:
    """benchmarks/results/NAME.json: date, machine and versions, then the content."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    head = {"date": now(), "environment": machine(packages or {})}
    path.write_text(json.dumps(rounded(head | content), indent=1) + "\n")
    return path


def read(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def kept_rows(
    name: str, keys: Sequence[str], taken: Sequence[Sequence[Any]], packages: Mapping[str, str], folder: Path
) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same machine and versions that this run does not measure anew, so that a race can be run in parts.

    keys: what names a row; taken: those values of the rows that this run measures.
    """
    old = read(name, folder)
    if old is None or _lasting(old["environment"]) != _lasting(json.loads(json.dumps(rounded(machine(packages))))):
        return []
    return [row for row in old["rows"] if [row[k] for k in keys] not in [list(t) for t in taken]]


def _lasting(environment: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share: all but the thread count, which is told only once torch is loaded."""
    return environment | {"hardware": {k: v for k, v in environment["hardware"].items() if k != "threads"}}


def page_of(folder: Path) -> Path:
    """The page of the results in `folder`: the project's docs/results/speed.md, or one beside results that lie elsewhere."""
    return PAGE if folder == FOLDER else folder / "speed.md"


def write_page(folder: Path = FOLDER) -> None:
    """The page, from whatever results there are."""
    from benchmarks.race.page import speed_page

    found = {name: content for name in ("race_trl_ppo", "race_trl_rloo", "lab_race", "growth", "gpu") if (content := read(name, folder))}
    page_of(folder).write_text(speed_page(found))
