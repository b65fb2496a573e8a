"""A disk that is being read into a shard: its digests are made meanwhile, and others follow it, where they can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Self

from weightwire.errors import PublishError, WeightwireError
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.records import Manifest
from weightwire.source.from_disk import FromDisk, offered_by
from weightwire.source.publication import Publication

log = logging.getLogger(__name__)


class Reading:
    """Made by ``begin``; ``finish`` or ``abandon`` ends it.

    Attributes:
        publication: what others follow; ``None`` where nobody can.
        final: see ``FromDisk.final``.
    """

    def __init__(self, publication: Publication | None, filling: FromDisk) -> None:
        self.publication = publication
        self.final = filling.final
        self._filling = filling

    @classmethod
    def begin(cls, publication: Publication, describe: Callable[[], Catalogue]) -> Self | None:
        """Offer what becomes final of a model; ``None`` where that cannot be, and others wait for all of it.

        Args:
            publication: ``LOADING``; stays so where ``None`` is returned.
            describe: the model whose memory is about to be filled.
        """
        try:
            return cls(publication, FromDisk(describe(), offered_by(publication)))
        except WeightwireError as error:
            log.warning("this replica cannot be followed while it reads the disk: %s", error)
            return None

    @classmethod
    def alone(cls, describe: Callable[[], Catalogue]) -> Self | None:
        """Digest what becomes final, and tell nobody; ``None`` where that cannot be: it is digested afterwards."""
        try:
            return cls(None, FromDisk(describe(), None))
        except WeightwireError as error:
            log.debug("nothing is digested while the disk is read: %s", error)
            return None

    def finish(self, loaded: Catalogue) -> Manifest:
        """The manifest of what was read; see ``FromDisk.finish``.

        Raises:
            PublishError: as there, or because a leaf had changed unseen; what was offered, if anything, is withdrawn.
        """
        if self.publication is None:
            return self._filling.finish(loaded)
        if self.publication.over:  # one that is announced anew knows nothing of what was offered
            self.abandon()
            raise PublishError("bytes changed unseen after they were read", "suspect this machine's memory")
        try:
            return self._filling.finish(loaded)
        except PublishError:
            self.publication.withdraw(0.0)
            raise

    def abandon(self) -> None:
        """Nothing that is being read becomes readable any more. Bounded, idempotent."""
        self._filling.abandon()
