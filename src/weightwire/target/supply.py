"""Whom to read from next: the candidates of one shard, asked for again and again while they die, fill up and appear.

The metadata server gives a relay its *seats* (``metadata.selection.seats``): whom it reads from at the same time, and
what of each. All of them are opened; when the server seats it elsewhere, the new ones are opened and the old ones are
left in peace. A target without seats (it passes nothing on, or the server does not know it yet), or whose seats are
taken or dead, reads from the others in their order.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from weightwire.errors import AuthError, MetadataError, SourceBusy, TransferError
from weightwire.target.peers import PeerShare
from weightwire.target.session import PeerSession
from weightwire.wire.messages import Candidate, PublicationState

log = logging.getLogger(__name__)

FIRST_ASK_S = 0.1
LAST_ASK_S = 2.0
"""Between two questions for candidates while there are no seats: each is half as long again as the one before."""
SEATED_ASK_S = 1.0
LAST_SEATED_ASK_S = 8.0
"""The same where there are: each is twice as long as the one before."""
KNOWN_S = 1.0
KNOWN_POLL_S = 0.02
"""So long, and so often, it is asked for the first seats: the server hears of a new relay a moment later."""
BUSY_S = 1.0
"""A source that had no place is not asked again for so long."""

Life = tuple[str, int]
"""Incarnation and generation: one that withdrew and came back is another one."""


class Reading(Protocol):
    """A peer of a pull (``target.pull``)."""

    share: PeerShare
    retired: bool

    @property
    def running(self) -> bool:
        """Whether it is being read."""
        ...

    @property
    def useful(self) -> bool:
        """Whether what is missing may come from it soon."""
        ...

    @property
    def complete(self) -> bool:
        """Whether it has everything."""
        ...

    def retire(self) -> None:
        """Ask it for nothing more."""
        ...


Open = tuple[Reading, PeerSession]


class Supply(Iterator[PeerSession | None]):
    """The sessions of one pull. Not thread-safe: the pull asks from one thread.

    Args:
        candidates: best first.
        connect: opens a session; raises what ``PeerSession`` does.
        find: asks for candidates, best first, as the metadata server knows them now; ``None`` not to ask. Raises
            MetadataError where it cannot be asked, TransferError where nobody is worth reading any more.
        seated: whether we are a relay, so that the server has seats for us.
        content_id: what is read; others are no candidates. Empty where nobody knows it yet (see ``fits``).
        unusable: told of each candidate that could not be opened, with the reason.
        clock: monotonic seconds.

    Attributes:
        opened: in order.
        busy: candidates that had no place when they were asked last.
        peers: of the pull, in the order of ``opened``; set by whoever makes the pull.
    """

    def __init__(
        self,
        candidates: tuple[Candidate, ...],
        connect: Callable[[Candidate], PeerSession],
        find: Callable[[], tuple[Candidate, ...]] | None,
        *,
        seated: bool,
        content_id: str,
        unusable: Callable[[Candidate, TransferError | AuthError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.opened: list[PeerSession] = []
        self.busy: dict[Life, Candidate] = {}
        self.peers: Sequence[Reading] = ()
        self._connect = connect
        self._candidates = candidates
        self._seats: tuple[Candidate, ...] = ()
        self._find = find
        self._seated = seated
        self._content_id = content_id
        self._unusable = unusable
        self._clock = clock
        self._failed: set[Life] = set()
        self._full_until: dict[Life, float] = {}
        self._listed: set[Life] = {_life(each) for each in candidates}
        self._asked_at = -math.inf
        self._ask_s = FIRST_ASK_S

    def __next__(self) -> PeerSession | None:
        """The next one to read from besides those that are; ``None`` for nobody now.

        Raises:
            StopIteration: nobody is read, and nobody is left.
            TransferError: what ``find`` says.
        """
        both = list(zip(self.peers, self.opened, strict=False))
        self._failed |= {_life(session.candidate) for peer, session in both if _is_over(peer)}
        reading = [(peer, session) for peer, session in both if peer.running and not peer.retired]
        if not self.opened and self._find is not None and self._seated:
            self._await_seats()
        asked = self._ask(reading)
        session = self._next_seat(reading) if self._seats else None
        if session is None and not self._is_served(reading):
            session = self._next_other(reading)
        if session is None and not reading and (asked or self._find is None):
            raise StopIteration
        return session

    # ---- asking

    def _await_seats(self) -> None:
        until = self._clock() + KNOWN_S
        while self._take_answer(seat=True) and not self._seats and self._clock() < until:
            time.sleep(KNOWN_POLL_S)

    def _ask(self, reading: list[Open]) -> bool:
        """Ask for candidates, if it is time; whether the list is one of this moment."""
        now, read = self._clock(), {_life(session.candidate) for _, session in reading}
        lost = not reading or any(_life(each) not in read and not self._is_full(each) for each in self._seats)
        pause = FIRST_ASK_S if lost else self._ask_s
        if self._find is None or now - self._asked_at < pause:
            return False
        growth, most = (2.0, LAST_SEATED_ASK_S) if self._seats else (1.5, LAST_ASK_S)
        self._ask_s = min(self._ask_s * growth, most)
        self._take_answer(seat=lost or any(_closes_up(peer, session) for peer, session in reading))
        return True

    def _take_answer(self, *, seat: bool) -> bool:
        """Ask; ``seat``: whether to move where the seats are others now. False where there was no answer."""
        assert self._find is not None
        self._asked_at = self._clock()
        try:
            found = self._find()
        except MetadataError as error:
            log.info("going on with the known sources: %s", error)
            return False
        self._listed = {_life(each) for each in found}
        self._candidates = found + tuple(each for each in self._candidates if _life(each) not in self._listed)
        if seat:
            seats = tuple(each for each in found if each.seated)
            if seats and not self._seats:
                self._ask_s = SEATED_ASK_S
            self._seats = seats
        return True

    # ---- seats

    def _next_seat(self, reading: list[Open]) -> PeerSession | None:
        """Open a seat that is empty; where there is none, leave in peace whoever is read and has none."""
        kept: list[Open] = []
        for candidate in self._seats:
            same = [item for item in reading if _role(item[1].candidate) == _role(candidate) and item not in kept]
            same.sort(key=lambda item: _life(item[1].candidate) != _life(candidate))
            if same and (candidate.parts > 1 or same[0][0].complete or _is(same[0], candidate)):
                kept.append(same[0])  # in trees, and from complete peers, whoever delivers is kept
            elif self._usable(candidate):
                session = self._open(candidate)
                if session is not None:
                    return session
        if any(session.share.parts for _, session in kept):
            for item in reading:
                if item not in kept:
                    item[0].retire()
        return None

    def _is_served(self, reading: list[Open]) -> bool:
        """Whether somebody in a seat, or without seats any relay, is to deliver what is missing.

        Far down a chain the first bytes take a while; what somebody in a seat does not bring, the backup does.
        """
        if self._seats:
            return any(session.candidate.seated and session.share.parts for _, session in reading)
        return any(peer.share.relay and peer.useful for peer, _ in reading)

    # ---- others

    def _next_other(self, reading: list[Open]) -> PeerSession | None:
        while (candidate := self._pick([session for _, session in reading])) is not None:
            session = self._open(candidate)
            if session is not None:
                return session
        return None

    def _pick(self, reading: list[PeerSession]) -> Candidate | None:
        read = {_life(session.candidate): session for session in reading}
        behind = False  # what follows ranks behind a whole source that is being read: a relay must not displace that
        for candidate in self._candidates:
            life = _life(candidate)
            if life in read:
                behind |= not read[life].relaying
                continue
            passed = behind and _is_relay(candidate)
            if not passed and (life in self._listed or not read) and self._usable(candidate):
                return candidate
        return None

    def _is_full(self, candidate: Candidate) -> bool:
        return self._full_until.get(_life(candidate), 0.0) > self._clock()

    def _usable(self, candidate: Candidate) -> bool:
        fit = fits(candidate, self._content_id) and _life(candidate) not in self._failed
        return fit and not self._is_full(candidate)

    def _open(self, candidate: Candidate) -> PeerSession | None:
        life = _life(candidate)
        self.busy.pop(life, None)
        try:
            session = self._connect(candidate)
        except SourceBusy as error:
            self.busy[life] = candidate
            self._full_until[life] = self._clock() + BUSY_S
            self._unusable(candidate, error)
        except (TransferError, AuthError) as error:
            self._failed.add(life)
            self._unusable(candidate, error)
        else:
            self.opened.append(session)
            return session
        return None


def fits(candidate: Candidate, content_id: str) -> bool:
    """Whether it holds what is read; who follows one replica holds the same, before there is an id to say so."""
    return not content_id or candidate.record.content_id == content_id


def _is_over(peer: Reading) -> bool:
    return peer.share.error is not None and not isinstance(peer.share.error, SourceBusy)


def _closes_up(peer: Reading, session: PeerSession) -> bool:
    """Whether this is a place in a chain that another may have now: whoever reads from a complete peer stays there."""
    return session.candidate.seated and session.share.parts == 1 and not peer.complete


def _is_relay(candidate: Candidate) -> bool:
    return candidate.record.state is PublicationState.RELAYING and not candidate.record.reads_disk


def _is(item: Open, candidate: Candidate) -> bool:
    return _life(item[1].candidate) == _life(candidate)


def _role(candidate: Candidate) -> tuple[bool, int, int]:
    return candidate.seated, candidate.part, candidate.parts


def _life(candidate: Candidate) -> Life:
    return candidate.record.incarnation, candidate.record.generation
