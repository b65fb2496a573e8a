"""One worker's part of a refresh up to the swap: which weights, room for them, their verified bytes. Changes no model.

Every step ends in a decision of all workers: either each of them has its bytes and knows how they get into its model,
or none goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import ModelConfig

from weightwire.engines.vllm import facts, reload, state
from weightwire.engines.vllm.ranks import Place
from weightwire.engines.vllm.serving import Loaded, Serving
from weightwire.engines.vllm.staging import Held, Memory, Request, check_state, pick, told_key
from weightwire.errors import (
    DecisionError,
    FenceTimeout,
    ManifestMismatch,
    MetadataError,
    MismatchError,
    NoSourceError,
    WeightwireError,
)
from weightwire.identity.identity import Identity
from weightwire.manifest.staging import Staging
from weightwire.metadata.decision import Group, Vote
from weightwire.target.discover import give_up
from weightwire.target.offer import Offer, Want
from weightwire.target.receiver import Receiver
from weightwire.types import Json, Stage, TensorClass
from weightwire.wire.messages import FindReplicas

log = logging.getLogger("vllm.weightwire.refresh")

BEGIN, WANTED, STAGED = "begin", "wanted", "staged"
"""Steps at which the workers vote, besides those of receiving."""

KINDS = {kind.__name__: kind for kind in (NoSourceError, MismatchError, MetadataError, DecisionError)}

_condemned: list[Staging] = []
"""Memory that a peer may still write into: never given back."""


@dataclass(kw_only=True)
class Staged:
    """Verified bytes that wait for the swap.

    Attributes:
        request: what was asked for.
        memory: the bytes.
        offer: what they are.
        identity: of the new weights.
        fills: how they get into the model.
        workers: who decide together, at this refresh's epoch.
    """

    request: Request
    memory: Staging
    offer: Offer
    identity: Identity
    fills: list[reload.Fill]
    workers: Group


@dataclass(kw_only=True)
class Arrival:
    """Use once: ``begin``, then ``stage`` or ``start``.

    Attributes:
        workers: who decide together, at this refresh's epoch.
        place: of this worker.
        serving: of this process.
        model: running.
        model_config: of ``model``.
        neighbours: workers that stage on this host at once.
        request: what was asked for; legal after ``begin``.
    """

    workers: Group
    place: Place
    serving: Serving
    model: torch.nn.Module
    model_config: ModelConfig
    neighbours: int
    request: Request = field(default_factory=lambda: Request(abandon=True))
    _outcome: Future[Staged | None] = field(default_factory=Future)

    def begin(self, update_info: Any, check: Callable[[], Loaded]) -> Loaded:
        """What all workers can know before anybody is asked.

        Args:
            update_info: see ``Request``.
            check: whether this worker can be refreshed at all; what it was loaded with.

        Raises:
            ConfigError: it is wrong, or this worker cannot.
            DecisionError: another worker cannot.
        """
        failed: WeightwireError | None = None
        try:
            self.request = Request.parse(update_info)
            loaded = check()
        except WeightwireError as error:
            failed = error
        mine = Vote(ok=failed is None, reason=failed.problem if failed else "", value=self.request.to_json())
        verdict = self.workers.vote(BEGIN, mine)
        if failed is not None:
            raise failed
        if not verdict.ok:
            raise DecisionError(f"not all workers can be refreshed: {verdict.reason}", "see that worker's log")
        if any(value != verdict.values[0] for value in verdict.values):
            raise DecisionError("the workers were told different things", "give one update_info to all")
        return loaded

    def start(self, loaded: Loaded) -> None:
        """``stage`` in a thread of its own, while the model goes on serving; ``wait`` tells what came of it."""

        def run() -> None:
            try:
                self._outcome.set_result(self.stage(loaded))
            except WeightwireError as error:
                self._outcome.set_exception(error)
            self._tell(loaded)

        threading.Thread(target=run, name="weightwire-refresh", daemon=True).start()

    def wait(self, bound_s: float) -> Staged | None:
        """What came of ``start``.

        Raises:
            WeightwireError: as ``stage``.
        """
        try:
            return self._outcome.result(bound_s)
        except NotYet as error:
            raise DecisionError(f"staging did not end within {bound_s:g} s", "see this worker's log") from error

    def stage(self, loaded: Loaded) -> Staged | None:
        """The verified bytes, once all workers have theirs; ``None`` where these weights are held already.

        Raises:
            WeightwireError: not all workers have them; nothing was changed on any.
        """
        try:
            return self._stage(loaded)
        except WeightwireError:
            raise
        except Exception as error:  # the edge of a call from another process: the other workers must not wait
            log.exception("weightwire: staging failed; this is a bug")
            problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            bug = DecisionError(f"staging failed ({problem})", "this is a bug; its trace is in the log")
            self._stay_away(bug)
            raise bug from error

    # ---- inside

    def _stage(self, loaded: Loaded) -> Staged | None:
        began = time.monotonic()
        wanted = self._resolve(loaded)
        if wanted is None:
            log.info("weightwire: these weights (ordinal %d) are held already", loaded.ordinal)
            return None
        reader = self.serving.member(loaded.options.settings).reader
        identity = dataclasses.replace(loaded.identities[Stage.LOADED], revision=None)  # named otherwise
        want = Want(
            stages={Stage.LOADED: identity}, coordinates=self.place.coordinates, pinned=wanted, accept_unpinned=True
        )
        receiver = Receiver(reader=reader, want=want, group=self.workers.at("receive"), poison=loaded.options.poison)
        offer = receiver.find()
        memory = self._allocate(receiver, offer, loaded)
        try:
            report = receiver.fill(memory.catalogue)
        except FenceTimeout:
            _condemned.append(memory)
            raise
        fills = self._check(memory)
        report.seconds["staged"] = time.monotonic() - began
        _say(offer, memory, report.paths, report.seconds)
        return Staged(
            request=self.request,
            memory=memory,
            offer=dataclasses.replace(offer, agreed=receiver.manifest),
            identity=dataclasses.replace(identity, revision=offer.header.revision or None),
            fills=fills,
            workers=self.workers,
        )

    def _resolve(self, loaded: Loaded) -> str | None:
        """The weights id that all workers take; ``None`` where it is held already."""
        if self.workers.rank == 0:
            recorded = self.workers.once(WANTED, self._ask(loaded))
        else:
            late = _miss(DecisionError("worker 0 did not choose in time", "see its log"))
            recorded = self.workers.follow(WANTED, self.workers.vote_s, late)
        match recorded:
            case {"weights_id": str(wanted)}:
                return wanted or None
            case {"miss": str(kind), "problem": str(problem), "remedy": str(remedy)}:
                raise KINDS.get(kind, DecisionError)(problem, remedy)
        raise DecisionError("a recorded choice is malformed", "do all workers run the same version?")

    def _ask(self, loaded: Loaded) -> Json:
        identity = loaded.identities[Stage.LOADED]
        query = FindReplicas(
            replica_keys=(identity.replica_key,), family_keys=(identity.family_key,), model_id=identity.model_id
        )
        try:
            listing = self.serving.member(loaded.options.settings).metadata.find_replicas(query)
            found = pick(self.request, listing, Held(ordinal=loaded.ordinal, weights_id=loaded.weights_id))
        except WeightwireError as error:
            return _miss(error)
        return {"weights_id": found.weights_id if found else ""}

    def _allocate(self, receiver: Receiver, offer: Offer, loaded: Loaded) -> Staging:
        """Room for the new shard, once it is known to be of the same make as the old one."""
        try:
            if dict(offer.header.build_facts) != facts.collect(self.model_config):
                raise ManifestMismatch(
                    "the new weights' model is built otherwise (an lm_head of its own or none)", reload.NEW_REPLICA
                )
            check_state(loaded.state, offer.offered.state)
            _settable(self.model, loaded)
            Memory().check(loaded.raw.nbytes, self.neighbours)
            return Staging(dataclasses.replace(loaded.raw, state=offer.offered.state))
        except WeightwireError as error:
            receiver.decline(error)
            raise

    def _check(self, memory: Staging) -> list[reload.Fill]:
        """How the bytes get into the model, once all workers know that theirs do."""
        fills: list[reload.Fill] = []
        failed: WeightwireError | None = None
        try:
            fills = reload.plan(self.model, _weights(memory))
        except WeightwireError as error:
            failed = error
        verdict = self.workers.vote(STAGED, Vote(ok=failed is None, reason=failed.problem if failed else ""))
        if failed is not None:
            raise failed
        if not verdict.ok:
            raise DecisionError(f"not all workers staged their weights: {verdict.reason}", "see that worker's log")
        return fills

    def _tell(self, loaded: Loaded) -> None:
        """Let whoever waits at the metadata server know that staging is over, one way or the other."""
        if self.workers.rank != 0 or not self.request.tell:
            return
        metadata = self.serving.member(loaded.options.settings).metadata
        try:
            metadata.decide(told_key(self.request.tell), b"over", 0.0)
        except WeightwireError as error:
            log.warning("weightwire: cannot tell that staging is over: %s", error)

    def _stay_away(self, error: WeightwireError) -> None:
        """This worker goes no further: tell the others at every step where they may wait for it."""
        if self.workers.rank == 0:
            self.workers.once(WANTED, _miss(error))
        receiving = self.workers.at("receive")
        give_up(receiving, error)
        receiving.refuse("received", error.problem)
        self.workers.refuse(STAGED, error.problem)


def _weights(memory: Staging) -> dict[str, torch.Tensor]:
    """What loading writes, under all its names; derived tensors stay as this replica's construction made them."""
    kinds = {
        name: entry.kind
        for entry in memory.catalogue.layout.entries
        for name in (entry.name, *entry.aliases, *(view.name for view in entry.views))
    }
    return {name: tensor for name, tensor in memory.tensors.items() if kinds[name] is TensorClass.WEIGHT}


def _settable(model: torch.nn.Module, loaded: Loaded) -> None:
    """Check that what loading decided can be set once more: set it to what it is."""
    now = state.plain(model)
    state.apply(
        model,
        {
            path: {name: now[path][name] for name in values if name in now.get(path, {})}
            for path, values in loaded.state.items()
        },
    )


def _miss(error: WeightwireError) -> dict[str, Json]:
    kind = next((name for name, each in KINDS.items() if isinstance(error, each)), DecisionError.__name__)
    return {"miss": kind, "problem": error.problem, "remedy": error.remedy}


def _say(offer: Offer, memory: Staging, paths: list[str], seconds: dict[str, float]) -> None:
    phases = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    log.info(
        "weightwire: staged %d bytes of ordinal %d beside the old weights over %s (seconds: %s)",
        memory.nbytes,
        offer.header.ordinal,
        "+".join(paths),
        phases,
    )
