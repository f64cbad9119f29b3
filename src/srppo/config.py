"""The run configuration: typed, strict, from YAML and flags. Imports no torch. sections.py holds the keys."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from srppo.errors import ConfigError
from srppo.section import Section
from srppo.sections import (
    DataConfig,
    DiagnoseConfig,
    EvaluationConfig,
    GuardConfig,
    ModelConfig,
    ParallelConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    TuningConfig,
)
from srppo.yaml_text import parse_yaml

__all__ = [
    "DataConfig",
    "DiagnoseConfig",
    "EvaluationConfig",
    "GuardConfig",
    "ModelConfig",
    "PPOConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "Section",
    "TuningConfig",
    "build",
    "dump",
    "load_recipe",
    "merge",
    "nearest_key",
    "parse_yaml",
    "read_recipe",
    "valid_keys",
]


class RunConfig(Section):
    output: str = "runs/srppo"
    """The run folder."""
    seed: int = 0
    """Decides data splits, order, sampling and initial values."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; by default OMP_NUM_THREADS, else the cores that affinity and cgroup quota leave, less those that others keep busy."""
    profile: bool = False
    """Write a torch.profiler trace of the second PPO round, and a table of its operators, to profile/ in the run folder."""
    background_checkpoints: bool = False
    """Write checkpoints while training goes on, from a copy of weights and moments in the CPU's memory."""
    model: ModelConfig = ModelConfig()
    tuning: TuningConfig = TuningConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOConfig = PPOConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    guard: GuardConfig = GuardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        rollouts = self.ppo.prompts_per_iteration * self.ppo.samples_per_prompt
        if rollouts < self.ppo.minibatches:
            raise ValueError(f"ppo.minibatches is {self.ppo.minibatches} but a round has only {rollouts} rollouts; lower it")
        if self.ppo.baseline == "group" and self.ppo.samples_per_prompt < 2:
            raise ValueError("ppo.baseline group compares the samples of a prompt; set ppo.samples_per_prompt to 2 or more")
        shares = self.sft.checkpoints_at
        if any(not 0 < s <= 1 for s in shares):
            raise ValueError(f"sft.checkpoints_at holds shares of the training in (0, 1], got {shares}")
        for key, value in (("sft.keep", self.sft.keep), ("reward.checkpoint", self.reward.checkpoint)):
            if isinstance(value, (int, float)) and value not in shares:
                raise ValueError(f"{key} is {value}, which is not among sft.checkpoints_at {shares}; add it there")
        if self.sft.checkpoint is not None and isinstance(self.reward.checkpoint, (int, float)):
            raise ValueError(
                f"reward.checkpoint is a share of the SFT training ({self.reward.checkpoint}), but sft.checkpoint replaces that training; "
                "give a path, or sft"
            )
        _check_preference_model(self.reward)
        if self.data.max_prompt_tokens >= self.data.max_tokens:
            limits = f"data.max_prompt_tokens ({self.data.max_prompt_tokens}) leaves no room for a response in data.max_tokens"
            raise ValueError(f"{limits} ({self.data.max_tokens})")
        return self


def _check_preference_model(reward: RewardConfig) -> None:
    """Raise ValueError where keys of the reward contradict its kind."""
    if reward.kind == "coherent":
        given = [key for key in ("preference_model", "preference_label") if getattr(reward, key) is not None]
        if given:
            raise ValueError(f"reward.{given[0]} is set, but reward.kind is coherent; set reward.kind: preference_model, or remove it")
        return
    if not reward.preference_model:
        raise ValueError("reward.kind is preference_model, but reward.preference_model names none; give a hub id or a folder")
    plain = RewardConfig()
    for key in ("placement", "length_normalization", "token_shift", "token_clip", "include_eos"):
        if getattr(reward, key) != getattr(plain, key):
            raise ValueError(
                f"reward.{key} is {getattr(reward, key)}, an option of the log-ratio's tokens; a preference model gives one score a "
                "response: remove it, or set reward.kind: coherent"
            )
    if reward.checkpoint not in ("auto", "sft"):
        raise ValueError(f"reward.checkpoint is {reward.checkpoint}, but with reward.kind preference_model no SFT checkpoint is the reward")


def valid_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys, sections included."""
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += valid_keys(info.annotation, f"{prefix}{name}.")
    return keys


def nearest_key(key: str, keys: Sequence[str] | None = None) -> str | None:
    """The dotted key most like a wrong one, its last part alone compared too. keys: all valid ones, sections included, by default."""
    keys = keys if keys is not None else valid_keys()
    elsewhere = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]  # the right name in the wrong section
    if elsewhere:
        return difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.0)[0]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in keys}
    leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.6)
    return by_leaf[leaf[0]] if leaf else None


def build(values: dict[str, Any], source: str = "the configuration") -> RunConfig:
    """Validate nested values. Raises ConfigError that names the source, the key, what is wrong and the nearest valid key."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = _explain(error)
        raise ConfigError(f"{source}: {lines[0]}" if len(lines) == 1 else f"{source}:\n  " + "\n  ".join(lines)) from None


def _explain(error: ValidationError) -> list[str]:
    """One line a wrong key; what the members of a union would each accept is joined by "or"."""
    wanted: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    keys = valid_keys()
    for item in error.errors():
        parts = [str(p) for p in item["loc"]]
        if item["type"] == "extra_forbidden":
            found[".".join(parts)] = _unknown(".".join(parts))
            continue
        if item["type"] == "invalid_key":
            name = ".".join([*parts[:-1], _spelt(item["input"])])
            found[name] = f"the key {name} is not text, so it is none of ours; `srppo config` lists them all"
            continue
        while parts and ".".join(parts) not in keys:
            parts.pop()  # pydantic appends the union member it tried, or the place in a list
        key = ".".join(parts)
        message = item["msg"].removeprefix("Value error, ").split(", unable to parse")[0]
        if "instance of" in message:
            message = "Input should be a section: keys and values of its own"
        wanted.setdefault(key, []).append(message)
        joined = " or ".join([wanted[key][0], *(m.removeprefix("Input should be ") for m in dict.fromkeys(wanted[key][1:]))])
        found[key] = f"{key}: {joined[0].lower()}{joined[1:]}, got {_shown(item['input'])}" if key else joined
    return list(found.values())


def _spelt(key: Any) -> str:
    """A key that is no text as YAML spells it."""
    try:
        return str(yaml.safe_dump(key)).split("\n")[0]
    except (yaml.YAMLError, ValueError):
        return _shown(key)


def _shown(value: Any) -> str:
    """A wrong value as its user wrote it, or nearly."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number too long to be shown"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _unknown(key: str) -> str:
    if key in valid_keys():
        section, leaf = key.split(".", 1)
        return f"unknown key {key!r} at the top level; write {leaf!r} inside the section {section!r}"
    near = nearest_key(key)
    return f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else "") + " (`srppo config` lists them all)"


def merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """New nested dict: values with dotted overrides ({"ppo.clip": 0.1}) put in."""
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for dotted, value in overrides.items():
        *path, leaf = dotted.split(".")
        node = out
        for part in path:
            child = node.get(part)
            node[part] = dict(child) if isinstance(child, dict) else {}
            node = node[part]
        node[leaf] = value
    return out


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """A YAML recipe with dotted overrides. Raises ConfigError for a missing, unreadable, malformed or invalid recipe."""
    return build(merge(read_recipe(path), overrides or {}), source=str(path))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A YAML recipe's values, not validated yet. Raises ConfigError for a missing, unreadable or malformed recipe."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe; recipes/ has examples") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if values is None:
        raise ConfigError(f"{path}: the recipe is empty: give it keys to change; `srppo config` prints them all")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a YAML mapping of sections, found {type(values).__name__}")
    sections = {key.split(".")[0] for key in valid_keys() if "." in key}
    return {k: {} if v is None and k in sections else v for k, v in values.items()}  # a section with nothing in it


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
