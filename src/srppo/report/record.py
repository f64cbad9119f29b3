"""What a run folder says, read once; what is missing is noted instead of failing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from srppo.errors import RunFolderError
from srppo.files import read_json, read_lines
from srppo.run_folder import is_run
from srppo.titles import STAGES, stage_titles
from srppo.yaml_text import parse_yaml

_JSON = {
    "environment.json": "the environment",
    "data.json": "the data report",
    "summary.json": "the summary (the run is not finished, or was stopped)",
}


@dataclass(frozen=True)
class Record:
    """A run folder's content. Dicts and lists are empty where the file is missing."""

    path: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    data: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    answers: dict[str, list[dict[str, Any]]]  # stage -> one row a prompt, of its evaluation
    card: dict[str, Any]  # the reward card, diagnose.json; runs may well have none
    missing: list[str]  # in words
    elapsed: dict[str, Any] = field(default_factory=dict)  # what the run cost, elapsed.json; of older runs without stages

    @property
    def titles(self) -> dict[str, str]:
        """What each stage is called, in the order of the tables."""
        return stage_titles((self.config.get("reward") or {}).get("kind"))

    @property
    def learned_reward(self) -> bool:
        """Whether a reward model judged in place of the coherent reward."""
        return (self.config.get("reward") or {}).get("kind") == "preference_model"

    def results(self, stage: str) -> dict[str, dict[str, Any]]:
        """{group: {"sampled", "greedy", …}} of a stage; {} where it was not evaluated."""
        found = self.summary.get(stage)
        return found if isinstance(found, dict) else {}

    @property
    def stages(self) -> list[str]:
        return [stage for stage in STAGES if self.results(stage)]

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(group for stage in STAGES for group in self.results(stage)))

    def series(self, stage: str, key: str) -> tuple[list[float], list[float]]:
        """Steps or iterations of a training stage, and the metric at those that have it."""
        points = []
        for record in self.metrics:
            x, y = record.get("iteration", record.get("step")), record.get(key)
            if record.get("stage") == stage and isinstance(x, (int, float)) and isinstance(y, (int, float)):
                points.append((float(x), float(y)))
        return [x for x, _ in points], [y for _, y in points]


def read_run(path: str | Path) -> Record:
    """Raises RunFolderError where there is no run."""
    path = Path(path)
    if not is_run(path):
        raise RunFolderError(f"{path}: not a run folder (no config.yaml of srppo in it)")
    missing: list[str] = []
    contents = {name: _json(path / name, what, missing) for name, what in _JSON.items()}
    text = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        config = parse_yaml(text)
    except yaml.YAMLError:
        config = None
        missing.append("config.yaml is damaged")
    answers = {stage: _lines(path / "evaluation" / f"{stage}.jsonl", None, missing) for stage in STAGES}
    card = path / "diagnose.json"
    summary = contents["summary.json"] or _from_stages(path)
    return Record(
        path,
        config if isinstance(config, dict) else {},
        text,
        contents["environment.json"],
        contents["data.json"],
        summary,
        _lines(path / "metrics.jsonl", "the training metrics", missing),
        _lines(path / "samples.jsonl", "samples of the rollouts (PPO has not begun)", missing),
        answers,
        _json(card, "", missing) if card.exists() else {},
        missing + _absent_stages(summary),
        _json(path / "elapsed.json", "", []),
    )


def _json(path: Path, what: str, missing: list[str]) -> dict[str, Any]:
    try:
        content = read_json(path)
    except RunFolderError as error:
        missing.append(f"{path.name}: {what}" if not path.exists() else str(error))
        return {}
    return content if isinstance(content, dict) else {}


def _lines(path: Path, what: str | None, missing: list[str]) -> list[dict[str, Any]]:
    try:
        records = read_lines(path)
    except RunFolderError as error:
        missing.append(str(error))
        return []
    if not records and what:
        missing.append(f"{path.name}: {what}")
    return records


def _from_stages(path: Path) -> dict[str, Any]:
    """Of an unfinished run: what its finished evaluations left."""
    out: dict[str, Any] = {}
    for stage in STAGES:
        found = _json(path / "stages" / f"evaluate-{stage}.json", "", [])
        if found.get("groups"):
            out[stage] = found["groups"]
        for name in ("heldout_nll", "lost_and_gained", "forgetting"):
            if found.get(name):
                out.setdefault(name, {})[stage] = found[name]
    return out


def _absent_stages(summary: dict[str, Any]) -> list[str]:
    return [f"no evaluation of {title}" for stage, title in STAGES.items() if not summary.get(stage)]
