"""Where the native runtime publishes: once, before the first transform; later only if that was never attempted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from weightwire.errors import PublishError
from weightwire.manifest.catalogue import ConstructionNames, capture, catalogue
from weightwire.manifest.records import Manifest
from weightwire.metadata.decision import Group, Vote
from weightwire.observability.progress import Progress
from weightwire.runtime.models.llama import LlamaForCausalLM
from weightwire.source.budget import over_budget
from weightwire.source.publication import Publication
from weightwire.source.publish import PublishReport, publish_shard
from weightwire.source.snapshot import Snapshot
from weightwire.types import Stage

log = logging.getLogger(__name__)

Announce = Callable[[Stage, LlamaForCausalLM], Publication]
"""The publication for a stage, announced and still loading."""


class PublishingHooks:
    """A ``LoadHooks`` that publishes. Attempted and published are different facts.

    Args:
        announce: gives the publication of a stage.
        group: the ranks.
        early: publish the LOADED stage, before the first transform.
        received: the manifest of the bytes of a stage that a peer delivered, else ``None``.
        progress: see ``observability.progress``.
    """

    def __init__(
        self,
        announce: Announce,
        group: Group,
        *,
        early: bool,
        received: Callable[[Stage], Manifest | None],
        progress: Progress,
    ) -> None:
        self._announce = announce
        self._group = group
        self._early = early
        self._received = received
        self._progress = progress
        self._names: ConstructionNames | None = None
        self._snapshot: Snapshot | None = None
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

    def constructed(self, model: nn.Module) -> None:
        """Take the names before storage is bound and aliases are wired."""
        self._names = capture(model)

    def loaded(self, model: nn.Module) -> None:
        """All raw bytes are in place: publish them, unless another stage was asked for."""
        if not self._early or self._too_costly(model):
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

    def _too_costly(self, model: nn.Module) -> bool:
        """Whether holding raw bytes beside transformed ones is declined, by all ranks together; no failed attempt."""
        reason = over_budget(model)
        verdict = self._group.vote("raw budget", Vote(ok=not reason, reason=reason))
        if not verdict.ok:
            log.warning("the raw stage is not published: %s; the processed one will be", verdict.reason)
        return not verdict.ok

    def _publish(self, stage: Stage, model: nn.Module) -> None:
        assert isinstance(model, LlamaForCausalLM)
        received = self._received(stage)
        self.report = PublishReport(stage=stage.value)
        publication = self._announce(stage, model)
        try:
            described = catalogue(model, self.names)
            self.report = publish_shard(publication, described, self._group, manifest=received, progress=self._progress)
        except PublishError as error:  # a replica that cannot be a source still serves its users
            publication.withdraw(0.0)
            self._group.refuse(f"publish/{stage.value}", error.problem)  # no effect where a vote was posted already
            self.report.reason = error.problem
            log.warning("not published: %s", error)
        else:
            self.publication = publication
