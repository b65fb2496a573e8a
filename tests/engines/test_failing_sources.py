"""Sources that die, freeze, lie or change their bytes while a replica reads from them."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_fleet import Fleet, Watch, bare

SLOW = {"throttle_s": 0.15}


@dataclass
class Two:
    """Two slow sources of one model."""

    first: Watch
    second: Watch
    tokens: list[list[int]]
    digest: list[list[str]]


@pytest.fixture(scope="module")
def two(crew: Fleet, checkpoints: dict[str, Path]) -> Two:
    first, second = (crew.source(checkpoints["big"], "two", faults=SLOW) for _ in range(2))
    for each in (first, second):
        each.loaded()
    return Two(first, second, first.tokens(), first.digest())


def test_h27_a_frozen_source_is_given_up_and_the_rest_comes_from_another(
    two: Two, fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    target = fleet.target(bare(checkpoints["big"]), "two", env={"WEIGHTWIRE_STALL_TIMEOUT": "2"})
    target.moved("transfer", 0.2)
    two.first.signal(signal.SIGSTOP)
    try:
        report = target.report()
    finally:
        two.first.signal(signal.SIGCONT)
    assert report["source"] == "peer"
    assert len(report["shares"]) == 2
    assert min(share["nbytes"] for share in report["shares"]) > 0
    assert any("was dropped" in line for line in report["warnings"])
    assert report["retries"] > 0
    two.first.digest()  # it goes on; what it had still to send must not land any more
    assert target.digest() == two.digest
    assert target.tokens() == two.tokens
    assert target.end() == [0]


def test_h26_a_killed_source_is_replaced_for_what_is_missing_alone(
    two: Two, fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    target = fleet.target(bare(checkpoints["big"]), "two")
    target.moved("transfer", 0.3)
    two.first.signal(signal.SIGKILL)
    report = target.report()
    assert report["source"] == "peer"
    assert [share["nbytes"] > 0 for share in report["shares"]] == [True, True]
    assert sum(share["nbytes"] for share in report["shares"]) == report["nbytes"]
    assert report["seconds"]["transfer"] > 0
    assert target.digest() == two.digest
    assert target.tokens() == two.tokens
