"""Waiting for a place where every source serves as many readers as it takes: bounded, and looking out for newcomers."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable

from weightwire.errors import MetadataError, SourceBusy
from weightwire.manifest.provisional import Expected
from weightwire.target.reader import Reader
from weightwire.target.supply import fits
from weightwire.wire.messages import Candidate, FindShard

log = logging.getLogger(__name__)

FIRST_POLL_S = 0.25
LAST_POLL_S = 2.0
"""Between two tries to get a place: each is half as long again as the one before, and varied by a quarter."""


class Places:
    """The sources of one part of a load, and how long to wait for one of them. Not thread-safe.

    Args:
        reader: our means.
        candidates: best first.
        find: the question that is asked again while it waits, so that replicas that have become ready are taken, too;
            ``None`` not to.
        patience_s: seconds to wait in all; 0 not to.
    """

    def __init__(
        self, reader: Reader, candidates: tuple[Candidate, ...], find: FindShard | None, patience_s: float
    ) -> None:
        self.candidates = candidates
        self.waited_s = 0.0
        self._reader = reader
        self.find = find
        self._patience_s = patience_s
        self._poll_s = FIRST_POLL_S
        self._failed = {reader.incarnation}

    def wait(self, busy: Iterable[Candidate], manifest: Expected, deadline: float) -> None:
        """Sleep for a moment; afterwards ``candidates`` are those to try next.

        Args:
            busy: those of ``candidates`` that had no place; the others are not asked again.
            manifest: what is read from them.
            deadline: ``time.monotonic()`` value for the whole load.

        Raises:
            SourceBusy: it has waited long enough.
        """
        full = tuple(busy)
        self._failed |= _lives(self.candidates) - _lives(full)
        pause = min(self._poll_s * random.uniform(0.75, 1.25), self._patience_s - self.waited_s)  # noqa: S311  (no secret)
        if pause <= 0 or time.monotonic() + pause >= deadline:
            raise SourceBusy(
                f"{len(full)} sources serve as many readers as they take, after waiting {self.waited_s:.1f} s",
                "allow more with max_readers, or wait longer with WEIGHTWIRE_WAIT_FOR_LOADING",
            )
        if not self.waited_s:
            log.info("%d sources are full; waiting for a place, at most %.0f s", len(full), self._patience_s)
        time.sleep(pause)
        self.waited_s += pause
        self._poll_s = min(self._poll_s * 1.5, LAST_POLL_S)
        self.candidates = self._newest(full, manifest)

    def _newest(self, full: tuple[Candidate, ...], manifest: Expected) -> tuple[Candidate, ...]:
        if self.find is None:
            return full
        try:
            listed = self._reader.metadata.find_shard(self.find).candidates
        except MetadataError as error:
            log.info("waiting for the known sources only: %s", error)
            return full
        known = _lives(full)
        return (
            tuple(
                each
                for each in listed
                if each.record.incarnation in known
                or (each.record.incarnation not in self._failed and fits(each, manifest.content_id))
            )
            or full
        )


def _lives(candidates: Iterable[Candidate]) -> set[str]:
    return {each.record.incarnation for each in candidates}
