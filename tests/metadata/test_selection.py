from __future__ import annotations

import dataclasses
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from wire_samples import rank

from weightwire.metadata.selection import (
    Chosen,
    Conflict,
    Nothing,
    Policy,
    Unpinned,
    Warming,
    choose,
    expected_s,
    worth_waiting,
)
from weightwire.metadata.selection import rank as order
from weightwire.metadata.slots import Slot
from weightwire.metadata.standing import Standing
from weightwire.types import Role, Stage
from weightwire.wire.messages import (
    LoadingReplica,
    OtherReplica,
    PublicationState,
    Rejection,
    ReplicaListing,
    ReplicaOffer,
    WeightsGroup,
)

GOOD = Standing(suspect=False, reports=0, quarantine="")


def slot(life: str, **changes: Any) -> Slot:
    record = rank(0, life, **changes)
    return Slot(shard_key="shard-0", incarnation=record.incarnation, generation=1, sequence=1, record=record)


def group(weights: str, **changes: Any) -> WeightsGroup:
    offer = ReplicaOffer(
        replica_key="loaded",
        replica_incarnation=weights,
        stage=Stage.LOADED,
        revision="abc",
        ordinal=0,
        world_size=2,
        nbytes=1,
        suspect=False,
        reports=0,
        active_reads=0,
    )
    base = WeightsGroup(
        replica_key="loaded", stage=Stage.LOADED, weights_id=weights, ordinal=0, revisions=("abc",), replicas=(offer,)
    )
    return dataclasses.replace(base, **changes)


def loading(**changes: Any) -> LoadingReplica:
    base = LoadingReplica(
        replica_key="loaded",
        replica_incarnation="a",
        stage=Stage.LOADED,
        revision="abc",
        state=PublicationState.LOADING,
        weights_id="",
        world_size=2,
        ranks=2,
        fraction=0.5,
        bytes_done=1,
        nbytes=2,
        elapsed_s=10,
        quiet_s=1,
        live=True,
        earlier=True,
    )
    return dataclasses.replace(base, **changes)


def test_the_order_of_candidates() -> None:
    relaying = {"state": PublicationState.RELAYING, "fraction": 0.5}
    found = [
        (slot("quarantined"), Standing(suspect=False, reports=0, quarantine="its bytes changed")),
        (slot("suspect"), Standing(suspect=True, reports=0, quarantine="")),
        (slot("reported"), Standing(suspect=False, reports=1, quarantine="")),
        (slot("busy", active_reads=3), GOOD),
        (slot("busy-relay", active_reads=1, **relaying), GOOD),
        (slot("replica"), GOOD),
        (slot("relay", **relaying), GOOD),
        (slot("relay-further", **(relaying | {"fraction": 0.9})), GOOD),
    ]
    names = [candidate.record.replica_incarnation for candidate in order(found)]
    assert names == ["relay-further", "relay", "replica", "busy-relay", "busy", "reported", "suspect"]
    assert all(candidate.reason for candidate in order(found))


def test_h25_newcomers_form_a_chain_and_nobody_is_sent_to_who_may_be_waiting_for_it() -> None:
    relaying = {"state": PublicationState.RELAYING, "fraction": 0.5}
    found = [
        (dataclasses.replace(slot(name, **relaying), arrival=at, relayed=at), GOOD)
        for at, name in enumerate(("first", "second", "third", "fourth"), start=1)
    ]
    found.append((dataclasses.replace(slot("source", active_reads=4), arrival=9), GOOD))

    def names(asker: int | None) -> list[str]:
        return [candidate.record.replica_incarnation for candidate in order(found, asker)]

    assert names(5) == ["fourth", "third", "first", "second", "source"]
    assert names(3) == ["second", "first", "third", "source", "fourth"]
    assert names(0) == ["source", "first", "fourth", "second", "third"]
    assert names(None) == ["first", "fourth", "second", "third", "source"]


@given(st.permutations([(slot(life, active_reads=n % 2), GOOD) for n, life in enumerate("abcdef")]))
def test_the_order_depends_on_nothing_but_the_candidates(found: list[tuple[Slot, Standing]]) -> None:
    assert "".join(c.record.replica_incarnation for c in order(found)) == "acebdf"


def test_a_pinned_or_named_source_is_taken_and_an_unpinned_one_only_where_that_is_accepted() -> None:
    listing = ReplicaListing(groups=(group("w1"),))
    assert choose(listing, Policy(weights_id="w1")) == Chosen(group("w1"), unpinned=False)
    assert choose(listing, Policy(revision="abc")) == Chosen(group("w1"), unpinned=False)
    assert choose(listing, Policy(accept_unpinned=True)) == Chosen(group("w1"), unpinned=True)


def test_h57_an_unpinned_name_is_not_enough_even_for_the_only_source() -> None:
    outcome = choose(ReplicaListing(groups=(group("w1"),)), Policy())
    assert outcome == Unpinned(group("w1"))
    assert "w1" in outcome.describe()


def test_h57_another_revision_or_weights_id_is_nothing_with_the_reason() -> None:
    listing = ReplicaListing(groups=(group("w1"),))
    for policy in (Policy(revision="def"), Policy(weights_id="w2")):
        outcome = choose(listing, policy)
        assert isinstance(outcome, Nothing)
        assert "w1" in outcome.describe()
        assert "not " in outcome.describe()


def test_h57_several_weights_are_a_conflict_unless_pinned_or_the_latest_is_asked_for() -> None:
    listing = ReplicaListing(groups=(group("w1", ordinal=1), group("w2", ordinal=2)))
    outcome = choose(listing, Policy(accept_unpinned=True))
    assert isinstance(outcome, Conflict)
    assert "w1" in outcome.describe()
    assert "w2" in outcome.describe()
    assert choose(listing, Policy(weights_id="w1")) == Chosen(listing.groups[0], unpinned=False)
    latest = choose(listing, Policy(latest=True, revision="abc"))
    assert latest == Chosen(listing.groups[1], unpinned=False)
    tied = ReplicaListing(groups=(group("w1", ordinal=2), group("w2", ordinal=2)))
    assert isinstance(choose(tied, Policy(latest=True, revision="abc")), Conflict)


def test_a_revision_can_tell_weights_apart() -> None:
    listing = ReplicaListing(groups=(group("w1"), group("w2", revisions=("def",))))
    assert choose(listing, Policy(revision="def")) == Chosen(listing.groups[1], unpinned=False)


def test_h68_while_warming_only_pinned_weights_are_taken() -> None:
    listing = ReplicaListing(groups=(group("w1"),), warming_s=3)
    assert choose(listing, Policy(revision="abc")) == Warming(3, listing.groups)
    assert choose(listing, Policy(weights_id="w1")) == Chosen(group("w1"), unpinned=False)
    empty = choose(ReplicaListing(groups=(), warming_s=3), Policy())
    assert isinstance(empty, Nothing)
    assert empty.warming_s == 3


def test_stages_are_tried_in_order_of_preference_and_do_not_conflict_with_each_other() -> None:
    processed = group("w1", replica_key="processed", stage=Stage.PROCESSED)
    listing = ReplicaListing(groups=(processed, group("w1")))
    assert choose(listing, Policy(weights_id="w1")) == Chosen(processed, unpinned=False)


def test_nothing_says_what_there_is_instead() -> None:
    other = OtherReplica(
        replica_key="k",
        family_key="f",
        replica_incarnation="r",
        stage=Stage.PROCESSED,
        role=Role.TARGET,
        state=PublicationState.READY,
        revision="",
        world_size=1,
        ranks=1,
        identity="{}",
    )
    rejection = Rejection(subject="replica x", reason="only 1 of 2 ranks have published")
    listing = ReplicaListing(groups=(), others=(other,), rejected=(rejection,), loading=(loading(),))
    outcome = choose(listing, Policy())
    assert isinstance(outcome, Nothing)
    text = outcome.describe()
    assert "PROCESSED (READY)" in text
    assert "only 1 of 2" in text
    assert "1 replicas still loading" in text
    nothing = choose(ReplicaListing(groups=()), Policy())
    assert isinstance(nothing, Nothing)
    assert nothing.describe() == "nobody serves this model"


def test_h24_waiting_only_for_live_progress_that_beats_the_own_disk() -> None:
    good = loading()
    assert worth_waiting([good], own_disk_s=11, patience_s=5) == good
    assert worth_waiting([good], own_disk_s=9, patience_s=5) is None
    for hopeless in ({"live": False}, {"quiet_s": 6}, {"fraction": 0.0}, {"earlier": False}):
        assert worth_waiting([loading(**hopeless)], own_disk_s=math.inf, patience_s=5) is None
    assert worth_waiting([], own_disk_s=math.inf, patience_s=5) is None
    sooner = loading(replica_incarnation="b", fraction=0.9)
    assert worth_waiting([good, sooner], own_disk_s=math.inf, patience_s=5) == sooner
    assert expected_s(loading(state=PublicationState.HELD)) == 0
