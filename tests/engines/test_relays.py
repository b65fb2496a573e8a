"""Replicas that pass on what they receive while they receive it: real processes over ``tcp``, and one capped source."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine_fleet import Fleet, Watch, bare

from weightwire.errors import LoadError
from weightwire.wire.messages import PublicationState
from weightwire.wire.reports import SourceView

RATE = 20e6
"""Of the source: two seconds for one shard."""


def source_of(fleet: Fleet, checkpoints: dict[str, Path], model: str, rate: float = RATE) -> Watch:
    source = fleet.source(checkpoints["big"], model, max_rate=rate)
    source.said("loaded")
    fleet.eventually(model, lambda views: [view.record.state for view in views] == [PublicationState.READY])
    return source


def chain(fleet: Fleet, checkpoint: Path, model: str, *faults: dict[str, Any]) -> list[Watch]:
    """Targets that start one after the other, each when the one before relays: so the later read from the earlier."""
    made: list[Watch] = []
    for each in faults:
        made.append(fleet.start(checkpoint, model, faults=each))
        fleet.eventually(model, partial(relaying, len(made)))
    return made


def relaying(count: int, views: Sequence[SourceView]) -> bool:
    return sum(view.record.state is PublicationState.RELAYING for view in views) >= count


def peer(watch: Watch) -> str:
    return str(watch.said("loaded")["peer"])


def shards_from(labels: Iterable[str], reports: list[dict[str, Any]]) -> float:
    """How many shards ``reports`` took from those peers."""
    wanted = set(labels)
    taken = sum(share["nbytes"] for report in reports for share in report["shares"] if share["peer"] in wanted)
    return float(taken / reports[0]["nbytes"])


def test_h25_replicas_that_start_together_take_little_more_than_one_shard_from_a_capped_source(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    source = source_of(fleet, checkpoints, "together")
    targets = [fleet.start(bare(checkpoints["big"]), "together") for _ in range(4)]
    reports = [target.report() for target in targets]
    assert {report["source"] for report in reports} == {"peer"}
    assert shards_from([peer(source)], reports) < 2  # 1.0 to 1.1 on an idle machine; 3 without relays
    assert sum(share["relayed"] for report in reports for share in report["shares"]) > reports[0]["nbytes"]
    published: list[Any] = [target.said("loaded")["published"] for target in targets]
    assert sum(each["relayed"] for each in published) > reports[0]["nbytes"]
    assert [target.digest() for target in targets] == [source.digest()] * 4
    views = fleet.sources("together")
    assert [(view.record.state, view.record.generation) for view in views] == [(PublicationState.READY, 1)] * 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_h26_h27_h38_a_relay_that_is_gone_half_way_costs_nothing_that_was_verified(
    fleet: Fleet, checkpoints: dict[str, Path], number: signal.Signals
) -> None:
    model = f"gone-{number.name}"
    source = source_of(fleet, checkpoints, model, RATE / 2)
    first, second, third, fourth = chain(fleet, bare(checkpoints["big"]), model, {}, {}, {}, {})
    second.moved("transfer", 0.4)
    second.signal(number)
    began = time.monotonic()
    reports = [each.report() for each in (first, third, fourth)]
    assert time.monotonic() - began < 40
    assert [each.digest() for each in (first, third, fourth)] == [source.digest()] * 3
    for report in reports:
        assert sum(share["nbytes"] for share in report["shares"]) == report["nbytes"], "nothing was fetched twice"
        assert sum(share["bad_leaves"] for share in report["shares"]) == 0
    assert len([share for share in reports[1]["shares"] if share["nbytes"]]) > 1, "it was not read from at all"
    assert shards_from([peer(source)], reports) < 1.9


def test_h38_what_a_relay_has_not_verified_is_not_offered(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    """All that it reads arrives changed: nobody ever gets a byte of it, and the load fails like any other."""
    source = source_of(fleet, checkpoints, "unverified")
    bad = fleet.start(bare(checkpoints["big"]), "unverified", faults={"corrupt": True, "spans": True})
    good = fleet.start(bare(checkpoints["big"]), "unverified")
    report = good.report()
    assert sum(share["bad_leaves"] for share in report["shares"]) == 0
    assert shards_from([peer(source)], [report]) == 1
    with pytest.raises(LoadError, match="no peer"):
        bad.loaded()
    assert bad.count("span") == 0
    assert good.digest() == source.digest()


def test_h38_a_child_finds_what_its_relay_did_not(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    """A relay that takes everything for verified: its child digests for itself, and reads elsewhere."""
    source = source_of(fleet, checkpoints, "credulous", RATE / 2)
    faults = {"corrupt": True, "credulous": True, "blind": True}
    _, good = chain(fleet, bare(checkpoints["big"]), "credulous", faults, {})
    report = good.report()
    assert sum(share["bad_leaves"] for share in report["shares"] if share["relayed"] or not share["nbytes"]) > 0
    assert shards_from([peer(source)], [report]) == 1
    assert good.digest() == source.digest()


def test_h29_a_relay_that_fails_withdraws_before_its_memory_is_filled_again(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    """The source dies; the relay reads its disk, which has other weights, into the memory that its child read from.

    What is published in the end moves the generation too, and so does the scrub; both would come too late."""
    source = source_of(fleet, checkpoints, "fails", RATE / 2)
    relay, child = chain(fleet, checkpoints["other big"], "fails", {}, {})
    child.moved("transfer", 0.3)
    source.signal(signal.SIGKILL)
    reports = [relay.report(), child.report()]
    assert reports[0]["source"] == "disk"
    assert relay.said("reading")["readable"] == [], "its disk was read over what others may read"
    assert sum(share["bad_leaves"] for report in reports for share in report["shares"]) == 0
    assert relay.digest() == child.digest()
    assert relay.tokens() == child.tokens()
    (again,) = [view for view in fleet.sources("fails") if view.record.incarnation[:8] in peer(relay)]
    assert again.record.generation > 1


def test_a_full_source_sends_newcomers_to_relays(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    source = fleet.source(checkpoints["big"], "full", max_rate=RATE, max_readers=1)
    source.said("loaded")
    fleet.eventually("full", lambda views: [view.record.state for view in views] == [PublicationState.READY])
    targets = [fleet.start(bare(checkpoints["big"]), "full") for _ in range(3)]
    reports = [target.report() for target in targets]
    assert shards_from([peer(source)], reports) < 1.2
    assert [target.digest() for target in targets] == [source.digest()] * 3


def test_relaying_can_be_switched_off(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    source = source_of(fleet, checkpoints, "off")
    targets = [fleet.start(bare(checkpoints["big"]), "off", relay=False) for _ in range(2)]
    reports = [target.report() for target in targets]
    # from whole replicas alone: the source, or a target that was complete before the other one began
    assert sum(share["relayed"] for report in reports for share in report["shares"]) == 0
    assert shards_from([peer(source), *map(peer, targets)], reports) == 2
    assert {report["source"] for report in reports} == {"peer"}


@pytest.mark.nixl
def test_h38_relays_over_nixl_read_what_is_verified_and_nothing_else(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    """Nobody asks a relay before it reads its memory: children keep to what it says, and digest all that they read."""
    pytest.importorskip("nixl")
    env = {"WEIGHTWIRE_TRANSPORTS": "nixl"}
    source = fleet.source(checkpoints["big"], "nixl", max_rate=RATE, env=env | {"WEIGHTWIRE_ROLE": "source"})
    source.said("loaded")
    fleet.eventually("nixl", lambda views: [view.record.state for view in views] == [PublicationState.READY])
    targets = [fleet.start(bare(checkpoints["big"]), "nixl", env=env) for _ in range(3)]
    reports = [target.report() for target in targets]
    assert all(path.startswith("nixl/") for report in reports for path in report["paths"])
    assert sum(share["bad_leaves"] for report in reports for share in report["shares"]) == 0
    assert shards_from([peer(source)], reports) < 2  # 1.0 to 1.1 on an idle machine; 3 without relays
    assert [target.digest() for target in targets] == [source.digest()] * 3
