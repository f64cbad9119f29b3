"""The config.yaml of a run folder, read again later: by then srppo may have keys that it lacks, and no longer know some that it has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from srppo.errors import ConfigError, RunFolderError
from srppo.yaml_text import parse_yaml

if TYPE_CHECKING:
    from srppo.config import RunConfig


def load_run_config(folder: str | Path, warn: Callable[[str], None], overrides: dict[str, Any] | None = None) -> RunConfig:
    """A run's own configuration with dotted overrides. New keys have their defaults; keys of old are dropped, and warn is told.

    Raises ConfigError where what is left cannot be used.
    """
    from srppo.config import build, merge, read_recipe

    path = Path(folder) / "config.yaml"
    values, gone = split_known(read_recipe(path))
    if gone:
        warn(f"{path}: made by another version of srppo; keys that this one does not have are ignored: {', '.join(gone)}")
    return build(merge(values, overrides or {}), source=str(path))


def split_known(values: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """values without the keys that the configuration does not have today, and those keys, dotted."""
    from srppo.config import valid_keys

    keys, known, gone = set(valid_keys()), {}, []
    for name, value in values.items():
        if name not in keys:
            gone.append(str(name))
        elif isinstance(value, dict) and any(k.startswith(f"{name}.") for k in keys):  # a section
            known[name] = {k: v for k, v in value.items() if f"{name}.{k}" in keys}
            gone += [f"{name}.{k}" for k in value if f"{name}.{k}" not in keys]
        else:
            known[name] = value
    return known, gone


def refuse_changes(folder: Path, config_yaml: str, free: Collection[str]) -> None:
    """Raise a RunFolderError that lists every key whose value differs from that of the run. free: keys and sections that may."""
    from srppo.config import build

    path = folder / "config.yaml"
    try:
        old = parse_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path}: damaged ({error}); the run cannot be resumed") from None
    if isinstance(old, dict):
        old, _ = split_known(old)
        with contextlib.suppress(ConfigError):  # values that are no longer allowed are compared as they stand
            old = build(old).model_dump(mode="json")  # with today's defaults for keys that are newer than the run
    before, now = _flat(old), _flat(yaml.safe_load(config_yaml))
    missing = "(not there)"
    keys = [k for k in sorted(before.keys() | now.keys()) if not {k, k.split(".")[0]} & set(free)]
    changed = [k for k in keys if before.get(k, missing) != now.get(k, missing)]
    if changed:
        lines = [f"  {k}: {before.get(k, missing)} in the folder, {now.get(k, missing)} now" for k in changed]
        raise RunFolderError(
            f"{folder}: --resume needs the configuration the run was started with, but these keys differ:\n"
            + "\n".join(lines)
            + "\nGive the old values, or start a new run in another --output."
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {k: v for name, value in values.items() for k, v in _flat(value, f"{prefix}.{name}" if prefix else str(name)).items()}
