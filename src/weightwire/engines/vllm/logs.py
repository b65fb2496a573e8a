"""The library's own log lines in vLLM's log, where a reader of it looks for ``weightwire:``."""

from __future__ import annotations

import copy
import logging

LIBRARY, ENGINE = "weightwire", "vllm"
PREFIX = "weightwire: "


class Forward(logging.Handler):
    """Hands records on to the handlers of vLLM's logger, with our prefix."""

    def emit(self, record: logging.LogRecord) -> None:
        """Never raises: handlers report their own failures."""
        told = copy.copy(record)
        told.msg = f"{PREFIX}{record.msg}"
        logging.getLogger(ENGINE).callHandlers(told)


def forward(level: str) -> None:
    """Show what the library says at ``level`` or above. Idempotent: the last level counts."""
    library = logging.getLogger(LIBRARY)
    library.setLevel(level)
    library.propagate = False
    if not any(isinstance(handler, Forward) for handler in library.handlers):
        library.addHandler(Forward())
