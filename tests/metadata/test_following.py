"""Which replica that is still reading its disk is followed, who can then be read, and what is refused in the end."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from metadata_fleet import TTL, Fleet
from wire_samples import rank

from weightwire.errors import ProtocolError
from weightwire.metadata.selection import Policy, after_following, to_follow
from weightwire.types import Stage
from weightwire.wire.messages import FindShard, ReplicaListing, ReplicaOffer, WeightsGroup
from weightwire.wire.messages import PublicationState as S

PATIENCE_S = 10.0
NAMED = Policy(revision="abc")


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def reading(life: str, **changes: Any) -> dict[str, Any]:
    """Fields of a replica that reads its disk and offers what is final."""
    fields = {"state": S.RELAYING, "weights_id": "", "content_id": "", "following": life, "fraction": 0.3, "nbytes": 0}
    return fields | {"bytes_done": 300} | changes


def followed(fleet: Fleet, asker: str = "", policy: Policy = NAMED) -> str:
    found = to_follow(fleet.find(replica_incarnation=asker).loading, policy, PATIENCE_S)
    return found.replica_incarnation if found else ""


def test_the_first_that_reads_its_disk_is_followed_once_all_its_ranks_can_be_read(fleet: Fleet) -> None:
    fleet.publish(rank(0, "a", **reading("a")), rank(1, "a", **reading("a", state=S.LOADING)))
    assert followed(fleet) == ""
    fleet.publish(rank(1, "a", **reading("a", sequence=2)))
    fleet.replica("b", **reading("b"))
    assert followed(fleet) == "a"
    fleet.publish(rank(0, "a", following="a", sequence=3))  # one rank is through, the other is not
    assert followed(fleet) == "a"
    fleet.publish(rank(1, "a", following="a", sequence=3))
    assert [group.weights_id for group in fleet.find().groups] == ["weights"]


def test_h25_only_an_earlier_one_is_followed_so_that_two_never_follow_each_other(fleet: Fleet) -> None:
    for life in ("a", "b", "c"):
        fleet.replica(life, **reading(life, state=S.LOADING))
    assert {asker: followed(fleet, asker) for asker in ("a", "b", "c")} == {"a": "", "b": "", "c": ""}
    for life in ("a", "b", "c"):
        fleet.replica(life, **reading(life, sequence=2))
    assert {asker: followed(fleet, asker) for asker in ("a", "b", "c")} == {"a": "", "b": "a", "c": "a"}


def test_a_follower_is_never_followed_for_itself(fleet: Fleet) -> None:
    fleet.replica("a", **reading("a"))
    fleet.replica("b", **reading("a"))
    assert followed(fleet) == "a"
    for number in (0, 1):
        fleet.withdraw(rank(number, "a"))
    assert followed(fleet) == ""


def test_one_that_is_silent_or_lost_sight_of_is_not_followed(fleet: Fleet) -> None:
    fleet.replica("a", **reading("a"))
    fleet.clock.now += TTL / 2
    fleet.beat(*(rank(number, "a", **reading("a")) for number in (0, 1)))
    assert followed(fleet) == "a"
    fleet.clock.now += TTL / 2
    fleet.beat(*(rank(number, "a", **reading("a")) for number in (0, 1)))
    assert to_follow(fleet.find().loading, NAMED, TTL / 2) is None
    fleet.registry.keep_ended("s")
    assert followed(fleet) == ""


def test_h57_what_the_operator_demands_holds_for_what_is_followed(fleet: Fleet) -> None:
    fleet.replica("a", **reading("a", revision="old"))
    fleet.replica("b", **reading("b", revision="abc"))
    assert followed(fleet, policy=Policy(revision="abc")) == "b"
    assert followed(fleet, policy=Policy(revision="def")) == ""
    assert followed(fleet, policy=Policy()) == ""
    assert followed(fleet, policy=Policy(accept_unpinned=True)) == "a"
    assert followed(fleet, policy=Policy(weights_id="w")) == "a"
    assert followed(fleet, policy=Policy(revision="abc", latest=True)) == ""


def test_all_who_follow_one_replica_can_be_read_whether_they_know_its_weights_or_not(fleet: Fleet) -> None:
    fleet.replica("a", **reading("a"))
    fleet.replica("b", **reading("a"))
    fleet.replica("c", **reading("c"))
    fleet.replica("whole")
    find = FindShard(shard_key="shard-0", weights_id="", following="a", exclude=("b-0",))
    assert [each.record.incarnation for each in fleet.registry.find_shard(find).candidates] == ["a-0"]
    fleet.publish(rank(0, "a", following="a", sequence=2))
    found = fleet.registry.find_shard(dataclasses.replace(find, exclude=())).candidates
    assert {each.record.incarnation for each in found} == {"a-0", "b-0"}
    assert fleet.shard(0) == ["a-0", "whole-0"] or fleet.shard(0) == ["whole-0"]


def test_nobody_is_found_by_weights_that_nobody_knows(fleet: Fleet) -> None:
    fleet.replica("a", **reading("a"))
    assert fleet.registry.find_shard(FindShard(shard_key="shard-0", weights_id="")).candidates == ()


def test_what_has_no_ids_is_readable_only_while_it_is_being_read_from_a_disk(fleet: Fleet) -> None:
    for wrong in (reading("", following=""), reading("a", state=S.READY), reading("a", endpoints=())):
        with pytest.raises(ProtocolError, match="needs its content id"):
            fleet.publish(rank(0, "a", **wrong))


# ---- in the end


def ready(weights: str, ordinal: int = 0, revision: str = "abc") -> WeightsGroup:
    offer = ReplicaOffer(
        replica_key="loaded",
        replica_incarnation=weights,
        stage=Stage.LOADED,
        revision=revision,
        ordinal=ordinal,
        world_size=1,
        nbytes=1,
        suspect=False,
        reports=0,
        active_reads=0,
    )
    return WeightsGroup(
        replica_key="loaded",
        stage=Stage.LOADED,
        weights_id=weights,
        ordinal=ordinal,
        revisions=(revision,),
        replicas=(offer,),
    )


def test_h57_what_became_ready_meanwhile_is_a_conflict_as_if_it_had_been_there_before() -> None:
    ours, none = ReplicaListing(groups=(ready("w1"),)), ReplicaListing(groups=())
    both = ReplicaListing(groups=(ready("w1", 1), ready("w2", 2)))
    assert after_following("w1", ours, NAMED) == ""
    assert after_following("w1", none, NAMED) == ""
    assert "2 different weights" in after_following("w1", both, NAMED)
    assert "other weights became ready" in after_following("w1", ReplicaListing(groups=(ready("w2"),)), NAMED)
    assert after_following("w1", both, Policy(weights_id="w1")) == ""
    assert "w2" in after_following("w1", both, Policy(revision="abc", latest=True))
    assert after_following("w2", both, Policy(revision="abc", latest=True)) == ""
    assert after_following("w1", ReplicaListing(groups=(ready("w1"), ready("w2", revision="x"))), NAMED) == ""


def test_a_pinned_weights_id_that_the_followed_replica_does_not_hold_is_refused() -> None:
    listing = ReplicaListing(groups=(ready("w1"),))
    assert "not the pinned weights w2" in after_following("w1", listing, Policy(weights_id="w2"))
