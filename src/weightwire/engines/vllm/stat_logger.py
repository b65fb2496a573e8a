"""The front end's word that the engine is ready: an entry point of the group ``vllm.stat_logger_plugins``.

vLLM imports this module in a front end that will make a logger, and before it starts the engine; offline engines
(``vllm.LLM``) never import it. Nothing of gRPC is imported until the engine is ready.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.engines.vllm.options import Options
from weightwire.engines.vllm.readiness import Announcement, mark_logger, word_key
from weightwire.errors import ConfigError
from weightwire.metadata.decision import DecisionStore, ServerDecisions

log = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name

LOAD_FORMAT = "presharded"

mark_logger(os.environ)  # this import is the only thing that happens before the engine's processes are started


class ReadinessLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM is not there where types are checked
    """Says once that the engine is ready, if its weights are loaded by us; logs no statistics."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._config = vllm_config
        self._index = engine_index
        self._announcement: Announcement | None = None

    def record(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: called at every step of the engine."""

    def log_engine_initialized(self) -> None:
        """The engine can serve: profiled, warmed up, its graphs captured."""
        if self._announcement is not None:
            return
        try:
            settings = _settings(self._config)
        except ConfigError as error:  # the loader says the same, and ends the engine if it must
            log.warning("weightwire: the engine is ready, but nobody is told: %s", error)
            return
        if settings is not None and settings.url is not None:
            key = word_key(self._config, self._index, os.environ)
            self._announcement = Announcement(key, partial(_decisions, settings.url, settings.secret_file))


def _settings(config: Any) -> Settings | None:
    """Of the model that is loaded by us, target or draft; None where neither is."""
    draft = getattr(getattr(config, "speculative_config", None), "draft_load_config", None)
    for load_config in (config.load_config, draft):
        if load_config is not None and load_config.load_format == LOAD_FORMAT:
            extra = load_config.model_loader_extra_config
            return Options.from_extra(extra if isinstance(extra, dict) else {}).settings
    return None


@contextlib.contextmanager
def _decisions(url: str, secret_file: Path | None) -> Iterator[DecisionStore]:
    from weightwire.metadata.client import MetadataClient  # noqa: PLC0415  (gRPC, only once the engine was forked)

    with MetadataClient(url, load_secret(secret_file)) as client:
        yield ServerDecisions(client)
