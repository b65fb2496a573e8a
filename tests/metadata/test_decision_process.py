from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from metadata_process import Child, child, rank_main, store_main, torch_store
from wire_samples import SECRET

from weightwire.errors import DecisionError, RankLost
from weightwire.metadata.client import MetadataClient
from weightwire.metadata.decision import (
    MAX_VALUE_BYTES,
    Group,
    MemoryDecisions,
    ServerDecisions,
    TorchDecisions,
    Vote,
)
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.types import Json

PATIENCE = 1.0
"""At the step where one of them misbehaves; before it, nobody is given up."""
LATE = 5.0
CASES = ((0, 0), (1, 1), (2, 0))
"""Step and rank of the misbehaviour."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with child(store_main) as store:
        yield store.hear()


def run(port: int, how: str, step: int, who: int) -> dict[int, Any]:
    """Rank -> how its steps ended, for those that lived to tell."""
    with contextlib.ExitStack() as stack:
        ranks: list[Child] = []
        for number in (0, 1):
            misbehaves = number == who
            patience = 30.0 if how == "fails" or misbehaves else PATIENCE
            plan = {
                "patience": patience,
                "at": step,
                "late": LATE,
                "how": how,
                "step": step if misbehaves else -1,
            }
            epoch = f"{how}-{step}-{who}"
            ranks.append(stack.enter_context(child(rank_main, port, epoch, number, 2, plan)))
        for made in ranks:
            assert made.hear() == "up"
        for made in ranks:
            made.pipe.send("go")
        tells = [n for n in (0, 1) if not (n == who and how in ("hangs", "dies"))]
        return {number: ranks[number].hear(60) for number in tells}


@pytest.mark.parametrize("how", ["fails", "hangs", "dies", "late"])
def test_h23_all_ranks_obey_one_decision_whatever_one_of_them_does(port: int, how: str) -> None:
    with ThreadPoolExecutor(len(CASES)) as pool:
        found = list(pool.map(lambda case: run(port, how, *case), CASES))
    for (step, who), ends in zip(CASES, found, strict=True):
        last = {number: seen[-1] for number, seen in ends.items()}
        assert len({(ok, reason, tuple(silent)) for ok, reason, silent, _ in last.values()}) == 1
        ok, reason, silent, _ = next(iter(last.values()))
        assert not ok
        assert all(len(seen) == step + 1 for seen in ends.values())
        if how == "fails":
            assert (reason, silent) == (f"rank {who}: its disk is on fire", [])
            assert all(seconds < 15 for *_, seconds in last.values())  # a "no" needs no waiting
        else:
            assert silent == [who]
            # one that is late finds the decision and does not wait again
            assert all(seconds < PATIENCE + 10 for *_, seconds in last.values())


def test_h67_a_step_that_timed_out_does_not_spoil_the_next_ones() -> None:
    store = MemoryDecisions()
    first, second = (Group(store, number, 2, "epoch", 0.2) for number in (0, 1))
    assert first.vote("one", Vote(ok=True)).silent == (1,)
    assert second.vote("one", Vote(ok=True)).silent == (1,)  # late, and bound by it
    results: list[list[Json]] = []
    thread = threading.Thread(target=lambda: results.append(second.gather("two", "b", 5)))
    thread.start()
    assert first.gather("two", "a", 5) == ["a", "b"]
    thread.join(5)
    assert results == [["a", "b"]]


def test_a_lost_rank_is_named_by_gather_on_every_rank() -> None:
    store = MemoryDecisions()

    def lost(number: int) -> str:
        with pytest.raises(RankLost) as caught:
            Group(store, number, 3, "epoch").gather("ids", number, 0.5)
        return caught.value.problem

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lost, (0, 2))) == ["rank 1 said nothing at step 'ids'"] * 2


def test_a_late_rank_does_not_wait_for_a_dead_one_again() -> None:
    store = MemoryDecisions()
    first = Group(store, 0, 3, "epoch", 0.3).vote("step", Vote(ok=True))
    began = time.monotonic()
    assert Group(store, 1, 3, "epoch", 30.0).vote("step", Vote(ok=True)) == first
    assert time.monotonic() - began < 10
    assert first.silent == (1, 2)


def test_a_rank_that_waits_obeys_as_soon_as_another_has_decided() -> None:
    store = MemoryDecisions()
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        waiting = pool.submit(Group(store, 1, 3, "epoch", 30.0).vote, "step", Vote(ok=True))
        first = Group(store, 0, 3, "epoch", 0.5).vote("step", Vote(ok=True))
        assert waiting.result(10) == first
    assert time.monotonic() - began < 5


def test_a_rank_can_refuse_without_waiting_and_the_first_vote_counts() -> None:
    store = MemoryDecisions()
    first, second = (Group(store, number, 2, "epoch", 5) for number in (0, 1))
    second.refuse("plan", "no memory")
    verdict = first.vote("plan", Vote(ok=True))
    assert (verdict.ok, verdict.reason) == (False, "rank 1: no memory")
    assert second.vote("plan", Vote(ok=True)) == verdict


def test_the_server_is_a_store_for_engines_without_one() -> None:
    with EmbeddedServer(ServerSettings(secret=SECRET)) as server, MetadataClient(server.url, SECRET) as client:
        first, second = (Group(ServerDecisions(client), number, 2, "replica-life", 5) for number in (0, 1))
        results: list[list[Json]] = []
        thread = threading.Thread(target=lambda: results.append(second.gather("ids", {"b": 1})))
        thread.start()
        assert first.gather("ids", {"a": 1}) == [{"a": 1}, {"b": 1}]
        thread.join(5)
        assert results == [[{"a": 1}, {"b": 1}]]
        assert first.follow("leader", 0.1, "otherwise") == "otherwise"
        assert second.once("leader", "mine") == "otherwise"


def test_a_store_that_has_gone_is_an_error_of_ours() -> None:
    with child(store_main) as made:
        store = TorchDecisions(torch_store(made.hear()))
        assert store.record("k", b"v") == b"v"
        made.kill()
        with pytest.raises(RankLost, match="cannot be reached"):
            store.record("k2", b"v")


def test_h23_a_store_that_is_stopped_is_given_up() -> None:
    """Its connections stay, and torch's client reads for ever."""
    with child(store_main) as made:
        store = TorchDecisions(torch_store(made.hear()), 3.0)
        assert store.record("k", b"v") == b"v"
        made.signal(signal.SIGSTOP)
        for calls in range(2):
            began = time.monotonic()
            with pytest.raises(RankLost, match=r"did not answer within 3 s"):
                store.wait("k", 60.0)
            assert time.monotonic() - began < (2.0 if calls else 20.0), "asked once more, although it is given up"
        made.kill()


def test_what_is_too_large_or_not_ours_is_refused() -> None:
    store = MemoryDecisions()
    group = Group(store, 0, 1, "epoch")
    with pytest.raises(DecisionError, match="too large"):
        group.once("big", "x" * MAX_VALUE_BYTES)
    store.record("weightwire/epoch/odd", b"not json")
    with pytest.raises(DecisionError, match="not JSON"):
        group.once("odd", 1)
    store.record("weightwire/epoch/vote", b'{"ok":1}')
    with pytest.raises(DecisionError, match="malformed"):
        group.vote("vote", Vote(ok=True))
