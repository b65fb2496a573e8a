from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from metadata_fleet import TTL, Clock, Fleet
from wire_samples import rank

from weightwire.errors import ConfigError, MetadataError, ProtocolError
from weightwire.metadata.registry import Registry, Times
from weightwire.metadata.store.memory import MemoryStore
from weightwire.types import Stage
from weightwire.wire.messages import CheckResult, KeepBeat
from weightwire.wire.messages import PublicationState as S
from weightwire.wire.reports import FailureKind, PeerFailure


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


# What may be chosen ---------------------------------------------------------------------------------------------------


def test_h42_a_replica_of_which_only_some_ranks_have_published_is_never_chosen(fleet: Fleet) -> None:
    fleet.publish(rank(0, "a"))
    assert fleet.find().groups == ()
    assert "only 1 of 2 ranks" in fleet.find().rejected[0].reason
    assert fleet.shard(0) == []
    fleet.publish(rank(1, "b"))  # a rank of another replica does not complete it
    assert fleet.find().groups == ()
    fleet.publish(rank(1, "a"))
    assert [offer.replica_incarnation for group in fleet.find().groups for offer in group.replicas] == ["a"]
    fleet.withdraw(rank(0, "a"))
    assert fleet.find().groups == ()
    assert fleet.shard(1) == []


def test_h42_a_replica_with_a_rank_that_is_not_ready_is_not_offered(fleet: Fleet) -> None:
    for state in (S.LOADING, S.HELD, S.PAUSED, S.RELAYING):
        fleet = Fleet()
        fleet.publish(rank(0, "a"), rank(1, "a", state=state))
        assert fleet.find().groups == ()
        assert fleet.find().loading[0].state is state


def test_h41_ranks_and_replicas_have_one_record_each(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.replica("b")
    fleet.publish(rank(0, "a", sequence=2, active_reads=1))
    views = fleet.registry.sources("")
    assert sorted(view.record.incarnation for view in views) == ["a-0", "a-1", "b-0", "b-1"]


def test_h57_h58_weights_are_grouped_and_ranks_of_other_weights_are_never_mixed(fleet: Fleet) -> None:
    fleet.replica("old")
    fleet.replica("new", weights_id="fine-tuned", ordinal=2, revision="def")
    groups = {group.weights_id: group for group in fleet.find().groups}
    assert set(groups) == {"weights", "fine-tuned"}
    assert groups["fine-tuned"].revisions == ("def",)
    assert fleet.shard(0, "weights") == ["old-0"]
    assert fleet.shard(1, "fine-tuned") == ["new-1"]
    fleet.publish(rank(0, "mixed"), rank(1, "mixed", weights_id="fine-tuned"))
    assert "mixed" not in {o.replica_incarnation for g in fleet.find().groups for o in g.replicas}
    assert any("different weights ids" in item.reason for item in fleet.find().rejected)


def test_another_stage_is_never_reported_as_nothing(fleet: Fleet) -> None:
    fleet.replica("p", replica_key="processed-key", stage=Stage.PROCESSED)
    listing = fleet.find()
    assert listing.groups == ()
    assert [(other.stage, other.state, other.ranks) for other in listing.others] == [(Stage.PROCESSED, S.READY, 2)]
    assert listing.others[0].identity


def test_what_could_be_resharded_is_not_crowded_out_by_what_could_not(fleet: Fleet) -> None:
    for number in range(20):
        fleet.replica(f"p{number:02}", replica_key=f"processed-{number}", family_key="processed", stage=Stage.PROCESSED)
    fleet.replica("loading", replica_key="other-size", state=S.LOADING, weights_id="", content_id="")
    fleet.replica("ready", replica_key="other-size-too")
    others = fleet.find("wanted", family_keys=("family",)).others
    assert len(others) == 16
    assert [other.replica_incarnation for other in others[:3]] == ["ready", "loading", "p00"]


def test_the_asker_is_left_out_and_only_earlier_replicas_are_worth_waiting_for(fleet: Fleet) -> None:
    loading = {"state": S.LOADING, "fraction": 0.0, "bytes_done": 0}
    fleet.replica("first", **loading)
    fleet.replica("second", **loading)
    earlier = {
        asker: {item.replica_incarnation: item.earlier for item in fleet.find(replica_incarnation=asker).loading}
        for asker in ("first", "second", "nobody")
    }
    assert earlier == {
        "first": {"second": False},
        "second": {"first": True},
        "nobody": {"first": True, "second": True},
    }


def test_h24_a_loading_replica_shows_its_progress_and_its_silence(fleet: Fleet) -> None:
    fleet.replica("a", state=S.LOADING, fraction=0.0, bytes_done=0)
    fleet.clock.now += 4
    halves = [rank(n, "a", state=S.LOADING, fraction=0.5 + n / 4, bytes_done=500) for n in (0, 1)]
    fleet.beat(*halves)
    fleet.clock.now += 3
    fleet.beat(*halves)  # alive, but no progress
    item = fleet.find().loading[0]
    assert (item.fraction, item.elapsed_s, item.quiet_s, item.live, item.ranks) == (0.5, 7, 3, True, 2)
    fleet.registry.keep_ended("s")
    assert not fleet.find().loading[0].live
    fleet.clock.now += TTL
    assert fleet.find().loading == ()


# Leases ---------------------------------------------------------------------------------------------------------------


def test_h34_a_broken_stream_makes_its_leases_suspect_at_once_and_the_ttl_ends_them(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.replica("b")
    fleet.beat(rank(0, "a"), rank(1, "a"), stream="sa")
    fleet.beat(rank(0, "b"), rank(1, "b"), stream="sb")
    assert fleet.shard() == ["a-0", "b-0"]
    fleet.registry.keep_ended("sa")
    assert fleet.shard() == ["b-0", "a-0"]
    assert [offer.suspect for offer in fleet.find().groups[0].replicas] == [False, True]
    fleet.clock.now += TTL * 0.9
    fleet.beat(rank(0, "b"), rank(1, "b"), stream="sb")
    fleet.clock.now += TTL * 0.2
    assert fleet.shard() == ["b-0"]
    assert fleet.registry.sweep() == 2
    assert len(fleet.store.slots()) == 2
    fleet.clock.now += 5 * TTL
    fleet.registry.sweep()
    assert fleet.store.slots() == []


def test_a_new_stream_takes_leases_over_and_the_end_of_the_old_one_means_nothing_then(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.beat(rank(0, "a"), rank(1, "a"), stream="old")
    fleet.beat(rank(0, "a"), rank(1, "a"), stream="new")
    assert fleet.registry.keep_ended("old") == 0
    assert not fleet.find().groups[0].replicas[0].suspect


def test_unknown_leases_are_named(fleet: Fleet) -> None:
    fleet.replica("a")
    lease = fleet.leases["shard-0", "a-0"].lease_id
    fleet.clock.now += TTL
    assert fleet.beat(rank(0, "a")) == (lease,)
    fleet.registry.sweep()
    assert fleet.beat(rank(0, "a")) == (lease,)


def test_h28_the_old_record_of_an_address_never_serves_again(fleet: Fleet) -> None:
    fleet.replica("old")
    endpoints = {"endpoints": ("old:1000",)}
    fleet.publish(rank(0, "new", **endpoints), rank(1, "new"))
    fleet.beat(rank(0, "old"), rank(1, "old"))  # whoever still keeps it
    assert fleet.shard() == ["new-0"]
    assert [offer.replica_incarnation for offer in fleet.find().groups[0].replicas] == ["new"]
    assert any("belongs to a later process" in item.reason for item in fleet.find().rejected)


# Late messages --------------------------------------------------------------------------------------------------------


def test_h68_late_and_repeated_messages_do_not_revive_what_was_withdrawn(fleet: Fleet) -> None:
    record = rank(0, "a", sequence=5, generation=2)
    fleet.publish(record)
    lease = fleet.leases["shard-0", "a-0"].lease_id
    fleet.withdraw(record)
    with pytest.raises(MetadataError, match="was withdrawn"):
        fleet.registry.publish(record)
    with pytest.raises(MetadataError, match="was withdrawn"):
        fleet.registry.publish(dataclasses.replace(record, sequence=6))
    assert fleet.beat(record) == (lease,)
    fleet.clock.now += 1.9 * TTL
    with pytest.raises(MetadataError, match="was withdrawn"):
        fleet.registry.publish(record)
    assert fleet.registry.sources("") == []


def test_h68_a_withdrawal_that_overtook_its_publish_wins(fleet: Fleet) -> None:
    record = rank(0, "a", sequence=5)
    fleet.withdraw(record)
    with pytest.raises(MetadataError, match="was withdrawn"):
        fleet.registry.publish(record)


def test_h68_a_late_withdrawal_does_not_end_a_later_publication(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.withdraw(rank(0, "a"))
    fleet.publish(rank(0, "a", generation=2, sequence=3))
    fleet.withdraw(rank(0, "a"))  # repeated
    assert len(fleet.find().groups) == 1


def test_h68_a_late_publish_or_beat_does_not_undo_a_later_one(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.publish(rank(0, "a", sequence=4, generation=2, state=S.PAUSED))
    for late in (rank(0, "a"), rank(0, "a", sequence=9), rank(0, "a", sequence=4, generation=2, state=S.HELD)):
        with pytest.raises(MetadataError, match="later message"):
            fleet.registry.publish(late)
    assert fleet.beat(rank(0, "a", sequence=3)) == ()
    assert fleet.registry.sources("")[0].record.state is S.PAUSED
    fleet.publish(rank(0, "a", sequence=4, generation=2, state=S.PAUSED))  # a repeated message is harmless


def test_h68_an_empty_start_warms_up_for_one_ttl() -> None:
    fleet = Fleet(warm=False)
    fleet.replica("a")
    assert fleet.find().warming_s == TTL
    fleet.clock.now += TTL
    assert not fleet.find().warming


def test_a_beat_that_overtakes_its_publish_keeps_the_lease_but_is_not_believed(fleet: Fleet) -> None:
    bare = {"content_id": "", "weights_id": "", "state": S.LOADING}
    fleet.publish(rank(0, "a", **bare))
    assert fleet.beat(rank(0, "a", sequence=2)) == ()
    assert fleet.registry.sources("")[0].record.state is S.LOADING


@pytest.mark.parametrize(
    "changes",
    [
        {"state": S.WITHDRAWN},
        {"content_id": ""},
        {"weights_id": ""},
        {"endpoints": ()},
        {"world_size": 1},
        {"incarnation": ""},
    ],
)
def test_records_that_contradict_themselves_are_refused(fleet: Fleet, changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        fleet.registry.publish(rank(0, "a", **changes))


def test_bounds() -> None:
    registry = Registry(MemoryStore(max_slots=1), Clock())
    registry.publish(rank(0, "a"))
    with pytest.raises(MetadataError, match="holds 1 records"):
        registry.publish(rank(1, "a"))
    with pytest.raises(ConfigError, match="TTL"):
        Times(ttl_s=0)


# Reports --------------------------------------------------------------------------------------------------------------


def test_h54_one_report_lowers_the_rank_for_everybody_and_has_the_leaf_digested_again(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.replica("b")
    answer = fleet.report("a", "host-1")
    assert (answer.counted, answer.quarantined) == (True, False)
    assert fleet.shard() == ["b-0", "a-0"]
    assert fleet.rechecks("a") == [4]
    assert fleet.rechecks("a") == []


def test_h54_a_failed_self_check_quarantines(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.report("a", "host-1")
    lease = fleet.leases["shard-0", "a-0"].lease_id
    fleet.registry.keep("s", KeepBeat(updates=(), checks=(CheckResult(lease_id=lease, leaf=4, ok=False),)))
    assert fleet.shard() == []
    assert fleet.find().groups == ()
    assert any("quarantined" in item.reason for item in fleet.find().rejected)
    fleet.publish(rank(0, "a", generation=2, sequence=2))  # other bytes, another judgement
    assert fleet.shard() == ["a-0"]


def test_h54_two_reporters_on_two_hosts_quarantine_until_their_reports_expire(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.report("a", "host-1")
    assert fleet.report("a", "host-2").quarantined
    assert fleet.shard() == []
    for _ in range(31):
        fleet.clock.now += TTL * 0.99
        fleet.beat(rank(0, "a"), rank(1, "a"))
    assert fleet.shard() == ["a-0"]


def test_h69_one_host_alone_quarantines_nothing_however_often_it_reports(fleet: Fleet) -> None:
    fleet.replica("a")
    for number in range(100):
        assert not fleet.report("a", "host-1", reporter=f"process-{number}", leaf=number).quarantined
    assert fleet.shard() == ["a-0"]
    assert len(fleet.rechecks("a")) <= 16
    assert fleet.registry.sources("")[0].reports == 1


def test_h69_a_source_that_digests_right_is_cleared_of_one_hosts_report(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.replica("b")
    fleet.report("a", "host-1")
    lease = fleet.leases["shard-0", "a-0"].lease_id
    fleet.registry.keep("s", KeepBeat(updates=(), checks=(CheckResult(lease_id=lease, leaf=4, ok=True),)))
    assert fleet.shard() == ["a-0", "b-0"]


def test_h69_a_host_that_accuses_several_machines_suspects_itself(fleet: Fleet) -> None:
    for life in ("a", "b", "c"):
        fleet.replica(life)
        fleet.report(life, "bad-memory")
    fleet.report("a", "host-2")
    assert not fleet.registry.sources("")[0].quarantined
    assert "at fault" in fleet.report("b", "bad-memory").reason
    assert fleet.report("a", "host-3").quarantined  # two hosts that accuse only this one


def test_h69_the_observed_address_counts_not_the_claimed_name(fleet: Fleet) -> None:
    fleet.replica("a")
    failure = PeerFailure(
        shard_key="shard-0",
        incarnation="a-0",
        generation=1,
        kind=FailureKind.MISMATCH,
        leaf=1,
        reporter="r",
        reporter_host="claimed-1",
    )
    fleet.registry.report(failure, "10.0.0.9")
    answer = fleet.registry.report(dataclasses.replace(failure, reporter_host="claimed-2"), "10.0.0.9")
    assert not answer.quarantined


def test_h69_no_blame_once_the_generation_has_moved(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.publish(rank(0, "a", generation=2, sequence=2))
    answer = fleet.report("a", "host-1")
    assert (answer.counted, answer.reason) == (False, "its generation has moved since: no blame")
    assert not fleet.report("nobody", "host-1").counted


def test_dead_and_slow_sources_are_ranked_lower_but_never_quarantined(fleet: Fleet) -> None:
    fleet.replica("a")
    fleet.replica("b")
    for host in ("host-1", "host-2", "host-3"):
        assert not fleet.report("a", host, kind=FailureKind.STALLED, leaf=-1).quarantined
    assert fleet.shard() == ["b-0", "a-0"]
    assert fleet.rechecks("a") == []
