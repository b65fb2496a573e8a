"""The live checkpoint loader: the native runtime's ``CheckpointLoader`` that prefers a running replica to the disk.

The fallback ladder is explicit: peers (all that serve these weights, in turn), then the tensors that another program
publishes, where it is told of one, then the disk, then a typed error. Every rung is a ``Step`` in the report, and all
ranks are on the same one, because each step down is a recorded decision.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from weightwire.config import OnMiss
from weightwire.errors import CheckpointError, FenceTimeout, LoadError, NoSourceError, WeightwireError
from weightwire.loaders.ladder import disk_read, missed, step_down, tensors_missed, tensors_placed
from weightwire.loaders.peer_tensors import PeerTensors
from weightwire.manifest import state as declared
from weightwire.manifest.catalogue import ConstructionNames, catalogue
from weightwire.manifest.records import Manifest
from weightwire.manifest.tree import module_paths
from weightwire.runtime import post_load
from weightwire.runtime.checkpoint.protocol import CheckpointLoader, Injected, LoadRequest, Weights
from weightwire.runtime.config import BuildFacts, ModelConfig
from weightwire.target.receiver import Receiver
from weightwire.target.report import LoadReport, Step
from weightwire.types import Stage

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LiveCheckpointLoader:
    """Finds before construction, fills after it, and falls back to ``disk``. One load a object.

    Attributes:
        disk: reads a checkpoint directory.
        receive: makes the receiver for a config, or ``None`` where nothing is to be asked for (a pure source);
            raises ``NoSourceError`` where nothing may be.
        on_miss: what to do where no peer can serve.
        names: gives the names captured at construction, once the model was constructed.
        tensors: another program's, where no peer delivers; not asked for where ``receive`` gives ``None``.
        report: of the load, whichever way it went.
        manifest: of the received bytes; ``None`` after a disk load.
    """

    disk: CheckpointLoader
    receive: Callable[[ModelConfig], Receiver | None]
    on_miss: OnMiss
    names: Callable[[], ConstructionNames]
    tensors: PeerTensors | None = None
    report: LoadReport = field(default_factory=LoadReport)
    manifest: Manifest | None = None
    _receiver: Receiver | None = None
    _missed: WeightwireError | None = None
    _config: ModelConfig | None = None
    _facts: BuildFacts | None = None
    _tensors_s: float = 0.0

    def load_config(self, checkpoint_dir: Path) -> ModelConfig:
        """From the directory: a target has config and tokenizer, if nothing else."""
        return self.disk.load_config(checkpoint_dir)

    def build_facts(self, checkpoint_dir: Path, config: ModelConfig) -> BuildFacts:
        """The source's, where one is found; else another program's tensors'; else what the files tell.

        Raises:
            LoadError: no source, and the disk is not to be read.
            FenceTimeout: a peer may still write into this memory: the process must end.
        """
        self._config = config
        try:
            receiver = self.receive(config)
        except NoSourceError as error:  # no peer is to be asked
            return self._facts_without_peer(checkpoint_dir, config, error)
        if receiver is None:
            self.tensors = None
            return self.disk.build_facts(checkpoint_dir, config)
        self.report = receiver.report
        try:
            offer = receiver.find()
        except WeightwireError as error:
            return self._facts_without_peer(checkpoint_dir, config, error)
        self._receiver = receiver
        facts: BuildFacts = {}
        for name, value in offer.header.build_facts.items():
            assert not isinstance(value, list | dict), name  # the codec and the planner bound it; the config refuses it
            facts[name] = value
        self._facts = facts
        return facts

    def load_weights(self, request: LoadRequest) -> Injected | Weights:
        """Pull from peers, or put another program's tensors in place, or hand over the disk's.

        Raises:
            LoadError: nothing worked, or the disk is not to be read.
            FenceTimeout: a peer may still write into this memory: the process must end.
        """
        if self._receiver is not None:
            try:
                return self._pull(request.model, self._receiver)
            except FenceTimeout:
                raise
            except WeightwireError as error:
                post_load.prepare_raw(request.model)
                self._miss(error)
                assert self._config is not None
                self._receive_tensors(request.checkpoint_dir, self._config)
        return self._place_tensors(request) or self._read_disk(request)

    def cleanup(self) -> None:
        """Close files, let go of tensors."""
        self.disk.cleanup()
        if self.tensors is not None:
            self.tensors.cleanup()

    def _facts_without_peer(self, checkpoint_dir: Path, config: ModelConfig, error: WeightwireError) -> BuildFacts:
        self._miss(error)
        self._facts = self._receive_tensors(checkpoint_dir, config)
        return self.disk.build_facts(checkpoint_dir, config) if self._facts is None else self._facts

    def _receive_tensors(self, checkpoint_dir: Path, config: ModelConfig) -> BuildFacts | None:
        """Another program's, into host memory; what they tell of construction. ``None``: there are none."""
        if self.tensors is None:
            return None
        began = time.monotonic()
        try:
            return self.tensors.build_facts(checkpoint_dir, config)
        except FenceTimeout:
            raise
        except WeightwireError as error:
            self._miss_tensors(self.tensors, error, began)
            return None
        finally:
            self._tensors_s += time.monotonic() - began

    def _place_tensors(self, request: LoadRequest) -> Injected | None:
        """Put what was received in place; ``None``: there is nothing, or it does not fit."""
        if self.tensors is None:
            return None
        began = time.monotonic()
        try:
            self.tensors.place(request)
        except WeightwireError as error:
            self._miss_tensors(self.tensors, error, began)
            return None
        seconds = self._tensors_s + time.monotonic() - began
        self.report = tensors_placed(self.report, self.tensors.report, seconds)
        return Injected("LOADED", self.report)

    def _miss_tensors(self, tensors: PeerTensors, error: WeightwireError, began: float) -> None:
        self.tensors = None
        tensors.cleanup()
        tensors_missed(self.report, tensors.report, self._tensors_s + time.monotonic() - began, error)
        assert self._missed is not None
        both = f"{self._missed.problem}; {tensors.who}: {error.problem}"
        self._miss(NoSourceError(both, error.remedy))

    def _pull(self, model: nn.Module, receiver: Receiver) -> Injected:
        stage = Stage(receiver.report.stage)
        try:
            if stage is Stage.PROCESSED:
                post_load.prepare_processed(model)
            names = self.names()
            declared.apply(module_paths(model, names.modules), receiver.state)
            described = catalogue(model, names)
        except WeightwireError as error:
            receiver.decline(error)
            raise
        report = receiver.fill(described)
        self.manifest = receiver.manifest
        return Injected("PROCESSED" if stage is Stage.PROCESSED else "LOADED", report)

    def _read_disk(self, request: LoadRequest) -> Weights:
        began = time.monotonic()
        where = str(request.checkpoint_dir)
        try:
            weights = self.disk.load_weights(request)
            assert isinstance(weights, Weights)
            self._check_facts(request.checkpoint_dir)
        except CheckpointError as error:
            self.report.steps.append(Step(way="disk", who=where, outcome="failed", reason=error.problem))
            if self._missed is None:
                raise
            raise LoadError(
                f"no peer ({self._missed.problem}) and no disk ({error.problem})", self._missed.remedy or error.remedy
            ) from error
        disk_read(self.report, where, time.monotonic() - began, missed=self._missed is not None)
        return weights

    def _check_facts(self, checkpoint_dir: Path) -> None:
        """A model that was built as a peer said, and does not match the files, would leave some of them out."""
        if self._facts is None:  # it was built as the files say
            return
        assert self._config is not None
        if self.disk.build_facts(checkpoint_dir, self._config) != self._facts:
            raise CheckpointError(
                f"{checkpoint_dir} has other build facts than a peer, as which the model was built",
                "start again without that peer (--load-format auto)",
            )

    def _miss(self, error: WeightwireError) -> None:
        """A step down: take note, or end it where the disk would be next, and is not to be read."""
        self._missed = error
        if self.tensors is None:
            step_down(self.report, error, self.on_miss)
            return
        missed(self.report, error)
        log.info("no peer: %s; asking for %s", error, self.tensors.who)
