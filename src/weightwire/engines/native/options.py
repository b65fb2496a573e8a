"""What a replica of the native runtime is told to be; the same JSON for the launcher and for each of its ranks."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from weightwire.errors import ConfigError
from weightwire.manifest.reshard import MAX_AMPLIFICATION
from weightwire.runtime.config import KernelLayout, read_config
from weightwire.runtime.load_format import LoadFormat
from weightwire.runtime.model_loader import parse_dtype

MAX_RANKS = 64
MAX_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """One replica.

    Attributes:
        model: directory with config and tokenizer, and with weights unless a peer has them.
        model_id: what source and target call the model.
        revision: which weights, in the operator's words; ``None`` names none.
        tp: ranks that share tensors, in each stage of the pipeline.
        pp: stages of the pipeline, which share layers.
        ep: in so many groups the ranks of a stage share the experts of a model that has some; it divides ``tp``.
        attention_dp: these ranks share the rows of a batch and the routed experts; of the rest each has the whole.
        mtp: with the model's layers for multi-token prediction.
        draft_model: directory of a model that drafts for this one, with weights unless a peer has them; empty for none.
        load_format: ``auto`` (disk), ``dummy`` or ``presharded``, in any spelling that ``LoadFormat.parse`` takes.
        dtype: of parameters and computation.
        kernel_layout: ``plain`` or ``packed``.
        weights_id: take exactly these weights.
        latest: where several weights are ready, take those with the highest ordinal.
        ordinal: of the weights that this replica reads from the disk.
        tensors_of: where no peer delivers, take this rank's part of every tensor, under Hugging Face's names, from a
            program that publishes them with this name as its identity's engine (``identity.tensors_identity``); empty
            for none. A draft model is not taken from there.
        max_amplification: where peers have another number of ranks: bytes read over bytes needed, at most; 0 to take
            nothing from those.
        publish_stage: ``LOADED`` or ``PROCESSED``: what this replica publishes.
        metrics_port: each rank serves Prometheus metrics at this port plus its rank, on ``WEIGHTWIRE_BIND`` or
            loopback; 0 for free ones, told in its ``loaded`` event; ``None`` for none.
        max_rate: each rank serves at most so many bytes a second to others; 0 for no bound.
        max_readers: each rank serves at most so many processes at a time; 0 for no bound.
        relay: pass on what is received from a peer while it is being received.
        until_signal: ranks read no commands and serve until SIGTERM (for torchrun and mpirun).

    Raises:
        ConfigError: a value is not legal; names it.
    """

    model: str
    model_id: str
    revision: str | None = None
    tp: int = 1
    pp: int = 1
    ep: int = 1
    attention_dp: bool = False
    mtp: bool = False
    draft_model: str = ""
    load_format: str = "auto"
    dtype: str = "bfloat16"
    kernel_layout: str = "plain"
    weights_id: str = ""
    latest: bool = False
    ordinal: int = 0
    tensors_of: str = ""
    max_amplification: float = MAX_AMPLIFICATION
    publish_stage: str = "LOADED"
    metrics_port: int | None = None
    max_rate: float = 0.0
    max_readers: int = 0
    relay: bool = True
    until_signal: bool = False

    def __post_init__(self) -> None:
        LoadFormat.parse(self.load_format)
        KernelLayout.parse(self.kernel_layout)
        parse_dtype(self.dtype)
        self._check_sizes()
        self._check_tensors_of()
        amplification = self.max_amplification
        if isinstance(amplification, bool) or not (amplification == 0 or 1 <= amplification < math.inf):
            raise ConfigError(f"max_amplification is {amplification!r}", "give a number from 1 up, or 0")
        if self.publish_stage not in ("LOADED", "PROCESSED"):
            raise ConfigError(f"publish_stage is {self.publish_stage!r}", "use LOADED or PROCESSED")
        port = self.metrics_port
        if port is not None and (isinstance(port, bool) or not 0 <= port <= MAX_PORT - MAX_RANKS):
            raise ConfigError(f"metrics_port is {port!r}", f"give 0 to {MAX_PORT - MAX_RANKS}, or none")
        for directory in filter(None, (self.model, self.draft_model)):
            if not Path(directory).is_dir():
                raise ConfigError(
                    f"{directory} is not a directory", "give a checkpoint directory, or one with config and tokenizer"
                )

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.pp

    def of_draft(self) -> Self:
        """Those of the draft, with a name of its own. It cuts tensors and shares layers as its target does.

        Experts are shared, if it has some, as it is told for the target; else there is nothing to share of them.
        """
        dense = read_config(Path(self.draft_model)).moe is None
        return replace(
            self,
            model=self.draft_model,
            model_id=f"{self.model_id}#draft",
            draft_model="",
            mtp=False,
            weights_id="",
            tensors_of="",
            ep=1 if dense else self.ep,
            attention_dp=self.attention_dp and not dense,
        )

    def _check_tensors_of(self) -> None:
        if not self.tensors_of:
            return
        if LoadFormat.parse(self.load_format) is not LoadFormat.PRESHARDED:
            raise ConfigError("tensors_of is given, and nobody is asked for weights", "use load format presharded")
        if self.weights_id:
            raise ConfigError(
                "weights_id pins weights of this runtime, which the tensors of another program are not yet",
                "give weights_id or tensors_of; the revision holds for both",
            )

    def _check_sizes(self) -> None:
        for axis, size in (("tp", self.tp), ("pp", self.pp)):
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_RANKS:
                raise ConfigError(f"{axis} is {size!r}", f"give a whole number from 1 to {MAX_RANKS}")
        if self.world_size > MAX_RANKS:
            raise ConfigError(f"tp {self.tp} x pp {self.pp} are {self.world_size} ranks", f"use at most {MAX_RANKS}")
        if isinstance(self.ep, bool) or not isinstance(self.ep, int) or self.ep < 1 or self.tp % self.ep:
            raise ConfigError(f"ep is {self.ep!r}", f"give a divisor of tp, which is {self.tp}")
        if self.attention_dp and self.tp == 1:
            raise ConfigError("attention_dp needs ranks that share a batch", "give a tp of 2 or more")

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
