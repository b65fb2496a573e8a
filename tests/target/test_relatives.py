"""Which listed replicas may be resharded: only what our own identity names at another size."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from weightwire.identity.identity import Identity
from weightwire.target.offer import Want
from weightwire.target.relatives import MAX_RELATIVES, relatives
from weightwire.types import Coordinates, Role, Stage
from weightwire.wire.messages import OtherReplica, PublicationState

OURS = Identity(model_id="m", architecture="A", dtype="bfloat16", engine="e", tp_size=2)


def want(identity: Identity = OURS, **changes: Any) -> Want:
    base = Want(stages={identity.stage: identity}, coordinates=Coordinates(tp_size=identity.tp_size), reshard=True)
    return dataclasses.replace(base, **changes)


def listed(tp: int = 4, like: Identity = OURS, **changes: Any) -> OtherReplica:
    there = dataclasses.replace(like, tp_size=tp)
    base = OtherReplica(
        replica_key=there.replica_key,
        family_key=there.family_key,
        replica_incarnation="life",
        stage=there.stage,
        role=Role.TARGET,
        state=PublicationState.READY,
        revision="",
        world_size=tp,
        ranks=tp,
        identity="{}",
    )
    return dataclasses.replace(base, **changes)


def test_relatives_are_found_by_their_keys_the_most_ranks_first() -> None:
    found = relatives(want(), [listed(1), listed(4), listed(3), listed(4)])
    assert list(found.values()) == [4, 3, 1]
    assert found[listed(4).replica_key] == 4


@pytest.mark.parametrize(
    "other",
    [
        listed(2),
        listed(4, state=PublicationState.LOADING),
        listed(4, stage=Stage.PROCESSED),
        listed(4, like=dataclasses.replace(OURS, dtype="float16")),
        listed(4, family_key=OURS.family_key, replica_key="f" * 64),
        listed(4, world_size=3),
        listed(4, world_size=0),
        listed(4, like=dataclasses.replace(OURS, pp_size=2)),
        listed(65),
    ],
    ids=["ours", "loading", "processed", "dtype", "claimed", "miscounted", "empty", "pipelined", "too many"],
)
def test_h43_anything_else_is_no_relative(other: OtherReplica) -> None:
    assert relatives(want(), [other]) == {}


def test_nothing_is_resharded_that_was_not_asked_for_or_is_not_raw() -> None:
    processed = dataclasses.replace(OURS, stage=Stage.PROCESSED, layout_id="kernel")
    assert relatives(want(reshard=False), [listed(4)]) == {}
    assert relatives(want(processed), [listed(4, like=processed)]) == {}
    assert relatives(want(dataclasses.replace(OURS, pp_size=2)), [listed(4)]) == {}
    assert len(relatives(want(), [listed(tp) for tp in range(3, 40)])) == MAX_RELATIVES
