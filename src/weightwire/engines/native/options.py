"""What a replica of the native runtime is told to be; the same JSON for the launcher and for each of its ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from weightwire.errors import ConfigError
from weightwire.runtime.config import KernelLayout
from weightwire.runtime.load_format import LoadFormat
from weightwire.runtime.model_loader import parse_dtype

MAX_TP = 64
MAX_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """One replica.

    Attributes:
        model: directory with config and tokenizer, and with weights unless a peer has them.
        model_id: what source and target call the model.
        revision: which weights, in the operator's words; ``None`` names none.
        tp: ranks.
        load_format: ``auto`` (disk), ``dummy`` or ``presharded``, in any spelling that ``LoadFormat.parse`` takes.
        dtype: of parameters and computation.
        kernel_layout: ``plain`` or ``packed``.
        weights_id: take exactly these weights.
        latest: where several weights are ready, take those with the highest ordinal.
        ordinal: of the weights that this replica reads from the disk.
        publish_stage: ``LOADED`` or ``PROCESSED``: what this replica publishes.
        metrics_port: each rank serves Prometheus metrics at this port plus its rank, on ``WEIGHTWIRE_BIND`` or
            loopback; 0 for free ones, told in its ``loaded`` event; ``None`` for none.
        until_signal: ranks read no commands and serve until SIGTERM (for torchrun and mpirun).

    Raises:
        ConfigError: a value is not legal; names it.
    """

    model: str
    model_id: str
    revision: str | None = None
    tp: int = 1
    load_format: str = "auto"
    dtype: str = "bfloat16"
    kernel_layout: str = "plain"
    weights_id: str = ""
    latest: bool = False
    ordinal: int = 0
    publish_stage: str = "LOADED"
    metrics_port: int | None = None
    until_signal: bool = False

    def __post_init__(self) -> None:
        LoadFormat.parse(self.load_format)
        KernelLayout.parse(self.kernel_layout)
        parse_dtype(self.dtype)
        if isinstance(self.tp, bool) or not isinstance(self.tp, int) or not 1 <= self.tp <= MAX_TP:
            raise ConfigError(f"tp is {self.tp!r}", f"give a whole number from 1 to {MAX_TP}")
        if self.publish_stage not in ("LOADED", "PROCESSED"):
            raise ConfigError(f"publish_stage is {self.publish_stage!r}", "use LOADED or PROCESSED")
        port = self.metrics_port
        if port is not None and (isinstance(port, bool) or not 0 <= port <= MAX_PORT - MAX_TP):
            raise ConfigError(f"metrics_port is {port!r}", f"give 0 to {MAX_PORT - MAX_TP}, or none")
        if not Path(self.model).is_dir():
            raise ConfigError(
                f"{self.model} is not a directory", "give a checkpoint directory, or one with config and tokenizer"
            )

    def to_json(self) -> str:
        """As text, for a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The options in ``text``.

        Raises:
            ConfigError: it is not what ``to_json`` writes.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(**fields)
        except (ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the options are malformed: {error}", "start replicas with: weightwire run") from error
