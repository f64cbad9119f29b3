"""Errors meant for the user: what was wrong, where, why, and what to do. The command prints them without a traceback."""

from __future__ import annotations

from pathlib import Path


class SrppoError(Exception):
    """Base of every error srppo raises for a cause outside its own code."""

    exit_code = 2


class ConfigError(SrppoError):
    """A recipe or flag that cannot be run."""


class MissingAnswer(ConfigError):
    """A scoring function asked of a row that has no answer to compare with."""


class ScorerFailed(ConfigError):
    """A scoring function of the user's that raised."""


class DataError(SrppoError):
    """A demonstration, prompt or evaluation file that cannot be used.

    path and line (1-based, where known) are put before the message.
    """

    def __init__(self, message: str, path: str | Path | None = None, line: int | None = None):
        self.path, self.line = path, line
        where = "" if path is None else f"{path}: " if line is None else f"{path}, line {line}: "
        super().__init__(where + message)


class ModelError(SrppoError):
    """A model or tokenizer that cannot be loaded, or that does not fit the others."""


class ArchitectureError(ModelError):
    """Two models that should have the same weights by name and shape, and do not."""


class RunFolderError(SrppoError):
    """An output folder that exists, is not a run, is damaged, or cannot be written."""


class LostProcess(SrppoError):
    """Another process of the run failed or is gone."""

    exit_code = 5


class TrainingStopped(SrppoError):
    """Training was stopped on purpose (repeated non-finite steps, interruption); the state was saved first."""

    exit_code = 3


class MemoryRanOut(SrppoError):
    """Memory ran out in one of several processes, which can save nothing without the others."""

    exit_code = 3


class RewardRefused(SrppoError):
    """The reward card said no-go, and the recipe does not say to go on all the same. What was trained so far is saved."""

    exit_code = 4
