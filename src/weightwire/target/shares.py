"""Which peer is the one to ask for which leaves, where several newcomers fill themselves from each other. Pure.

``metadata.selection`` gives shares out, so that each newcomer carries about as much as it takes: if readers asked a
relay for whatever it has, some would send twice as much as others, and all would wait for those. A peer is asked beyond
its share only for leaves that nobody who delivers has in his, or that *lag*:

- A relay that is still filling itself shows more and more of them that could be claimed, so where they should come from
  is slow. (That it is ahead of us, but not more and more so, only means that it began earlier.)
- A complete peer is found to be much faster than all others together, or to have done its share long before them.

A peer whose share counts must have delivered lately: so shares cannot make replicas wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightwire.manifest.records import Leaf
from weightwire.target.delivery import Peer

LAG_CHUNKS = 8
LAG_S = 0.1
"""By how much a relay's lead can grow without our lagging: so many chunks, and so many seconds' worth."""
GAIN = 2.0
PROBE_S = 1.0
SPARE_S = 1.0
"""A complete peer is spared. A backup is asked for one chunk after so long (then twice as long, and so on), and for
more where that came so many times as fast as everything else; another one, once its share is here, where the rest would
take so long."""
FIRST_S = 2.0
PATIENCE_S = 0.25
PATIENCE_CHUNKS = 32
"""A peer's share counts while it delivers within so long, and the time that so many chunks take at the speed of all
peers together: longer than it takes from the first newcomers of a tree to the last. At first ``FIRST_S``.
"""


@dataclass(frozen=True, slots=True)
class Share:
    """The chunks with numbers ``part``, ``part + parts``, ``part + 2 * parts`` …; with ``parts`` 0 none of them."""

    part: int = 0
    parts: int = 1


EVERYTHING = Share()
BACKUP = Share(parts=0)
"""Of a peer that is asked only for what lags."""


class Shares:
    """The shares of one shard's leaves.

    Args:
        leaves: all of the shard.
        chunk_bytes: shares are cut at multiples of about so many bytes.
    """

    def __init__(self, leaves: Sequence[Leaf], chunk_bytes: int) -> None:
        self._count = len(leaves)
        self._chunk_bytes = chunk_bytes
        self._everything = (1 << len(leaves)) - 1
        self._grid = max(1, self._count * chunk_bytes // leaves[-1].span.end) if leaves else 1

    def bits(self, share: Share) -> int:
        """The leaves of ``share``."""
        if share.parts < 2:
            return self._everything if share.parts else 0
        period = self._grid * share.parts
        part = ((1 << self._grid) - 1) << (share.part * self._grid)
        repeated = ((1 << period * (self._count // period + 1)) - 1) // ((1 << period) - 1)
        return part * repeated & self._everything

    def due(self, peer: Peer, peers: Sequence[Peer], free: int, now: float) -> int:
        """What ``peer`` is to be asked for now.

        Args:
            peer: one of ``peers``.
            peers: all.
            free: leaves that it has and that may be claimed.
            now: the time.
        """
        owned, speed, patience = 0, 0.0, self._patience(peers, now)
        for each in peers:
            if not each.dropped and now - each.brought <= patience:
                owned |= each.share
                speed += 0.0 if each is peer else each.total / max(now - each.joined, 1e-6)
        due = free & (peer.share | ~owned)
        if due or not free:
            return due
        if peer.have == self._everything:
            return free if self._pays(peer, free, speed, now) else 0
        lead = free.bit_count()
        peer.lead = min(peer.lead, lead)
        usual = max(LAG_CHUNKS, int(speed * LAG_S) // self._chunk_bytes) * self._grid
        return free if lead > peer.lead + usual else 0

    def _patience(self, peers: Sequence[Peer], now: float) -> float:
        """By what has come since they joined: a relay brings what it has much faster than it gets it.

        Not longer than anything came for, and ``FIRST_S``: of little that came nothing can be told of how long to wait.
        """
        speed = sum(
            min(each.moved / each.busy, each.total / max(now - each.joined, 1e-6)) for each in peers if each.moved
        )
        if not speed:
            return FIRST_S
        came_for = max(each.brought for each in peers) - min(each.joined for each in peers)
        return min(max(PATIENCE_S, PATIENCE_CHUNKS * self._chunk_bytes / speed), came_for + FIRST_S)

    def _pays(self, peer: Peer, free: int, speed: float, now: float) -> bool:
        """Whether a complete peer is asked beyond its share, where all others bring ``speed`` bytes a second."""
        if not peer.share:
            its = peer.moved / peer.busy if peer.moved else 0.0
            worth = not peer.flights and free.bit_count() > 2 * LAG_CHUNKS * self._grid
            return its > GAIN * speed or (worth and now - peer.joined > PROBE_S + 2 * (peer.brought - peer.joined))
        late = free.bit_count() * self._chunk_bytes // self._grid > SPARE_S * speed
        if late:
            peer.share = self._everything  # from now on: whoever was to bring it has shown how slow it is
        return late
