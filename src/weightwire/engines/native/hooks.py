"""Where the native runtime publishes: once, before the first transform; later only if that was never attempted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from weightwire.errors import PublishError
from weightwire.loaders.reading import Reading
from weightwire.manifest.catalogue import Catalogue, ConstructionNames, capture, catalogue
from weightwire.manifest.records import Manifest
from weightwire.metadata.decision import Group, Vote
from weightwire.observability.progress import Progress
from weightwire.runtime.checkpoint.protocol import Final
from weightwire.runtime.layers.method import MethodLayer
from weightwire.runtime.models.decoder import DecoderForCausalLM
from weightwire.source.budget import over_budget
from weightwire.source.publication import Publication
from weightwire.source.publish import PublishReport, publish_shard
from weightwire.source.snapshot import Snapshot
from weightwire.types import Stage

log = logging.getLogger(__name__)

Announce = Callable[[Stage, DecoderForCausalLM], Publication]
"""The publication for a stage, announced and still loading."""


class PublishingHooks:
    """A ``LoadHooks`` that publishes. Attempted and published are different facts.

    Args:
        announce: gives the publication of a stage.
        group: the ranks.
        early: publish the LOADED stage, before the first transform.
        received: the manifest of the bytes of a stage that a peer delivered, else ``None``.
        declined: called before the first transform where raw bytes are not published after all.
        progress: see ``observability.progress``.
    """

    def __init__(
        self,
        announce: Announce,
        group: Group,
        *,
        early: bool,
        received: Callable[[Stage], Manifest | None],
        declined: Callable[[], None],
        progress: Progress,
    ) -> None:
        self._announce = announce
        self._group = group
        self._early = early
        self._forbidden = False
        self._received = received
        self._declined = declined
        self._progress = progress
        self._names: ConstructionNames | None = None
        self._snapshot: Snapshot | None = None
        self._reading: Reading | None = None
        self.publication: Publication | None = None
        self.report: PublishReport | None = None

    @property
    def names(self) -> ConstructionNames:
        """Construction-time names; legal once the model was constructed."""
        assert self._names is not None
        return self._names

    @property
    def attempted(self) -> bool:
        """Whether publishing ever began: then it is never tried again at a later stage."""
        return self.report is not None

    @property
    def forbidden(self) -> bool:
        """Whether nothing may be published."""
        return self._forbidden

    def forbid(self, reason: str) -> None:
        """Publish nothing, for ``reason``; legal before the model is constructed."""
        log.warning("not published: %s", reason)
        self._early, self._forbidden = False, True
        self.report = PublishReport(stage="", reason=reason, attempted=False)

    def constructed(self, model: nn.Module) -> None:
        """Take the names before storage is bound and aliases are wired."""
        self._names = capture(model)

    def filling(self, model: nn.Module) -> Final | None:
        """A checkpoint is about to be read: digest what is final of it, and offer that, so that others need not read.

        What loading decides (which parameters there are, scalars) is not known before: then nothing is offered.
        """
        if not self._early or over_budget(model):
            return None
        assert isinstance(model, DecoderForCausalLM)
        if any(isinstance(layer, MethodLayer) and layer.export_state() for layer in model.modules()):
            self._reading = Reading.alone(lambda: catalogue(model, self.names))
        else:
            self._reading = Reading.begin(self._announce(Stage.LOADED, model), lambda: catalogue(model, self.names))
        return self._reading.final if self._reading is not None else None

    def loaded(self, model: nn.Module) -> None:
        """All raw bytes are in place: publish them, unless another stage was asked for."""
        if not self._early:
            return
        if self._too_costly(model):
            self._stop_reading()
            self._declined()
            return
        self._publish(Stage.LOADED, model)
        if self.publication is not None:
            self._snapshot = self.publication.guard(model)

    def guard_transform(self, module: nn.Module) -> AbstractContextManager[None]:
        """Copy-on-transform while raw bytes are published."""
        return self._snapshot.guard(module) if self._snapshot else nullcontext()

    def post_loaded(self, model: nn.Module) -> None:
        """Nothing: the worker calls ``finish`` at the end of its set-up."""

    def reloading(self, model: nn.Module) -> None:  # noqa: ARG002  (the protocol's)
        """The bytes are about to change: withdraw first."""
        self.withdraw()

    def finish(self, model: nn.Module) -> None:
        """The worker is set up: publish the PROCESSED stage where nothing was attempted before."""
        if self.report is not None:
            self.report.held = self._snapshot.held.nbytes if self._snapshot else 0
            return
        self._publish(Stage.PROCESSED, model)

    def withdraw(self) -> None:
        """End the publication, if there is one; returns when the bytes may change. Idempotent."""
        if self.publication is not None:
            self.publication.withdraw()
            self.publication, self._snapshot = None, None

    def _read(self, described: Catalogue) -> Manifest | None:
        """The manifest of what was digested while it was read; ``None`` if nothing was, or not what is there now.

        Raises:
            PublishError: it was withdrawn before, because a leaf had changed unseen.
        """
        reading, self._reading = self._reading, None
        if reading is None:
            return None
        unseen = reading.publication is not None and reading.publication.over
        try:
            return reading.finish(described)
        except PublishError as error:
            if unseen:
                raise
            if reading.publication is None:
                log.debug("%s: digested again", error.problem)
            else:
                log.warning("%s: what was offered while it was read is withdrawn, and published anew", error.problem)
            return None

    def _stop_reading(self) -> None:
        """Nothing that is being read becomes readable any more."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.abandon()

    def _too_costly(self, model: nn.Module) -> bool:
        """Whether holding raw bytes beside transformed ones is declined, by all ranks together; no failed attempt."""
        reason = over_budget(model)
        verdict = self._group.vote("raw budget", Vote(ok=not reason, reason=reason))
        if not verdict.ok:
            log.warning("the raw stage is not published: %s; the processed one will be", verdict.reason)
        return not verdict.ok

    def _publish(self, stage: Stage, model: nn.Module) -> None:
        assert isinstance(model, DecoderForCausalLM)
        received = self._received(stage)
        self.report = PublishReport(stage=stage.value)
        publication = self._announce(stage, model)
        try:
            described = catalogue(model, self.names)
            known = received or self._read(described)
            if publication.over:
                publication = self._announce(stage, model)
            self.report = publish_shard(publication, described, self._group, manifest=known, progress=self._progress)
        except PublishError as error:  # a replica that cannot be a source still serves its users
            publication.withdraw(0.0)
            self._group.refuse(f"publish/{stage.value}", error.problem)  # no effect where a vote was posted already
            self.report.reason = error.problem
            log.warning("not published: %s", error)
        else:
            self.publication = publication
