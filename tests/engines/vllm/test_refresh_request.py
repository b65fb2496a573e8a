"""What a refresh is asked for, which weights that is, and whether there is room: without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weightwire.engines.vllm.staging import Held, Memory, Request, check_state, pick
from weightwire.errors import ConfigError, ManifestMismatch, NoSourceError, PublishError, WeightsConflict
from weightwire.types import Stage
from weightwire.wire.messages import ReplicaListing, WeightsGroup

ID = {ordinal: f"{ordinal:064x}" for ordinal in range(10)}
NOW = Held(ordinal=2, weights_id=ID[2])


def listing(*ordinals: int, warming_s: float = 0.0, other: str = "") -> ReplicaListing:
    """Complete replicas of these ordinals; with ``other``, one more of the last ordinal."""
    groups = [group(ordinal, ID[ordinal]) for ordinal in ordinals]
    groups += [group(ordinals[-1], other)] if other else []
    return ReplicaListing(groups=tuple(groups), warming_s=warming_s)


def group(ordinal: int, weights_id: str) -> WeightsGroup:
    return WeightsGroup(
        replica_key="k", stage=Stage.LOADED, weights_id=weights_id, ordinal=ordinal, revisions=("r",), replicas=()
    )


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (None, "update_info cannot be 'None'"),
        ([{"ordinal": 1}], "update_info cannot be"),
        ({}, "does not name one thing"),
        ({"ordinal": 1, "latest": True}, "does not name one thing"),
        ({"ordinal": 1, "abandon": True}, "does not name one thing"),
        ({"latest": False}, "does not name one thing"),
        ({"ordinl": 1}, "unknown key 'ordinl'"),
        ({"ordinal": -1}, "ordinal cannot be '-1'"),
        ({"ordinal": True}, "ordinal cannot be 'True'"),
        ({"ordinal": "2"}, "ordinal cannot be '2'"),
        ({"ordinal": 1 << 63}, "ordinal cannot be"),
        ({"weights_id": "ABC"}, "weights_id cannot be 'ABC'"),
        ({"weights_id": 5}, "weights_id cannot be '5'"),
        ({"latest": 1}, "latest cannot be '1'"),
        ({"ordinal": 1, "republish": "yes"}, "republish cannot be 'yes'"),
    ],
)
def test_wrong_requests_are_told(given: Any, problem: str) -> None:
    with pytest.raises(ValueError, match="update_info") as refused:  # what vLLM's callers expect
        Request.parse(given)
    assert isinstance(refused.value, ConfigError)
    assert problem in refused.value.problem
    assert refused.value.remedy.startswith('give {"ordinal": N}')


@pytest.mark.parametrize(
    "given",
    [{"ordinal": 0}, {"latest": True}, {"weights_id": ID[3]}, {"abandon": True}, {"ordinal": 5, "republish": False}],
)
def test_requests_survive_the_way(given: dict[str, Any]) -> None:
    request = Request.parse(given)
    assert Request.parse(request.to_json()) == request


@pytest.mark.parametrize(
    ("given", "offered", "chosen"),
    [
        ({"ordinal": 3}, listing(2, 3, 4), 3),
        ({"ordinal": 1}, listing(1, 2), 1),  # back, where that is said
        ({"latest": True}, listing(4, 2, 3), 4),
        ({"weights_id": ID[4]}, listing(2, 4, warming_s=9.0), 4),
        ({"ordinal": 2}, listing(2), None),
        ({"weights_id": ID[2]}, listing(2, 3), None),
    ],
)
def test_what_is_picked(given: dict[str, Any], offered: ReplicaListing, chosen: int | None) -> None:
    found = pick(Request.parse(given), offered, NOW)
    assert (found.ordinal if found else None) == chosen


@pytest.mark.parametrize(
    ("given", "offered", "kind", "problem"),
    [
        ({"ordinal": 5}, listing(2, 3), NoSourceError, r"offers ordinal 5 \(offered: ordinal 2, 3\)"),
        ({"latest": True}, listing(2), NoSourceError, "nothing newer than ordinal 2"),
        ({"latest": True}, listing(1), NoSourceError, "nothing newer than ordinal 2"),
        ({"latest": True}, ReplicaListing(groups=()), NoSourceError, "no replica offers any weights$"),
        ({"latest": True}, listing(3, warming_s=9.0), NoSourceError, "may not know all sources"),
        ({"ordinal": 3}, listing(3, warming_s=9.0), NoSourceError, "may not know all sources"),
        ({"latest": True}, listing(2, 3, other="f" * 64), WeightsConflict, "2 weights have ordinal 3"),
        ({"ordinal": 3}, listing(3, other="f" * 64), WeightsConflict, "2 weights have ordinal 3"),
        ({"weights_id": ID[7]}, listing(2, 3), NoSourceError, "offers weights 000000000000"),
    ],
)
def test_what_is_not_picked(
    given: dict[str, Any], offered: ReplicaListing, kind: type[Exception], problem: str
) -> None:
    with pytest.raises(kind) as refused:
        pick(Request.parse(given), offered, NOW)
    assert refused.match(problem.rstrip("$"))


def test_state_of_other_attributes_is_refused() -> None:
    check_state({"a": {"x": 1}}, {"a": {"x": 2}})
    for held, offered in (({}, {"a": {"x": 1}}), ({"a": {"x": 1}}, {})):
        with pytest.raises(ManifestMismatch, match=r"a\.x"):
            check_state(held, offered)


def memory(tmp_path: Path, host_kb: int, limit: str = "max", used: int = 0, cached: int = 0) -> Memory:
    """As the kernel would tell it."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {host_kb} kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return Memory(meminfo=tmp_path / "meminfo", cgroup=tmp_path, spare=100)


def test_memory_of_the_host_and_of_the_container_bound_what_is_staged(tmp_path: Path) -> None:
    assert memory(tmp_path, 4).available() == 4096
    assert memory(tmp_path, 4, limit="3000", used=2000, cached=500).available() == 1500
    assert memory(tmp_path, 1, limit="3000", used=0).available() == 1024
    assert Memory(meminfo=tmp_path / "no", cgroup=tmp_path / "no").available() is None
    Memory(meminfo=tmp_path / "no", cgroup=tmp_path / "no").check(1 << 60, 1)
    memory(tmp_path, 1).check(924, 1)
    with pytest.raises(
        PublishError, match=r"staging 2 x 463 bytes .* needs 1026 bytes of host memory, 1024 are available"
    ):
        memory(tmp_path, 1).check(463, 2)


def test_this_machine_tells_its_memory() -> None:
    free = Memory().available()
    assert free is not None
    assert free > 1 << 20
