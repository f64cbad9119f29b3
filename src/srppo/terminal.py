"""What libraries say on the terminal, made safe: warnings and log records may quote a model's or a data set's text."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from srppo.text import clean


class _CleanRecord(logging.LogRecord):
    """A log record whose text cannot move the cursor or recolour the terminal."""

    def getMessage(self) -> str:
        return clean(super().getMessage())


def guard_terminal() -> None:
    """From now on every warning and log record of this process is cleaned before it is shown. Calling it again changes nothing."""
    plain: Any = warnings.formatwarning
    if not getattr(plain, "cleans", False):

        def cleaned(*args: Any, **options: Any) -> str:
            return clean(str(plain(*args, **options)))

        vars(cleaned)["cleans"] = True
        warnings.formatwarning = cleaned
    if logging.getLogRecordFactory() is logging.LogRecord:  # another one is somebody's choice
        logging.setLogRecordFactory(_CleanRecord)
