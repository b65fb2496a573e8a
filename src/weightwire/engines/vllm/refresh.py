"""vLLM's weight-transfer engine ``weightwire``: a running replica moves to other published weights of its model.

``update_weights`` stages: the new shard arrives in host memory beside the old one and is verified, and the workers
decide together; nothing that is served changes. ``finish_weight_update`` swaps, while the caller has paused the engine,
and offers the new raw bytes to others. Whatever fails before the swap leaves the old weights; a swap that fails half
way ends the process, so that mixed weights never answer.

How errors travel: vLLM's executor stops reading its workers' answers at the first error, and takes the others' for
answers to the next call. So only the replica's last worker raises, after all have decided; the others log. After an
error of ``update_weights`` the caller ends the session with ``finish_weight_update``, which changes nothing then (and
raises on the worker that has ended it already); after one of ``finish_weight_update`` with ``start_weight_update``
(which raises there) and ``finish_weight_update``. ``rollout`` does all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import CompilationMode, VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from weightwire.config import ReplicaRole
from weightwire.engines.vllm import facts, reload, state
from weightwire.engines.vllm.ranks import Place, group
from weightwire.engines.vllm.serving import Loaded, Serving, process_serving
from weightwire.engines.vllm.staging import Held, Memory, Request, check_state, pick
from weightwire.errors import (
    ConfigError,
    DecisionError,
    FenceTimeout,
    ManifestMismatch,
    MetadataError,
    MismatchError,
    NoSourceError,
    WeightwireError,
)
from weightwire.identity.identity import Identity
from weightwire.manifest.records import Layout
from weightwire.manifest.staging import Staging
from weightwire.metadata.decision import Group, Vote
from weightwire.source.described import Claim
from weightwire.source.publish import PublishReport, publish_shard
from weightwire.target.discover import give_up
from weightwire.target.offer import Offer, Want
from weightwire.target.receiver import Receiver
from weightwire.types import Json, Role, Stage, TensorClass
from weightwire.wire.messages import FindReplicas

log = logging.getLogger("vllm.weightwire.refresh")

BEGIN, WANTED, STAGED, SWAP = "begin", "wanted", "staged", "swap"
"""Steps at which the workers vote, besides those of receiving and publishing."""

DRAIN_S = 3.0
"""What readers of the old bytes get, of the time that the engine is paused."""
VOTE_S = 120.0
"""Where the model was not loaded by us, which is an error to come."""

KINDS = {kind.__name__: kind for kind in (NoSourceError, MismatchError, MetadataError, DecisionError)}


@dataclass
class RefreshInitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Nothing: the load format's options say where the metadata server is."""


@dataclass
class RefreshUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """See ``staging.Request``, which checks it."""

    request: Request


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
        seconds: by phase.
    """

    request: Request
    memory: Staging
    offer: Offer
    identity: Identity
    fills: list[reload.Fill]
    workers: Group
    seconds: dict[str, float] = field(default_factory=dict)


class RefreshEngine(WeightTransferEngine):  # type: ignore[misc]
    """See the module. Made by vLLM, once a worker, right after the model was loaded."""

    init_info_cls = RefreshInitInfo
    update_info_cls = RefreshUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._serving: Serving = process_serving()
        self._place = Place.of(vllm_config)
        self._staged: Staged | None = None
        self._condemned: list[Staging] = []

    def init_transfer_engine(self, init_info: RefreshInitInfo) -> None:
        """Nothing; the call is not needed."""

    def start_weight_update(self) -> None:
        """Forget what an earlier session staged."""
        self._staged = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Stage the weights that ``update_info`` names (``staging.Request``); the model goes on as it is.

        Raises:
            ValueError: on the last worker: ``update_info`` is wrong.
            RuntimeError: on the last worker: they were not staged, on any worker; says why.
        """
        self._staged = None
        with self._told():
            workers = group(self._place, "refresh", self._vote_s)
            try:
                request, loaded = self._begin(workers, update_info)
                if not request.abandon:
                    self._staged = self._stage(workers, request, loaded)
            except WeightwireError:
                raise
            except Exception as error:  # the edge of a call from another process: the other workers must not wait
                log.exception("weightwire: staging failed; this is a bug")
                problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
                bug = DecisionError(f"staging failed ({problem})", "this is a bug; its trace is in the log")
                _stay_away(workers, bug)
                raise bug from error

    def receive_weights(self, update_info: RefreshUpdateInfo) -> None:
        """As ``update_weights``."""
        self.update_weights(dataclasses.asdict(update_info.request))

    def finish_weight_update(self) -> None:
        """Swap what was staged, if anything was. Legal while the engine is paused; its prefix cache is void then.

        Raises:
            RuntimeError: on the last worker: another worker is not ready to swap; nothing was changed.
            SystemExit: the swap failed half way: this process must not answer any more.
        """
        staged, self._staged = self._staged, None
        if staged is None:
            log.info("weightwire: nothing is staged: the weights stay as they are")
            return
        agreed = False
        with self._told():
            agreed = _all_swap(staged.workers)
        if not agreed:
            return
        try:
            self._swap(staged)
        except BaseException as error:  # whatever it is: half of the model is new
            problem = str(error).partition("\n")[0] or type(error).__name__
            log.critical(
                "weightwire: the weights were swapped in part (%s); this replica ends, start it again",
                problem,
                exc_info=error,
            )
            raise SystemExit(1) from error

    def shutdown(self) -> None:
        """Forget what was staged."""
        self._staged = None

    # ---- staging

    @property
    def _vote_s(self) -> float:
        loaded = self._serving.loaded.get(Role.TARGET)
        return loaded.options.vote_s if loaded else VOTE_S

    def _begin(self, workers: Group, update_info: Any) -> tuple[Request, Loaded]:
        """What all workers can know before anybody is asked."""
        failed: WeightwireError | None = None
        try:
            request = Request.parse(update_info)
            loaded = self._loaded()
        except WeightwireError as error:
            failed = error
        verdict = workers.vote(BEGIN, Vote(ok=failed is None, reason=failed.problem if failed else ""))
        if failed is not None:
            raise failed
        if not verdict.ok:
            raise DecisionError(f"not all workers can be refreshed: {verdict.reason}", "see that worker's log")
        return request, loaded

    def _loaded(self) -> Loaded:
        reload.check_version()
        loaded = self._serving.loaded.get(Role.TARGET)
        if loaded is None:
            raise ConfigError(
                "this model's raw weights were not described when it was loaded",
                "start vLLM with --load-format presharded and the metadata server's address",
            )
        if self.vllm_config.parallel_config.data_parallel_size > 1:
            raise ConfigError("live refresh of data-parallel engines is not carried", "start new replicas")
        if self.device.type == "cpu" and self.vllm_config.compilation_config.mode != CompilationMode.NONE:
            raise ConfigError(  # compiled code on a CPU holds packed weights as constants
                "compiled code on a CPU may go on using the old weights", "start vLLM with --enforce-eager"
            )
        return loaded

    def _stage(self, workers: Group, request: Request, loaded: Loaded) -> Staged | None:
        began = time.monotonic()
        wanted = self._resolve(workers, request, loaded)
        if wanted is None:
            log.info("weightwire: these weights (ordinal %d) are held already", loaded.ordinal)
            return None
        reader = self._serving.member(loaded.options.settings).reader
        identity = dataclasses.replace(loaded.identities[Stage.LOADED], revision=None)  # named otherwise
        want = Want(
            stages={Stage.LOADED: identity}, coordinates=self._place.coordinates, pinned=wanted, accept_unpinned=True
        )
        receiver = Receiver(reader=reader, want=want, group=workers.at("receive"), poison=loaded.options.poison)
        offer = receiver.find()
        memory = self._allocate(receiver, offer, loaded)
        try:
            report = receiver.fill(memory.catalogue)
        except FenceTimeout:
            self._condemned.append(memory)  # a peer may still write there: it is never given back
            raise
        fills = self._check(workers, memory)
        report.seconds["staged"] = time.monotonic() - began
        _say_staged(offer, memory, report.paths, report.seconds)
        return Staged(
            request=request,
            memory=memory,
            offer=offer,
            identity=dataclasses.replace(identity, revision=offer.header.revision or None),
            fills=fills,
            workers=workers,
        )

    def _resolve(self, workers: Group, request: Request, loaded: Loaded) -> str | None:
        """The weights id that all workers take; ``None`` where it is held already."""
        if workers.rank == 0:
            recorded = workers.once(WANTED, self._ask(request, loaded))
        else:
            late = _miss(DecisionError("worker 0 did not choose in time", "see its log"))
            recorded = workers.follow(WANTED, workers.vote_s, late)
        match recorded:
            case {"weights_id": str(wanted)}:
                return wanted or None
            case {"miss": str(kind), "problem": str(problem), "remedy": str(remedy)}:
                raise KINDS.get(kind, DecisionError)(problem, remedy)
        raise DecisionError("a recorded choice is malformed", "do all workers run the same version?")

    def _ask(self, request: Request, loaded: Loaded) -> Json:
        identity = loaded.identities[Stage.LOADED]
        query = FindReplicas(
            replica_keys=(identity.replica_key,), family_keys=(identity.family_key,), model_id=identity.model_id
        )
        try:
            listing = self._serving.member(loaded.options.settings).metadata.find_replicas(query)
            found = pick(request, listing, Held(ordinal=loaded.ordinal, weights_id=loaded.weights_id))
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
            check_state(loaded.state, offer.manifest.layout.state)
            _settable(self.model, loaded)
            Memory().check(loaded.raw.nbytes, self._neighbours())
            return Staging(dataclasses.replace(loaded.raw, state=offer.manifest.layout.state))
        except WeightwireError as error:
            receiver.decline(error)
            raise

    def _neighbours(self) -> int:
        """Workers that stage on this host at once."""
        here = getattr(self.vllm_config.parallel_config, "local_world_size", self._place.size)
        return max(1, min(self._place.size, int(here)))

    def _check(self, workers: Group, memory: Staging) -> list[reload.Fill]:
        """How the bytes get into the model, once all workers know that theirs do."""
        fills: list[reload.Fill] = []
        failed: WeightwireError | None = None
        try:
            fills = reload.plan(self.model, _weights(memory))
        except WeightwireError as error:
            failed = error
        verdict = workers.vote(STAGED, Vote(ok=failed is None, reason=failed.problem if failed else ""))
        if failed is not None:
            raise failed
        if not verdict.ok:
            raise DecisionError(f"not all workers staged their weights: {verdict.reason}", "see that worker's log")
        return fills

    # ---- the swap

    def _swap(self, staged: Staged) -> None:
        began = time.monotonic()
        loaded = self._serving.loaded[Role.TARGET]
        self._serving.withdraw(Role.TARGET, DRAIN_S)
        if Role.DRAFT in self._serving.loaded:
            log.warning("weightwire: the draft model keeps its weights; only the target's are refreshed")
        layout = staged.memory.catalogue.layout
        state.apply(self.model, layout.state)
        reload.swap(self.model, self.model_config, staged.fills)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        swapped = time.monotonic()
        self._serving.loaded[Role.TARGET] = _now_loaded(loaded, layout, staged)
        self._republish(staged, loaded)
        log.info(
            "weightwire: now at ordinal %d, weights id %s (seconds: swap %.3f, publish %.3f)",
            staged.offer.header.ordinal,
            staged.offer.choice.weights_id,
            swapped - began,
            time.monotonic() - swapped,
        )

    def _republish(self, staged: Staged, loaded: Loaded) -> None:
        """Offer the staged bytes to others: on the CPU most of the old ones were held beside the model as well."""
        settings = loaded.options.settings
        serves = settings.role in (ReplicaRole.AUTO, ReplicaRole.SOURCE) and Stage.LOADED in settings.stages
        wished = staged.request.republish
        if not serves or wished is False or (wished is None and self.device.type != "cpu"):
            log.info("weightwire: the new weights are not offered to others; the staged bytes are freed")
            return
        workers = staged.workers
        claim = Claim(
            identity=staged.identity,
            coordinates=self._place.coordinates,
            world_size=self._place.size,
            replica_incarnation=str(workers.once("replica", uuid.uuid4().hex)),
            ordinal=staged.offer.header.ordinal,
            build_facts=dict(staged.offer.header.build_facts),
        )
        try:
            publication = self._serving.member(settings).node.announce(claim)
            report = publish_shard(
                publication, staged.memory.catalogue, workers.at("publish"), manifest=staged.offer.manifest
            )
        except WeightwireError as error:  # a replica that cannot be a source still serves its users
            workers.at("publish").refuse(f"publish/{Stage.LOADED.value}", error.problem)
            log.error("weightwire: not published: %s", error)  # noqa: TRY400  (one line is the contract)
            return
        self._serving.hold(Role.TARGET, publication)
        _say_published(report)

    # ---- errors

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raise what is wrong on the last worker alone; see the module."""
        try:
            yield
        except WeightwireError as error:
            kind = ValueError if isinstance(error, ConfigError) else RuntimeError
            log.error("weightwire: not refreshed, the old weights stay: %s", error)  # noqa: TRY400
            if self._place.rank == self._place.size - 1:
                raise kind(f"weightwire: {error}") from error


def _all_swap(workers: Group) -> bool:
    verdict = workers.vote(SWAP, Vote(ok=True))
    if not verdict.ok:
        raise DecisionError(f"not all workers can swap: {verdict.reason}", "see that worker's log")
    return verdict.ok


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


def _now_loaded(loaded: Loaded, layout: Layout, staged: Staged) -> Loaded:
    identities = {
        stage: dataclasses.replace(identity, revision=staged.identity.revision)
        for stage, identity in loaded.identities.items()
    }
    return dataclasses.replace(
        loaded,
        identities=identities,
        raw=layout,
        state=layout.state,
        weights_id=staged.offer.choice.weights_id,
        ordinal=staged.offer.header.ordinal,
    )


def _stay_away(workers: Group, error: WeightwireError) -> None:
    """This worker goes no further: tell the others at every step where they may wait for it."""
    workers.refuse(BEGIN, error.problem)
    if workers.rank == 0:
        workers.once(WANTED, _miss(error))
    receiving = workers.at("receive")
    give_up(receiving, error)
    receiving.refuse("received", error.problem)
    workers.refuse(STAGED, error.problem)


def _miss(error: WeightwireError) -> dict[str, Json]:
    kind = next((name for name, each in KINDS.items() if isinstance(error, each)), DecisionError.__name__)
    return {"miss": kind, "problem": error.problem, "remedy": error.remedy}


def _say_staged(offer: Offer, memory: Staging, paths: list[str], seconds: dict[str, float]) -> None:
    phases = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    log.info(
        "weightwire: staged %d bytes of ordinal %d beside the old weights over %s (seconds: %s)",
        memory.nbytes,
        offer.header.ordinal,
        "+".join(paths),
        phases,
    )


def _say_published(report: PublishReport) -> None:
    log.info(
        "weightwire: published %d bytes, stage %s, over %s (the staged bytes, which stay in host memory)",
        report.nbytes,
        report.stage,
        "+".join(report.transports),
    )
    log.info("weightwire: content id %s of weights id %s, stage %s", report.content_id, report.weights_id, report.stage)
