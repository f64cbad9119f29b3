"""What a run folder says, read once; what is missing is noted instead of failing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from srppo.errors import RunFolderError
from srppo.files import read_json, read_lines
from srppo.json_shape import ANY, NUMBER, SWITCH, TEXT, fitted
from srppo.run_folder import is_run
from srppo.titles import STAGES, stage_titles
from srppo.yaml_text import parse_yaml

_GROUPS = {"*": {"*": NUMBER}}
_SUMMARY = {
    **dict.fromkeys(STAGES, _GROUPS),
    "heldout_nll": {"*": NUMBER},
    "forgetting": _GROUPS,
    "lost_and_gained": {"*": _GROUPS},
    "ppo_training": {"*": ANY},
    "wall_seconds": NUMBER,
    "peak_rss_mb": NUMBER,
    "warnings": [TEXT],
    "seed": (NUMBER, TEXT),
    "*": ANY,
}
_HARDWARE = {"cpu": TEXT, "gpus": [TEXT], "memory_gb": NUMBER, "threads": NUMBER, "*": ANY}
_CONFIG = {
    "seed": (NUMBER, TEXT),
    "model": {"name": TEXT, "*": ANY},
    "tuning": {"kind": TEXT, "*": ANY},
    "reward": {"kind": TEXT, "kl_anchor": TEXT, "kl_target": NUMBER, "*": ANY},
    **{section: {"*": ANY} for section in ("data", "sft", "rollout", "ppo", "diagnose", "guard", "evaluation")},
    "*": ANY,
}
_METRICS = {"stage": TEXT, "*": (NUMBER, TEXT, SWITCH)}
_SAMPLE = {"stage": TEXT, "iteration": NUMBER, "*": (NUMBER, TEXT, SWITCH)}
_ANSWER = {
    "group": TEXT,
    "row": (NUMBER, TEXT),
    "prompt": TEXT,
    "sampled": [TEXT],
    "sampled_scores": [NUMBER],
    "greedy": TEXT,
    "greedy_score": NUMBER,
    "*": ANY,
}
_STAGE = {"groups": _GROUPS, "heldout_nll": NUMBER, "lost_and_gained": _GROUPS, "forgetting": {"*": NUMBER}, "*": ANY}
_JSON: dict[str, tuple[str, Any]] = {
    "environment.json": ("the environment", {"hardware": _HARDWARE, "*": ANY}),
    "data.json": ("the data report", {"warnings": [TEXT], "*": ANY}),
    "summary.json": ("the summary (the run is not finished, or was stopped)", _SUMMARY),
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
    text = ""
    contents = {name: _json(path / name, what, shape, missing) for name, (what, shape) in _JSON.items()}
    try:
        text = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        config = _shaped(parse_yaml(text), _CONFIG, "config.yaml", missing)
    except (yaml.YAMLError, OSError):
        config = None
        missing.append("config.yaml is damaged")
    answers = {stage: _lines(path / "evaluation" / f"{stage}.jsonl", None, _ANSWER, missing) for stage in STAGES}
    card = path / "diagnose.json"
    summary = contents["summary.json"] or _from_stages(path, missing)
    return Record(
        path,
        config or {},
        text,
        contents["environment.json"],
        contents["data.json"],
        summary,
        _lines(path / "metrics.jsonl", "the training metrics", _METRICS, missing),
        _lines(path / "samples.jsonl", "samples of the rollouts (PPO has not begun)", _SAMPLE, missing),
        answers,
        _json(card, "", {"*": ANY}, missing) if card.exists() else {},
        missing + _absent_stages(summary),
        _json(path / "elapsed.json", "", {"stages": _GROUPS, "*": ANY}, []),
    )


def _shaped(content: Any, shape: dict[str, Any], name: str, missing: list[str]) -> dict[str, Any]:
    """What of a file's content is as srppo writes it; what is not is noted and left out."""
    found, wrong = fitted(content, shape)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        missing.append(f"{name} holds what srppo does not write there, which is left out ({wrong[0]}{more})")
    return found if isinstance(found, dict) else {}


def _json(path: Path, what: str, shape: dict[str, Any], missing: list[str]) -> dict[str, Any]:
    try:
        content = read_json(path)
    except RunFolderError as error:
        missing.append(f"{path.name}: {what}" if not path.exists() else str(error))
        return {}
    return _shaped(content, shape, path.name, missing)


def _lines(path: Path, what: str | None, shape: dict[str, Any], missing: list[str]) -> list[dict[str, Any]]:
    try:
        records = read_lines(path)
    except RunFolderError as error:
        missing.append(str(error))
        return []
    if not records and what:
        missing.append(f"{path.name}: {what}")
    wrong: list[str] = []
    out = [_shaped(record, shape, path.name, wrong) for record in records]
    missing += wrong[:1]
    return out


def _from_stages(path: Path, missing: list[str]) -> dict[str, Any]:
    """Of an unfinished run: what its finished evaluations left."""
    out: dict[str, Any] = {}
    for stage in STAGES:
        file = path / "stages" / f"evaluate-{stage}.json"
        found = _json(file, "", _STAGE, missing) if file.exists() else {}
        if found.get("groups"):
            out[stage] = found["groups"]
        for name in ("heldout_nll", "lost_and_gained", "forgetting"):
            if found.get(name):
                out.setdefault(name, {})[stage] = found[name]
    return out


def _absent_stages(summary: dict[str, Any]) -> list[str]:
    return [f"no evaluation of {title}" for stage, title in STAGES.items() if not summary.get(stage)]
