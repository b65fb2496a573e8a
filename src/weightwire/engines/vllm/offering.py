"""One load's part as a source: announced while it loads, published once its bytes are in place, held until ready."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from vllm.config import ModelConfig, VllmConfig

from weightwire.engines.vllm import facts, transforms
from weightwire.engines.vllm.options import Options
from weightwire.engines.vllm.ranks import Place
from weightwire.engines.vllm.readiness import Expectation
from weightwire.engines.vllm.serving import Serving
from weightwire.errors import WeightwireError
from weightwire.identity.identity import Identity
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.records import Manifest
from weightwire.metadata.decision import Group, Vote
from weightwire.source.described import Claim
from weightwire.source.publication import RELAY_DRAIN_S, Publication
from weightwire.source.publish import PublishReport, publish_shard
from weightwire.types import Json, Role, Stage

log = logging.getLogger("vllm.weightwire.offering")

SLEEP_BACKEND = "weightwire"
"""Taken up by the worker at its first sleep; vLLM 0.32 has no option to name one."""
RAW_BUDGET, PROCESSED, READY, PUBLISH = "raw budget", "processed", "readiness", "publish"


@dataclass(kw_only=True)
class Offering:
    """Publishes at most once: what was attempted and failed is never made up for at a later stage (hazard H12).

    Attributes:
        options: of the replica.
        config: vLLM's.
        model_config: of the model that is loaded.
        serving: of this process.
        place: of this worker.
        identities: by stage.
        group: the replica's workers.
        ordinal: of the weights; a target takes over its source's.
        report: what came of publishing, if it was attempted.
    """

    options: Options
    config: VllmConfig
    model_config: ModelConfig
    serving: Serving
    place: Place
    identities: Mapping[Stage, Identity]
    group: Group
    ordinal: int
    report: PublishReport | None = None
    _announced: Publication | None = None

    @property
    def life(self) -> str:
        """This life of the replica; equal on all its workers."""
        return str(self.group.once("replica", uuid.uuid4().hex))

    @property
    def role(self) -> Role:
        """Target or draft."""
        return self.identities[Stage.LOADED].role

    def announce(self, stage: Stage) -> None:
        """Tell others that this replica is loading, so that they may wait for it.

        Raises:
            ConfigError: as ``Serving.member``.
        """
        self._announced = self._claim(stage)

    def announce_again(self) -> None:
        """What was received came to nothing, and loading goes on with the disk: others may wait for this replica."""
        if self._announced is not None:
            self._announced = self._claim(self._announced.claim.identity.stage)

    def progress(self, done: int, total: int) -> None:
        """How far reading the disk is."""
        if self._announced is not None:
            self._announced.progress(done, total)

    def too_costly(self, model: nn.Module) -> bool:
        """Whether holding raw bytes beside processed ones is declined, by all workers together; no failed attempt."""
        reason = transforms.over_budget(model)
        verdict = self.group.vote(RAW_BUDGET, Vote(ok=not reason, reason=reason))
        if not verdict.ok:
            log.warning("weightwire: the raw stage is not published: %s", verdict.reason)
            if self._announced is not None and self._announced.relays:
                self._announced.withdraw(RELAY_DRAIN_S)  # whoever reads it may finish before the bytes change
        return not verdict.ok

    def publish(self, stage: Stage, described: Catalogue, received: Manifest | None) -> Publication | None:
        """Publish, held; ``None`` where a worker cannot: this replica still serves its users.

        Args:
            stage: of the bytes.
            described: taken at that stage.
            received: what the bytes were just verified to be, if they came from a peer at this very stage.
        """
        self.report = PublishReport(stage=stage.value)
        try:
            publication = self.publication(stage)
            publication.learn(facts.collect(self.model_config), self.ordinal)
            group = self.group.at(PUBLISH)
            self.report = publish_shard(publication, described, group, manifest=received, hold=True)
        except WeightwireError as error:
            self.failed(stage, error)
            return None
        self.serving.hold(self.role, publication)
        return publication

    def failed(self, stage: Stage, error: WeightwireError) -> None:
        """This worker cannot publish ``stage``: tell the others, and take the announcement back."""
        for step in (RAW_BUDGET, PROCESSED):  # no effect where a vote was posted already; as below
            self.group.refuse(step, error.problem)
        self.group.at(PUBLISH).refuse(f"publish/{stage.value}", error.problem)
        self.report = PublishReport(stage=stage.value, reason=error.problem)
        self.withdraw()
        log.error("weightwire: not published: %s", error)

    def withdraw(self) -> None:
        """Take the announcement back. Idempotent."""
        if self._announced is not None:
            self._announced.withdraw(0.0)

    def finish(self) -> None:
        """Offer what is held once the engine is ready; take the announcement back where nothing was published."""
        if self.report is None:
            self.withdraw()
        if self.report is None or not self.report.published:
            return
        if self.config.model_config.sleep_mode_backend == "cumem":  # vLLM's default, which ours wraps
            self.config.model_config.sleep_mode_backend = SLEEP_BACKEND
        _say(self.report)
        self._keep_out()
        self.serving.offer_when_ready(self.options.settings, self._expectation())

    def _claim(self, stage: Stage) -> Publication:
        claim = Claim(
            identity=self.identities[stage],
            coordinates=self.place.coordinates,
            world_size=self.place.size,
            replica_incarnation=self.life,
            ordinal=self.ordinal,
            build_facts=facts.collect(self.model_config),
        )
        return self.serving.member(self.options.settings).node.announce(claim)

    def publication(self, stage: Stage) -> Publication:
        """The announced one; another, where another stage was announced."""
        announced = self._announced
        if announced is not None and not announced.over:
            if announced.claim.identity.stage is stage:
                return announced
            announced.withdraw(0.0)
        self._announced = self._claim(stage)
        return self._announced

    def _keep_out(self) -> None:
        """The engine captures graphs and warms up next: nobody may read what is on a device then (hazard H52).

        Host memory goes on being relayed: reading it disturbs no device.
        """
        publication = self.serving.publication(self.role)
        if publication is not None and publication.relays and publication.on_device:
            publication.pause(RELAY_DRAIN_S)

    def _expectation(self) -> Expectation:
        """Whose word says that the engine is ready: worker 0's view, whose host has the front end."""
        mine = Expectation.of(self.config, self.options.quiet_s, os.environ)
        told: Json = [mine.key, mine.patience_s]
        if self.group.rank == 0:
            agreed = self.group.once(READY, told)
        else:
            agreed = self.group.follow(READY, self.group.vote_s, told)
        match agreed:
            case [str(key), float(patience_s)]:
                return Expectation(key, patience_s)
        return mine


def _say(report: PublishReport) -> None:
    seconds = ", ".join(f"{name} {value:.3f}" for name, value in report.seconds.items())
    log.info(
        "weightwire: published %d bytes, stage %s, over %s, held until the engine is ready "
        "(kept a second time: %d bytes; seconds: %s)",
        report.nbytes,
        report.stage,
        "+".join(report.transports),
        report.held,
        seconds,
    )
    log.info("weightwire: content id %s of weights id %s, stage %s", report.content_id, report.weights_id, report.stage)
