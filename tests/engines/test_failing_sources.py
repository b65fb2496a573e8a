"""Sources that die, freeze, lie or change their bytes while a replica reads from them."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_fleet import SLOW, Fleet, Watch, bare


@dataclass
class Two:
    """Two slow sources of one model."""

    first: Watch
    second: Watch
    tokens: list[list[int]]
    digest: list[list[str]]

    def chunks(self) -> list[int]:
        """How many each of them was asked for."""
        return [watch.count("serving") for watch in (self.first, self.second)]

    def both_read(self, before: list[int]) -> None:
        """Wait until a target waits for chunks of both of them."""
        until = time.monotonic() + 30
        while not all(now > then for now, then in zip(self.chunks(), before, strict=True)):
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture(scope="module")
def two(crew: Fleet, checkpoints: dict[str, Path]) -> Two:
    first, second = (crew.source(checkpoints["big"], "two", faults=SLOW) for _ in range(2))
    for each in (first, second):
        each.loaded()
    return Two(first, second, first.tokens(), first.digest())


def test_h27_a_frozen_source_is_given_up_and_the_rest_comes_from_another(
    two: Two, fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    before = two.chunks()
    target = fleet.target(bare(checkpoints["big"]), "two", env={"WEIGHTWIRE_STALL_TIMEOUT": "2"})
    two.both_read(before)
    two.first.signal(signal.SIGSTOP)
    try:
        report = target.report()
    finally:
        two.first.signal(signal.SIGCONT)
    assert report["source"] == "peer"
    assert sum(share["nbytes"] for share in report["shares"]) == report["nbytes"]
    given_up = ("was dropped", "was not used", "they took over")  # the last: what it owed was all that was missing
    assert any(said in line for line in report["warnings"] for said in given_up)
    assert report["retries"] or report["duplicated"]
    two.first.digest()  # it goes on; what it had still to send must not land any more
    assert target.digest() == two.digest
    assert target.tokens() == two.tokens
    assert target.end() == [0]


def test_h26_a_killed_source_is_replaced_for_what_is_missing_alone(
    two: Two, fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    before = two.chunks()
    target = fleet.target(bare(checkpoints["big"]), "two")
    two.both_read(before)
    two.first.signal(signal.SIGKILL)
    report = target.report()
    assert report["source"] == "peer"
    assert sum(share["nbytes"] for share in report["shares"]) == report["nbytes"]
    assert report["seconds"]["transfer"] > 0
    assert target.digest() == two.digest
    assert target.tokens() == two.tokens
