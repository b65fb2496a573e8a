"""vLLM's weight-transfer engine ``weightwire``: a running replica moves to other published weights of its model.

``update_weights`` stages: the new shard arrives in host memory beside the old one and is verified, and the workers
decide together; nothing that is served changes. ``finish_weight_update`` swaps, while the caller has paused the engine,
and offers the new raw bytes to others. Whatever fails before the swap leaves the old weights; a swap that fails half
way ends the process, so that mixed weights never answer. With ``"background": true`` staging goes on in a thread while
the model serves; a further ``update_weights`` for the same weights waits for its end.

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
from dataclasses import dataclass
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
from weightwire.engines.vllm import reload, state
from weightwire.engines.vllm.arrival import Arrival, Staged
from weightwire.engines.vllm.ranks import Place, group
from weightwire.engines.vllm.serving import Loaded, Serving, process_serving
from weightwire.engines.vllm.staging import Request
from weightwire.errors import ConfigError, DecisionError, WeightwireError
from weightwire.manifest.records import Layout
from weightwire.metadata.decision import Group, Vote
from weightwire.source.described import Claim
from weightwire.source.publish import PublishReport, publish_shard
from weightwire.types import Role, Stage

log = logging.getLogger("vllm.weightwire.refresh")

SWAP = "swap"
"""The last step at which the workers vote."""
DRAIN_S = 3.0
"""What readers of the old bytes get, of the time that the engine is paused."""
VOTE_S = 120.0
"""Where the model was not loaded by us, which is an error to come."""


@dataclass
class RefreshInitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Nothing: the load format's options say where the metadata server is."""


@dataclass
class RefreshUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """See ``staging.Request``, which checks it."""

    request: Request


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
        self._arriving: Arrival | None = None

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
            arrival = self._arrival()
            loaded = arrival.begin(update_info, self._loaded)
            earlier, self._arriving = self._arriving, None
            if earlier is not None and earlier.request.same(arrival.request):
                self._staged = earlier.wait(self._patience(loaded))
                return
            if earlier is not None:  # one at a time: that is what the bound on memory says
                with contextlib.suppress(WeightwireError):
                    earlier.wait(self._patience(loaded))
            if arrival.request.background:
                self._arriving = arrival
                arrival.start(loaded)
            elif not arrival.request.abandon:
                self._staged = arrival.stage(loaded)

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
        arriving = self._arriving is not None
        with self._told():
            _check_arrived(arriving)
        if arriving:
            return
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

    def _arrival(self) -> Arrival:
        loaded = self._serving.loaded.get(Role.TARGET)
        here = getattr(self.vllm_config.parallel_config, "local_world_size", self._place.size)
        return Arrival(
            workers=group(self._place, "refresh", loaded.options.vote_s if loaded else VOTE_S),
            place=self._place,
            serving=self._serving,
            model=self.model,
            model_config=self.model_config,
            neighbours=max(1, min(self._place.size, int(here))),
        )

    def _patience(self, loaded: Loaded) -> float:
        """Longer than a load may take with all its votes."""
        return loaded.options.settings.load_timeout + 4 * loaded.options.vote_s

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


def _check_arrived(arriving: bool) -> None:
    if arriving:
        raise DecisionError("staging goes on", "call update_weights for the same weights once more: it waits")


def _all_swap(workers: Group) -> bool:
    verdict = workers.vote(SWAP, Vote(ok=True))
    if not verdict.ok:
        raise DecisionError(f"not all workers can swap: {verdict.reason}", "see that worker's log")
    return verdict.ok


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


def _say_published(report: PublishReport) -> None:
    log.info(
        "weightwire: published %d bytes, stage %s, over %s (the staged bytes, which stay in host memory)",
        report.nbytes,
        report.stage,
        "+".join(report.transports),
    )
    log.info("weightwire: content id %s of weights id %s, stage %s", report.content_id, report.weights_id, report.stage)
