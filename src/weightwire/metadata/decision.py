"""The ranks of a replica decide once, together: write-once values in a key/value store of their own (DESIGN §2.4).

Each rank posts its vote. Each waits for all votes, with a bound; whoever has them, or has waited long enough, makes a
decision of what is there and writes it by compare-and-set. The first write wins, and every rank obeys what is
recorded, also one that comes late. No collective is used: one that times out poisons its group, and is no "no".

A rank that posts nothing at all is lost: that, too, is recorded, so that every rank ends with the same ``RankLost``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from weightwire.errors import DecisionError, RankLost
from weightwire.metadata.decision_stores import DecisionStore
from weightwire.types import Json

MAX_VALUE_BYTES = 200 * 1024
"""Of one vote, and of one decision, as JSON."""
MAX_REASON = 500
_SLICE_S = 0.25
"""How long a rank waits for votes before it looks for a decision again."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What one rank says.

    Attributes:
        ok: ready for what is to be decided.
        reason: one line; why not.
        data: whatever the decision is made of.
    """

    ok: bool
    reason: str = ""
    data: Json = None


class Ballot:
    """One rank's part in one decision.

    As a context manager it makes sure that this rank is heard: what is raised inside the block before the vote was
    posted is posted as a "no" (and raised on).

    Args:
        store: seen by all ranks of the replica, and by them only.
        epoch: names this decision; all ranks give the same text, and never twice.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, store: DecisionStore, epoch: str, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise DecisionError(f"rank {rank} is outside the world of {world_size}")
        self._store = store
        self._epoch = epoch
        self._rank = rank
        self._keys = [f"{epoch}/vote/{other}" for other in range(world_size)]
        self._posted = False

    def post(self, vote: Vote) -> None:
        """Post this rank's vote; the first one counts.

        Raises:
            DecisionError: it is too large, or the store cannot be reached.
        """
        body: dict[str, Json] = {"ok": vote.ok, "reason": vote.reason[:MAX_REASON], "data": vote.data}
        self._store.set_if_absent(self._keys[self._rank], _dump(body))
        self._posted = True

    def decide(self, choose: Callable[[Sequence[Vote]], Json], timeout: float) -> Json:
        """The decision of all ranks.

        Args:
            choose: makes it of everybody's votes, in the order of ranks; its result is recorded if this rank is first.
            timeout: seconds to wait for votes that are missing.

        Raises:
            RankLost: a rank posted nothing; on all ranks, naming it.
            DecisionError: the store cannot be reached, or holds something else.
        """
        key = f"{self._epoch}/decision"
        recorded = self._await(key, time.monotonic() + timeout)
        if isinstance(recorded, bytes):
            return _obey(recorded)
        missing = [rank for rank, name in enumerate(self._keys) if name not in recorded]
        if missing:
            body: dict[str, Json] = {"lost": [*missing]}
        else:
            body = {"value": choose([_vote(recorded[name]) for name in self._keys])}
        return _obey(self._store.set_if_absent(key, _dump(body)))

    def _await(self, key: str, until: float) -> bytes | Mapping[str, bytes]:
        """What was decided already, or the votes that are there when all are, or when time is over."""
        while True:
            recorded = self._store.get(key)
            if recorded is not None:
                return recorded
            left = until - time.monotonic()
            votes = self._store.wait(self._keys, max(0.0, min(left, _SLICE_S)))
            if len(votes) == len(self._keys) or left <= 0:
                return votes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is not None and not self._posted:
            self.post(Vote(ok=False, reason=" ".join(f"{type(error).__name__}: {error}".split())))


def decide(
    store: DecisionStore,
    epoch: str,
    rank: int,
    world_size: int,
    vote: Vote,
    choose: Callable[[Sequence[Vote]], Json],
    timeout: float,
) -> Json:
    """Vote and decide in one call; see :class:`Ballot`."""
    ballot = Ballot(store, epoch, rank, world_size)
    ballot.post(vote)
    return ballot.decide(choose, timeout)


def gather(store: DecisionStore, epoch: str, rank: int, world_size: int, value: Json, timeout: float) -> list[Json]:
    """Everybody's ``value``, in the order of ranks, equal on all ranks.

    Raises:
        RankLost: a rank posted nothing; on all ranks.
        DecisionError: a rank said no, the values are too large together, or the store cannot be reached.
    """
    result = decide(store, epoch, rank, world_size, Vote(ok=True, data=value), _collect, timeout)
    if not isinstance(result, list):
        raise DecisionError(f"the ranks could not agree: {result}", "see the log of that rank")
    return result


def all_ready(votes: Sequence[Vote]) -> Json:
    """A ``choose`` for yes or no: ``{"ok": true}``, or the ranks that said no and why."""
    against: dict[str, Json] = {str(rank): vote.reason for rank, vote in enumerate(votes) if not vote.ok}
    return {"ok": not against, "against": against}


def _collect(votes: Sequence[Vote]) -> Json:
    against = [f"rank {rank}: {vote.reason}" for rank, vote in enumerate(votes) if not vote.ok]
    return "; ".join(against) if against else [vote.data for vote in votes]


def _obey(data: bytes) -> Json:
    body = _load(data)
    lost = body.get("lost")
    if isinstance(lost, list):
        names = ", ".join(str(rank) for rank in lost)
        raise RankLost(f"rank {names} posted nothing in time", "see its log; all ranks of this replica end now")
    if "value" not in body:
        raise DecisionError("the recorded decision is not one of ours", "give every decision an epoch of its own")
    return body["value"]


def _vote(data: bytes) -> Vote:
    body = _load(data)
    ok, reason = body.get("ok"), body.get("reason")
    if not isinstance(ok, bool) or not isinstance(reason, str):
        raise DecisionError("a recorded vote is not one of ours", "give every decision an epoch of its own")
    return Vote(ok=ok, reason=reason[:MAX_REASON], data=body.get("data"))


def _dump(body: Mapping[str, Json]) -> bytes:
    data = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(data) > MAX_VALUE_BYTES:
        raise DecisionError(f"a vote or decision of {len(data)} bytes is too large", f"at most {MAX_VALUE_BYTES}")
    return data


def _load(data: bytes) -> dict[str, Json]:
    try:
        body = json.loads(data[: MAX_VALUE_BYTES + 1])
    except (ValueError, RecursionError) as error:
        raise DecisionError("a recorded value is not JSON", "give the ranks a store of their own") from error
    if not isinstance(body, dict):
        raise DecisionError("a recorded value is not an object", "give the ranks a store of their own")
    return body
