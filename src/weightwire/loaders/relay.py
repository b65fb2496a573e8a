"""A load's relay: the publication that was announced for it passes on what it receives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weightwire.errors import PublishError
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.availability import Availability
from weightwire.source.described import Holding
from weightwire.source.publication import Publication
from weightwire.target.offer import Offer
from weightwire.transport.base import Registration

log = logging.getLogger(__name__)


@dataclass
class PublicationRelay:
    """A ``target.relaying.Relay``.

    Args (fields):
        publication: the one that this load is published under later, still ``LOADING``; ``None`` where what is offered
            is not passed on.
        ended: called after the publication was withdrawn because the load failed: whoever waits for this replica is to
            hear of it again.
    """

    publication: Callable[[Offer], Publication | None]
    ended: Callable[[], None] = lambda: None
    _relaying: Publication | None = None

    def begin(self, offer: Offer, memory: AddressSpace, available: Availability) -> Mapping[str, Registration]:
        """See ``Relay``. Where nobody can be served, the load goes on without it."""
        publication = self.publication(offer)
        if publication is None:
            return {}
        publication.learn(offer.header.build_facts, offer.header.ordinal)
        holding = Holding(
            manifest=offer.manifest,
            memory=memory,
            weights_id=offer.choice.weights_id,
            provisional=offer.provisional,
            following=offer.choice.follow,
        )
        try:
            registered = publication.relay(holding, available)
        except PublishError as error:
            log.warning("what is received is not passed on meanwhile: %s", error)
            return {}
        self._relaying = publication
        return registered

    def end(self) -> None:
        """See ``Relay``: generation and leases first, without waiting for readers to finish."""
        relaying, self._relaying = self._relaying, None
        if relaying is not None:
            relaying.withdraw(0.0)
            self.ended()

    @property
    def broken(self) -> bool:
        """See ``Relay``."""
        return self._relaying is not None and self._relaying.over
