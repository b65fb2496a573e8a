"""Write-once decisions of the ranks of one replica: peer or disk, which weights, and whether it worked.

Never a collective on the engine's group: one that timed out is not a "no" (a late rank sees it succeed) and poisons the
group for good. Here the first write wins, and every rank obeys what is recorded, also one that comes late.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from weightwire.errors import DecisionError, RankLost
from weightwire.metadata.api import Metadata
from weightwire.types import Json

MAX_VALUE_BYTES = 64 * 1024
MAX_REASON = 500
DEFAULT_VOTE_S = 30.0
_POLL_S = 0.02
_SLICE_S = 0.25
"""How long a rank waits for a vote before it looks whether the step was decided without it."""
_T = TypeVar("_T")


class DecisionStore(Protocol):
    """Write-once keys that all ranks of one replica reach. Thread-safe."""

    def record(self, key: str, value: bytes) -> bytes:
        """Record ``value`` unless something is recorded; what is recorded now."""
        ...

    def wait(self, key: str, timeout: float) -> bytes | None:
        """What is recorded, waiting up to ``timeout`` seconds for it; ``None`` if nothing is by then."""
        ...


class MemoryDecisions:
    """For a replica of one rank, or several in one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def record(self, key: str, value: bytes) -> bytes:
        """See :class:`DecisionStore`."""
        with self._changed:
            recorded = self._values.setdefault(key, value)
            self._changed.notify_all()
            return recorded

    def wait(self, key: str, timeout: float) -> bytes | None:
        """See :class:`DecisionStore`."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, timeout)
            return self._values.get(key)


class TorchDecisions:
    """On a ``torch.distributed`` store (``TCPStore``, ``PrefixStore`` …), duck-typed: nothing of torch is imported.

    Args:
        store: torch's.
        bound_s: seconds that it has to answer. Torch's own timeouts do not cover a server that is stopped: its client
            reads for ever then, which is left to a thread.

    Raises (all methods):
        RankLost: the store cannot be reached, or did not answer; the process that serves it has ended, or hangs.
    """

    def __init__(self, store: Any, bound_s: float = DEFAULT_VOTE_S) -> None:
        self._store = store
        self._bound_s = bound_s
        self._silent = False

    def record(self, key: str, value: bytes) -> bytes:
        """See :class:`DecisionStore`."""
        return self._reach(lambda: bytes(self._store.compare_set(key, "", value.decode())))

    def wait(self, key: str, timeout: float) -> bytes | None:
        """See :class:`DecisionStore`. Polls: ``wait`` of torch's stores logs a warning at each timeout."""
        until = time.monotonic() + timeout
        while not self._reach(lambda: bool(self._store.check([key]))):
            if time.monotonic() >= until:
                return None
            time.sleep(_POLL_S)
        return self._reach(lambda: bytes(self._store.get(key)))

    def _reach(self, call: Callable[[], _T]) -> _T:
        answer: Future[_T] = Future()

        def ask() -> None:
            try:
                answer.set_result(call())
            except Exception as error:  # noqa: BLE001  (the edge of a thread: raised again where it is waited for)
                answer.set_exception(error)

        if not self._silent:  # else the last call's thread still has the client's lock
            threading.Thread(target=ask, name="weightwire-decision", daemon=True).start()
        try:
            return answer.result(0.0 if self._silent else self._bound_s)
        except NotYet as error:
            self._silent = True
            problem = f"the store of the ranks' decisions did not answer within {self._bound_s:g} s"
            raise RankLost(problem, "rank 0 hangs or is stopped; start the replica again") from error
        except RuntimeError as error:  # torch's DistStoreError and friends
            raise RankLost(
                "the store of the ranks' decisions cannot be reached", "rank 0 has ended; see its log"
            ) from error


class ServerDecisions:
    """On the metadata server, for engines whose ranks share no store of their own."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def record(self, key: str, value: bytes) -> bytes:
        """See :class:`DecisionStore`."""
        recorded = self._metadata.decide(key, value, 0.0)
        if recorded is None:
            raise DecisionError(f"the metadata server recorded nothing under {key}", "see its log")
        return recorded

    def wait(self, key: str, timeout: float) -> bytes | None:
        """See :class:`DecisionStore`."""
        return self._metadata.decide(key, None, timeout, timeout=timeout + 5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What one rank says at one step.

    Attributes:
        ok: whether it can go on; an exception before the decision is a ``False``, never raised past it.
        reason: why not, one line.
        value: what the others should know, small.
    """

    ok: bool
    reason: str = ""
    value: Json = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was recorded for all ranks.

    Attributes:
        ok: every rank said yes in time.
        reason: the first "no", naming its rank; empty if ok.
        silent: ranks that had said nothing when the first one stopped waiting.
        values: each rank's ``Vote.value`` in rank order, ``None`` for silent ones.
    """

    ok: bool
    reason: str
    silent: tuple[int, ...]
    values: tuple[Json, ...]


class Group:
    """One rank's view of its replica's ranks, for decisions only.

    Args:
        store: reached by all ranks.
        rank: this one.
        size: how many there are.
        epoch: one life of one load; different for every attempt, equal on all ranks. Steps never repeat within it.
        vote_s: seconds to wait for the others at one step.
    """

    def __init__(self, store: DecisionStore, rank: int, size: int, epoch: str, vote_s: float = DEFAULT_VOTE_S) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.epoch = epoch
        self.vote_s = vote_s

    @classmethod
    def solo(cls) -> Group:
        """A replica of one rank."""
        return cls(MemoryDecisions(), 0, 1, "solo")

    def at(self, epoch: str) -> Group:
        """The same ranks at another epoch, for a further load."""
        return Group(self.store, self.rank, self.size, f"{self.epoch}/{epoch}", self.vote_s)

    def once(self, step: str, value: Json) -> Json:
        """Record ``value`` for all ranks unless one was recorded; what is recorded."""
        return _decoded(self.store.record(self._key(step), _encoded(value)))

    def follow(self, step: str, timeout: float, otherwise: Json) -> Json:
        """Wait for what another rank records; if nothing is by then, record ``otherwise``. What is recorded."""
        found = self.store.wait(self._key(step), timeout)
        return self.once(step, otherwise) if found is None else _decoded(found)

    def vote(self, step: str, mine: Vote, timeout: float | None = None) -> Verdict:
        """Say ``mine`` and obey what is recorded; waits up to ``timeout`` (default ``vote_s``) for the others."""
        self._post(step, mine)
        until = time.monotonic() + (self.vote_s if timeout is None else timeout)
        votes = [self._await(step, rank, until) for rank in range(self.size)]
        return _verdict(self.once(step, _summary(votes)), self.size)

    def refuse(self, step: str, reason: str) -> None:
        """Say no at ``step`` without waiting for what is recorded: the others learn it as soon as they get there."""
        self._post(step, Vote(ok=False, reason=reason))

    def gather(self, step: str, value: Json, timeout: float | None = None) -> list[Json]:
        """Every rank's value, in rank order.

        Raises:
            RankLost: a rank said nothing in time; names it. All ranks raise it, a late one too.
        """
        verdict = self.vote(step, Vote(ok=True, value=value), timeout)
        if verdict.silent:
            raise lost(verdict.silent, step)
        return list(verdict.values)

    def _await(self, step: str, rank: int, until: float) -> Vote | None:
        """A rank's vote; None when time is over, or when the step was decided without it."""
        while self.store.wait(self._key(step), 0.0) is None:
            left = max(0.0, until - time.monotonic())
            found = self.store.wait(self._vote_key(step, rank), min(left, _SLICE_S))
            if found is not None:
                return _vote(_decoded(found))
            if left <= _SLICE_S:
                break
        return None

    def _post(self, step: str, mine: Vote) -> None:
        self.store.record(
            self._vote_key(step, self.rank),
            _encoded({"ok": mine.ok, "reason": mine.reason[:MAX_REASON], "value": mine.value}),
        )

    def _key(self, step: str) -> str:
        return f"weightwire/{self.epoch}/{step}"

    def _vote_key(self, step: str, rank: int) -> str:
        return f"{self._key(step)}/{rank}"


def lost(silent: Sequence[int], step: str) -> RankLost:
    """The error for ranks that said nothing."""
    names = ", ".join(str(rank) for rank in silent)
    plural = "ranks" if len(silent) > 1 else "rank"
    return RankLost(
        f"{plural} {names} said nothing at step '{step}'", "see the log of that rank; start the replica again"
    )


def _summary(votes: Sequence[Vote | None]) -> Json:
    silent: list[Json] = [rank for rank, vote in enumerate(votes) if vote is None]
    against = [f"rank {rank}: {vote.reason}" for rank, vote in enumerate(votes) if vote is not None and not vote.ok]
    reason = against[0] if against else (f"rank {silent[0]} said nothing in time" if silent else "")
    values: list[Json] = [None if vote is None else vote.value for vote in votes]
    return {"ok": not against and not silent, "reason": reason, "silent": silent, "values": values}


def _verdict(recorded: Json, size: int) -> Verdict:
    match recorded:
        case {"ok": bool(ok), "reason": str(reason), "silent": list(silent), "values": list(values)}:
            ranks = tuple(rank for rank in silent if isinstance(rank, int))
            if len(values) == size and len(ranks) == len(silent):
                return Verdict(ok=ok, reason=reason, silent=ranks, values=tuple(values))
    raise DecisionError("a recorded decision is malformed", "do all ranks run the same version, with one epoch each?")


def _vote(posted: Json) -> Vote:
    match posted:
        case {"ok": bool(ok), "reason": str(reason), "value": value}:
            return Vote(ok=ok, reason=reason, value=value)
    raise DecisionError("a rank's vote is malformed", "do all ranks run the same version?")


def _encoded(value: Json | Mapping[str, Json]) -> bytes:
    encoded = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    if len(encoded) > MAX_VALUE_BYTES:
        raise DecisionError(f"a decision of {len(encoded)} bytes is too large", f"at most {MAX_VALUE_BYTES} are legal")
    return encoded


def _decoded(raw: bytes) -> Json:
    try:
        value: Json = json.loads(raw)
    except ValueError as error:
        raise DecisionError("a recorded decision is not JSON", "do all ranks run the same version?") from error
    return value
