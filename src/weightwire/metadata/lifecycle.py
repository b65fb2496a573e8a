"""The life of one publication at its source, as a pure state machine: events in, actions out, no I/O, no clock.

    LOADING ── Digested ──> HELD ── Offer ──> READY <── Resume ── PAUSED
       └── RelayBegan ──> RELAYING ── Digested, Offer ──> READY ── Pause ──> PAUSED
    any ── Withdraw ──> WITHDRAWN

The orders that matter, and that the actions keep:

- *Pause*: no new readers; the old ones get a bounded time to finish; then the generation moves; then the bytes may
  change (``Quiet``).
- *Withdraw*: no new readers and the generation moves, both here first; then the server is told (and may be down); the
  readers get a bounded time; then the bytes may change or be freed (``Quiet``).
- A record is announced only with the generation and sequence that are true now, and never after the withdrawal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightwire.errors import PublishError
from weightwire.wire.messages import PublicationState

_S = PublicationState

# --------------------------------------------------------------------------------------------------------------------
# Events. ``now`` is in seconds of one monotonic clock.


@dataclass(frozen=True, slots=True)
class RelayBegan:
    """The shard fills from a peer, and its verified leaves are offered."""

    now: float


@dataclass(frozen=True, slots=True)
class Digested:
    """All bytes are in place and have their digests."""

    now: float


@dataclass(frozen=True, slots=True)
class Offer:
    """The engine says that the shard may be read."""

    now: float


@dataclass(frozen=True, slots=True)
class Pause:
    """The engine is about to do what readers must not meet."""

    now: float
    drain_s: float


@dataclass(frozen=True, slots=True)
class Resume:
    """The engine is done; the bytes may be read again."""

    now: float


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The end."""

    now: float
    drain_s: float


@dataclass(frozen=True, slots=True)
class ReaderOpened:
    """A read lease was granted (only while ``admits`` is true), good until ``until`` unless it is renewed."""

    now: float
    lease: bytes
    until: float


@dataclass(frozen=True, slots=True)
class ReaderClosed:
    """A read lease was given back."""

    now: float
    lease: bytes


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The metadata server does not know our lease (it restarted, or we were silent too long)."""

    now: float


@dataclass(frozen=True, slots=True)
class KeepBroke:
    """The stream to the metadata server broke: it counts us as suspect from now on."""

    now: float


@dataclass(frozen=True, slots=True)
class KeepHeld:
    """The metadata server answered a beat."""

    now: float


@dataclass(frozen=True, slots=True)
class SelfCheckFailed:
    """A leaf is no longer what the manifest says: nothing of this may be served any more."""

    now: float
    drain_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""

    now: float


Event = (
    RelayBegan
    | Digested
    | Offer
    | Pause
    | Resume
    | Withdraw
    | ReaderOpened
    | ReaderClosed
    | LeaseLost
    | KeepBroke
    | KeepHeld
    | SelfCheckFailed
    | Tick
)

# --------------------------------------------------------------------------------------------------------------------
# Actions, to be done in the order in which they stand.


@dataclass(frozen=True, slots=True)
class RefuseReaders:
    """Grant no read lease from now on."""


@dataclass(frozen=True, slots=True)
class AdmitReaders:
    """Read leases may be granted again."""


@dataclass(frozen=True, slots=True)
class MoveGeneration:
    """The peer endpoint says this generation from now on; reads under older leases are refused."""

    generation: int


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the metadata server; a failure is made good by the next beat."""

    state: PublicationState
    generation: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Retract:
    """Tell the metadata server that it is over; bounded, and no matter if the server is down."""

    generation: int
    sequence: int


@dataclass(frozen=True, slots=True)
class CutReaders:
    """These read leases are over, finished or not."""

    leases: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Quiet:
    """Nobody reads any more: the bytes may change (after ``Pause``), or be freed (after ``Withdraw``)."""


Action = RefuseReaders | AdmitReaders | MoveGeneration | Announce | Retract | CutReaders | Quiet


@dataclass(frozen=True, kw_only=True)
class Life:
    """Where a publication stands. Immutable: ``step`` returns the next one.

    Attributes:
        state: as announced.
        generation: of the published bytes; starts at 1.
        sequence: rises with every announcement.
        readers: open read leases -> when they expire.
        back_to: what ``Resume`` leads back to, while paused.
        drain_until: when readers are cut, while draining; None when no drain is under way.
        quiet: nobody reads, and nobody will until ``Resume``.
        suspect_since: when the metadata server lost sight of us; None while it has us.
        raw_hold_s: withdraw by itself this long after the last reader; None for never.
        idle_since: when the last reader left, or the offer began.
        digested: all bytes are in place and have their digests. A relay stays one until it is offered, too: readers
            are let at it all the same, but it is no replica that may be chosen.
    """

    state: PublicationState = _S.LOADING
    generation: int = 1
    sequence: int = 1
    readers: Mapping[bytes, float] = field(default_factory=dict)
    back_to: PublicationState | None = None
    drain_until: float | None = None
    quiet: bool = False
    suspect_since: float | None = None
    raw_hold_s: float | None = None
    idle_since: float | None = None
    digested: bool = False

    @property
    def published(self) -> bool:
        """Whether the metadata server should have a record: the only thing that is ever announced again."""
        return self.state is not _S.WITHDRAWN

    @property
    def admits(self) -> bool:
        """Whether a read lease may be granted now."""
        return self.state.readable

    @property
    def relays(self) -> bool:
        """Whether it is a relay, also one that is paused."""
        return _S.RELAYING in (self.state, self.back_to)

    @property
    def draining(self) -> bool:
        """Whether readers are being waited for."""
        return self.drain_until is not None


Step = tuple[Life, tuple[Action, ...]]


def step(life: Life, event: Event) -> Step:
    """The next state, and what to do.

    Events that come late or twice change nothing. What would be a mistake of the caller raises.

    Raises:
        PublishError: offered before it was digested, resumed before it was quiet, or moved on after the withdrawal.
    """
    handler = _HANDLERS[type(event)]
    after, actions = handler(life, event)
    expired, more = _expire(after, event.now)
    return expired, actions + more


def _relay_began(life: Life, _event: RelayBegan) -> Step:
    if life.state is not _S.LOADING:
        raise PublishError(f"a shard that is {life.state} cannot become a relay", "begin relaying while it is LOADING")
    return _announce(life, _S.RELAYING, AdmitReaders())


def _digested(life: Life, _event: Digested) -> Step:
    known = dataclasses.replace(life, digested=life.state is not _S.WITHDRAWN)
    if life.state is _S.LOADING:
        return _announce(known, _S.HELD)
    if life.state is _S.PAUSED and life.back_to is _S.LOADING:
        return dataclasses.replace(known, back_to=_S.HELD), ()
    return known, ()


def _offer(life: Life, event: Offer) -> Step:
    if life.state is _S.HELD:
        return _announce(dataclasses.replace(life, idle_since=event.now), _S.READY, AdmitReaders())
    if life.state is _S.PAUSED and life.back_to in (_S.HELD, _S.RELAYING) and life.digested:
        return dataclasses.replace(life, back_to=_S.READY), ()
    if life.state is _S.RELAYING and life.digested:
        return _announce(dataclasses.replace(life, idle_since=_idle(life, event.now)), _S.READY)
    if life.state in (_S.LOADING, _S.RELAYING, _S.WITHDRAWN):
        raise PublishError(f"a shard that is {life.state} cannot be offered", "digest it first, and withdraw it last")
    return life, ()


def _pause(life: Life, event: Pause) -> Step:
    if life.state in (_S.PAUSED, _S.WITHDRAWN):
        return life, ()
    paused = dataclasses.replace(life, back_to=life.state, drain_until=event.now + event.drain_s, quiet=False)
    after, actions = _announce(paused, _S.PAUSED)
    return after, (RefuseReaders(), *actions)


def _resume(life: Life, event: Resume) -> Step:
    if life.state is not _S.PAUSED:
        if life.state is _S.WITHDRAWN:
            raise PublishError("a withdrawn shard cannot be resumed", "publish it anew")
        return life, ()
    if not life.quiet or life.back_to is None:
        raise PublishError("resumed before the pause was complete", "wait for pause() to return")
    resumed = dataclasses.replace(life, back_to=None, quiet=False, idle_since=event.now)
    return _announce(resumed, life.back_to, *((AdmitReaders(),) if life.back_to.readable else ()))


def _withdraw(life: Life, event: Withdraw | SelfCheckFailed) -> Step:
    if life.state is _S.WITHDRAWN:
        return life, ()
    moved = dataclasses.replace(
        life,
        state=_S.WITHDRAWN,
        generation=life.generation + 1,
        sequence=life.sequence + 1,
        back_to=None,
        drain_until=event.now + event.drain_s,
        quiet=False,
    )
    return moved, (
        RefuseReaders(),
        MoveGeneration(moved.generation),
        Retract(moved.generation, moved.sequence),
    )


def _reader_opened(life: Life, event: ReaderOpened) -> Step:
    if not life.admits and event.lease not in life.readers:
        raise PublishError(f"a read lease was granted while the shard is {life.state}", "ask admits first")
    return dataclasses.replace(life, readers={**life.readers, event.lease: event.until}, idle_since=None), ()


def _reader_closed(life: Life, event: ReaderClosed) -> Step:
    return _without(life, (event.lease,), event.now), ()


def _lease_lost(life: Life, _event: LeaseLost) -> Step:
    if not life.published:
        return life, ()
    return life, (Announce(life.state, life.generation, life.sequence),)


def _keep_broke(life: Life, event: KeepBroke) -> Step:
    if life.suspect_since is not None:
        return life, ()
    return dataclasses.replace(life, suspect_since=event.now), ()


def _keep_held(life: Life, _event: KeepHeld) -> Step:
    return dataclasses.replace(life, suspect_since=None), ()


def _tick(life: Life, event: Tick) -> Step:
    if life.raw_hold_s is None or life.idle_since is None or life.state is not _S.READY:
        return life, ()
    if event.now - life.idle_since < life.raw_hold_s:
        return life, ()
    return _withdraw(life, Withdraw(event.now, 0.0))


def _expire(life: Life, now: float) -> Step:
    """Readers whose time is over, and the end of a drain."""
    late = tuple(lease for lease, until in life.readers.items() if until <= now or _over(life.drain_until, now))
    actions: tuple[Action, ...] = (CutReaders(late),) if late else ()
    life = _without(life, late, now)
    if life.drain_until is None or life.readers:
        return life, actions
    life = dataclasses.replace(life, drain_until=None, quiet=True)
    if life.state is _S.PAUSED:
        # only now may bytes change, so only now does the generation move
        life = dataclasses.replace(life, generation=life.generation + 1, sequence=life.sequence + 1)
        announce = Announce(life.state, life.generation, life.sequence)
        actions += (MoveGeneration(life.generation), announce)
    return life, (*actions, Quiet())


def _announce(life: Life, state: PublicationState, *before: Action) -> Step:
    after = dataclasses.replace(life, state=state, sequence=life.sequence + 1)
    return after, (*before, Announce(state, after.generation, after.sequence))


def _without(life: Life, leases: tuple[bytes, ...], now: float) -> Life:
    left = {lease: until for lease, until in life.readers.items() if lease not in leases}
    if len(left) == len(life.readers):
        return life
    return dataclasses.replace(life, readers=left, idle_since=life.idle_since if left else now)


def _idle(life: Life, now: float) -> float | None:
    return None if life.readers else now


def _over(until: float | None, now: float) -> bool:
    return until is not None and until <= now


_HANDLERS: dict[type, Callable[[Life, Any], Step]] = {
    RelayBegan: _relay_began,
    Digested: _digested,
    Offer: _offer,
    Pause: _pause,
    Resume: _resume,
    Withdraw: _withdraw,
    SelfCheckFailed: _withdraw,
    ReaderOpened: _reader_opened,
    ReaderClosed: _reader_closed,
    LeaseLost: _lease_lost,
    KeepBroke: _keep_broke,
    KeepHeld: _keep_held,
    Tick: _tick,
}
