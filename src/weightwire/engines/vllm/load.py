"""One load of one model in one worker: announce, find, fill or fall back, publish. All workers decide together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from vllm.config import ModelConfig, VllmConfig

from weightwire.config import OnMiss, ReplicaRole
from weightwire.engines.vllm import facts, stages, state, transforms
from weightwire.engines.vllm.classes import CLASSES
from weightwire.engines.vllm.identity import identities
from weightwire.engines.vllm.offering import PROCESSED, PUBLISH, RAW_BUDGET, Offering
from weightwire.engines.vllm.options import Options
from weightwire.engines.vllm.ranks import Place, group
from weightwire.engines.vllm.serving import Loaded, Serving
from weightwire.errors import FenceTimeout, LoadError, WeightwireError
from weightwire.identity.identity import Identity
from weightwire.loaders.relay import PublicationRelay
from weightwire.manifest.catalogue import Catalogue, ConstructionNames, capture, catalogue
from weightwire.manifest.records import Layout, Manifest
from weightwire.metadata.decision import Group, Vote
from weightwire.source.publication import Publication
from weightwire.target.discover import give_up
from weightwire.target.offer import Offer, Want
from weightwire.target.receiver import Receiver
from weightwire.target.report import LoadReport
from weightwire.types import Role, Stage

log = logging.getLogger("vllm.weightwire.load")

LOADED = "loaded"
"""Step at which the workers agree, besides those of receiving and offering."""


@dataclass(kw_only=True)
class Load:
    """Use once: ``find``, ``constructed``, ``fill``, ``publish_raw``, ``finish``. Steps that do not apply do nothing.

    Attributes:
        options: of the replica.
        model_config: of the model that is loaded, target or draft.
        serving: of this process.
        place: of this worker.
        identities: by stage.
        group: the replica's workers.
        report: of what was received; ``source`` is empty where nothing was.
        offering: this replica as a source.
    """

    options: Options
    model_config: ModelConfig
    serving: Serving
    place: Place
    identities: Mapping[Stage, Identity]
    group: Group
    offering: Offering
    report: LoadReport = field(default_factory=LoadReport)
    _receiver: Receiver | None = None
    _received: Manifest | None = None
    _names: ConstructionNames | None = None
    _built: state.Plain = field(default_factory=dict)
    _raw: Layout | None = None

    @classmethod
    def begin(cls, options: Options, config: VllmConfig, model_config: ModelConfig, serving: Serving) -> Load:
        """A load that is carried by weightwire.

        Raises:
            ConfigError: this model or layout cannot be; names what.
            RankLost: another worker did not come.
        """
        role = Role.DRAFT if model_config.runner_type == "draft" else Role.TARGET
        place = Place.of(config)
        workers = group(place, role.value, options.vote_s)
        try:
            serving.member(options.settings)
            found = identities(config, model_config, options, place.coordinates, role)
        except WeightwireError as error:
            _stay_away(workers, error)
            raise
        shared: dict[str, Any] = {
            "options": options,
            "model_config": model_config,
            "serving": serving,
            "place": place,
            "identities": found,
            "group": workers,
        }
        return cls(offering=Offering(config=config, ordinal=options.ordinal, **shared), **shared)

    @property
    def role(self) -> Role:
        """Target or draft."""
        return self.identities[Stage.LOADED].role

    @property
    def pulls(self) -> bool:
        """Whether peers are asked at all; a draft is not taken from one where its target was not (hazard H37)."""
        wants = self.options.settings.role in (ReplicaRole.AUTO, ReplicaRole.TARGET)
        return wants and not (self.role is Role.DRAFT and Role.TARGET in self.serving.fell_back)

    @property
    def publishes(self) -> bool:
        """Whether the replica becomes a source."""
        return self.options.settings.role in (ReplicaRole.AUTO, ReplicaRole.SOURCE)

    @property
    def processed(self) -> bool:
        """Whether what was found are processed bytes: they are filled in after vLLM's post-load steps."""
        return self._receiver is not None and self.report.stage == Stage.PROCESSED.value

    # ---- before construction

    def find(self) -> None:
        """Announce this replica, then find a source and build as it was built.

        Raises:
            LoadError: no source, and nothing else is to be read.
        """
        if self.publishes:
            self.offering.announce(self._publish_stage)
        if not self.pulls:
            return
        settings = self.options.settings
        want = Want(
            stages={stage: self.identities[stage] for stage in settings.stages},
            coordinates=self.place.coordinates,
            pinned=self.options.weights_id if self.role is Role.TARGET else "",
            latest=self.options.latest,
            accept_unpinned=settings.accept_unpinned,
            replica_incarnation=self.offering.life,
            has_disk=settings.on_miss is OnMiss.DISK,
        )
        receiver = Receiver(
            reader=self.serving.member(settings).reader,
            want=want,
            group=self.group.at("receive"),
            poison=self.options.poison,
            relay=PublicationRelay(self._relaying, self.offering.announce_again),
        )
        self.report = receiver.report
        try:
            offer = receiver.find()
            self._receiver = receiver
            facts.apply(self.model_config, offer.header.build_facts)
        except WeightwireError as error:
            self._decline(error)

    def constructed(self, model: nn.Module) -> None:
        """Take the names, before storage is bound and aliases are wired."""
        self._names = capture(model)
        self._built = state.plain(model)

    def forget(self) -> None:
        """The model that was constructed is given up: hold nothing of it while another one is built."""
        self._names, self._built, self._raw = None, {}, None

    # ---- the bytes

    def fill(self, model: nn.Module) -> bool:
        """Whether every worker now holds a peer's verified bytes; where one does not, none does.

        Raises:
            LoadError: no peer delivered, and nothing else is to be read.
            FenceTimeout: this memory must not be used any more; the process has to end.
        """
        if self._receiver is None:
            return False
        try:
            state.apply(model, self._receiver.state)
            described = self.describe(model)
        except WeightwireError as error:
            self._decline(error)
            return False
        try:
            self._receiver.fill(described)
        except FenceTimeout:
            raise
        except WeightwireError as error:
            self._restore(model)
            self._decline(error, tell=False)
            return False
        self._received = self._receiver.manifest
        self.offering.ordinal = self._receiver.header.ordinal
        _say_received(self.report)
        return True

    def describe(self, model: nn.Module) -> Catalogue:
        """What ``model`` consists of now, with the state that its loading decided.

        Raises:
            CatalogueError: something has no exact description; names it.
        """
        described = catalogue(model, self._names, classes=CLASSES)
        described.declare(state.changed(self._built, state.plain(model)))
        return described

    # ---- publishing

    @contextmanager
    def publish_raw(self, model: nn.Module) -> Iterator[None]:
        """Publish the raw bytes, held until the engine is ready; vLLM may process the model inside."""
        described = None if self.processed else self._describe_raw(model)
        publication = None
        if described is not None and self.publishes and self._publish_stage is Stage.LOADED:
            publication = None if self.offering.too_costly(model) else self._publish(Stage.LOADED, described)
        if publication is None:
            yield
            return
        with transforms.guarded(model, publication.guard(model, foreign=True)):
            yield
        assert self.offering.report is not None
        self.offering.report.held = publication.held.nbytes

    def finish(self, model: nn.Module) -> None:
        """The model is processed: publish that stage where raw bytes were never tried, and remember what was loaded.

        Raises:
            RankLost: another worker did not get here; vLLM itself would wait for it without a bound.
        """
        self.group.gather(LOADED, "yes")
        if self.publishes and self.offering.report is None and Stage.PROCESSED in self.options.settings.stages:
            self._publish_processed(model)
        if self._raw is not None and self._names is not None:
            self.serving.loaded[self.role] = Loaded(
                options=self.options,
                place=self.place,
                identities=self.identities,
                names=self._names,
                raw=self._raw,
                state=self._raw.state,
                weights_id=self._weights_id,
                ordinal=self.offering.ordinal,
            )
        self.offering.finish()

    # ---- inside

    def _relaying(self, offer: Offer) -> Publication | None:
        """What passes on ``offer`` while it is received: only what is published later, at the same stage."""
        stage = offer.choice.stage
        if not (self.publishes and self.options.relay) or stage not in (self._publish_stage, Stage.PROCESSED):
            return None
        return self.offering.publication(stage)

    @property
    def _publish_stage(self) -> Stage:
        """The one that is announced: the first that the operator names, or the one that is received."""
        return Stage.PROCESSED if self.processed else self.options.settings.stages[0]

    @property
    def _weights_id(self) -> str:
        published = self.offering.report
        return published.weights_id if published else self.report.weights_id if self._received else ""

    def _decline(self, error: WeightwireError, *, tell: bool = True) -> None:
        """A step down: tell the other workers, take note; the end, where nothing else is to be read."""
        if self._receiver is not None and tell:
            self._receiver.decline(error)
        self._receiver = None
        self.serving.fell_back.add(self.role)
        if self.options.settings.on_miss is OnMiss.FAIL:
            remedy = error.remedy or "start a source, or set on_miss to disk"
            raise LoadError(f"no peer ({error.problem}), and on_miss is fail", remedy) from error
        log.warning("weightwire: no peer, reading the disk: %s", error)

    def _restore(self, model: nn.Module) -> None:
        """Undo what a source's state set; its bytes were undone by the receiver (hazard H59)."""
        now = state.plain(model)
        changed = {
            path: {name: self._built[path][name] for name in values}
            for path, values in state.changed(self._built, now).items()
        }
        state.apply(model, changed)

    def _describe_raw(self, model: nn.Module) -> Catalogue | None:
        try:
            described = self.describe(model)
        except WeightwireError as error:
            if self.publishes:
                self.offering.failed(Stage.LOADED, error)
            return None
        self._raw = described.layout
        return described

    def _publish_processed(self, model: nn.Module) -> None:
        reason, described = stages.undeclared(model), None
        try:
            described = self.describe(model)
            reason = reason or (stages.lost(self._raw, described.layout) if self._raw is not None else "")
        except WeightwireError as error:
            reason = reason or error.problem
        verdict = self.group.vote(PROCESSED, Vote(ok=not reason, reason=reason))
        if verdict.ok and described is not None:
            self._publish(Stage.PROCESSED, described)
        else:
            log.warning("weightwire: the processed stage is not published: %s", verdict.reason)

    def _publish(self, stage: Stage, described: Catalogue) -> Publication | None:
        return self.offering.publish(stage, described, self._received if self.report.stage == stage.value else None)


def _stay_away(workers: Group, error: WeightwireError) -> None:
    """This worker takes no part: tell the others at every step where they would wait for it."""
    give_up(workers.at("receive"), error)
    for stage in Stage:
        workers.at(PUBLISH).refuse(f"publish/{stage.value}", error.problem)
    for step in (RAW_BUDGET, LOADED, PROCESSED):
        workers.refuse(step, error.problem)


def _say_received(report: LoadReport) -> None:
    seconds = ", ".join(f"{name} {value:.3f}" for name, value in report.seconds.items())
    log.info("weightwire: received %d bytes over %s (seconds: %s)", report.nbytes, "+".join(report.paths), seconds)
    log.info("weightwire: content id %s of weights id %s, stage %s", report.content_id, report.weights_id, report.stage)
    for warning in report.warnings:
        log.warning("weightwire: %s", warning)
