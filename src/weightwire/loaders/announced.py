"""What one rank has announced: one publication at a time, of whichever stage it is going to serve."""

from __future__ import annotations

from collections.abc import Callable

from weightwire.source.publication import Publication
from weightwire.types import Stage


class Announced:
    """Not thread-safe.

    Args:
        announce: makes a publication of a stage, ``LOADING``, and tells the metadata server.

    Attributes:
        publication: the last one that was announced, over or not; ``None`` before the first.
    """

    def __init__(self, announce: Callable[[Stage], Publication]) -> None:
        self._announce = announce
        self.publication: Publication | None = None

    def anew(self, stage: Stage) -> Publication:
        """Another one; legal where the last one is over, or is of another stage."""
        self.publication = self._announce(stage)
        return self.publication

    def of(self, stage: Stage) -> Publication:
        """The one that was announced, or a new one where that is over or of another stage."""
        announced = self.publication
        if announced is not None and announced.claim.identity.stage is stage and not announced.over:
            return announced
        if announced is not None:
            announced.withdraw(0.0)
        return self.anew(stage)
