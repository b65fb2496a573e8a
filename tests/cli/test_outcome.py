from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from weightwire.cli.comparison import from_them, same_manifests, same_tokens
from weightwire.cli.outcome import Outcome
from weightwire.cli.phase_table import phase_table, summary

TOOK = (
    "took: discover 0.10 s, plan 0.01 s, register 0.00 s, transfer 0.50 s, verify 0.20 s, publish 0.30 s, "
    "post-load 0.10 s, total 1.40 s"
)


def rank(number: int, **changes: Any) -> dict[str, Any]:
    """What one rank tells after it took 100 MB from a peer in half a second."""
    report = {
        "source": "peer",
        "stage": "LOADED",
        "verified": True,
        "content_id": f"content {number}",
        "weights_id": "w" * 64,
        "revision": "v1",
        "nbytes": 100_000_000,
        "seconds": {"discover": 0.1, "plan": 0.01, "register": 0.0, "transfer": 0.5, "verify": 0.2, "decide": 9.0},
        "shares": [{"peer": f"10.0.0.1:{number} (aaaa)", "path": "tcp", "nbytes": 100_000_000, "bad_leaves": 0}],
        "steps": [{"way": "peer", "who": "", "outcome": "ok", "reason": "", "seconds": 0.6}],
        "warnings": ["nixl is not available: no wheel"],
        "paths": ["tcp"],
    }
    published = {
        "stage": "LOADED",
        "published": True,
        "reason": "",
        "content_id": f"content {number}",
        "weights_id": "w" * 64,
        "transports": ["tcp"],
        "unavailable": {},
        "seconds": {"digest": 0.1, "decide": 0.1, "register": 0.1},
    }
    told = {
        "report": report | changes.pop("report", {}),
        "seconds": {"construct": 0.2, "materialize": 0.1, "fill": 0.7, "post_load": 0.4},
        "published": None if changes.get("published", 0) is None else published | changes.pop("published", {}),
        "nbytes": 100_000_000,
        "peer": f"10.0.0.9:{number} (bbbb)",
        "unavailable": {"nixl": "no wheel"},
    }
    return told | changes


def outcome(*ranks: dict[str, Any], name: str = "second") -> Outcome:
    return Outcome(name, ranks or (rank(0), rank(1)), 9.0)


def lines(shown: Outcome) -> list[str]:
    return [f"{label}: {text}" for label, text in summary(shown)]


def test_a_replica_is_as_slow_as_its_slowest_rank_and_has_the_bytes_of_all() -> None:
    slow = rank(1, report={"seconds": {"discover": 0.3, "plan": 0.0, "transfer": 1.0, "verify": 0.1}})
    found = outcome(rank(0), slow)
    assert found.nbytes == 200_000_000
    assert found.gigabytes_per_second == pytest.approx(0.2)
    assert found.seconds == pytest.approx(
        {
            "discover": 0.3,
            "plan": 0.01,
            "register": 0.0,
            "transfer": 1.0,
            "verify": 0.2,
            "publish": 0.3,
            "post-load": 0.1,
            "total": 1.4,
        }
    )


def test_a_processed_publication_comes_behind_the_load() -> None:
    found = outcome(rank(0, published={"stage": "PROCESSED"}))
    assert found.seconds["post-load"] == pytest.approx(0.4)
    assert found.seconds["total"] == pytest.approx(1.7)
    assert found.published == "PROCESSED"


def test_a_load_from_the_disk_has_no_phases_of_peers() -> None:
    report = {"source": "disk", "seconds": {}, "shares": [], "paths": [], "verified": False, "warnings": []}
    steps = [{"way": "peer", "who": "", "outcome": "failed", "reason": "no source", "seconds": 0.0}]
    found = outcome(rank(0, report=report | {"steps": steps}, published=None, unavailable={}))
    assert list(found.seconds) == ["transfer", "post-load", "total"]
    assert found.seconds["transfer"] == 0.7
    assert lines(found)[:3] == [
        "weights: from the disk (1 rank)",
        "no peer: no source",
        "bytes: 100.0 MB in 0.70 s (0.14 GB/s)",
    ]
    assert not any(line.startswith(("published", "NOT published", "revision")) for line in lines(found))


def test_people_are_told_all_that_matters_and_each_warning_once() -> None:
    assert lines(outcome()) == [
        "weights: from a running replica, every byte verified (2 ranks)",
        "bytes: 200.0 MB in 0.50 s (0.40 GB/s) over tcp",
        "from: 10.0.0.1:0 (aaaa): 100.0 MB over tcp",
        "from: 10.0.0.1:1 (aaaa): 100.0 MB over tcp",
        TOOK,
        "revision: v1",
        f"weights id: {'w' * 64}",
        "published: stage LOADED over tcp",
        "WARNING: nixl is not available: no wheel",
    ]


def test_what_is_not_so_is_not_said() -> None:
    failed = {"published": False, "reason": "no transport can serve this memory"}
    said = lines(outcome(rank(0), rank(1, report={"verified": False}, published=failed)))
    assert "weights: from a running replica, NOT VERIFIED (2 ranks)" in said
    assert "NOT published: no transport can serve this memory" in said
    assert not any(line.startswith("published") for line in said)


def test_bytes_of_several_ranks_of_one_replica_are_put_together() -> None:
    names = {"10.0.0.1:0 (aaaa)": "first", "10.0.0.1:1 (aaaa)": "first"}
    assert outcome().taken(names) == {("first", "tcp"): 200_000_000}
    assert len(outcome().taken()) == 2


def test_the_table_has_a_column_for_each_replica() -> None:
    console = Console(file=io.StringIO(), width=100)
    report = {"source": "disk", "seconds": {}, "shares": [], "paths": []}
    first = outcome(rank(0, report=report), rank(1, report=report), name="first")
    names = {"10.0.0.1:0 (aaaa)": "first", "10.0.0.1:1 (aaaa)": "first"}
    with console.capture() as captured:
        console.print(phase_table([first, outcome()], names))
    shown = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert shown[0] == "first second"
    assert "weights from disk first" in shown
    assert "transport in use - tcp" in shown
    assert "discover - 0.10 s" in shown
    assert "transfer 0.70 s 0.50 s" in shown
    assert "bytes 200.0 MB 200.0 MB" in shown
    assert "GB/s 0.29 0.40" in shown


def test_tokens_that_differ_are_named() -> None:
    assert same_tokens(["a", "b"], [[1, 2], [3, 4]], [[1, 2], [3, 4]]).ok
    found = same_tokens(["a", "b"], [[1, 2], [3, 4]], [[1, 2], [3, 5]])
    assert (found.ok, found.detail) == (False, "the tokens differ: at token 1 of the answer to 'b'")
    assert not same_tokens(["a"], [[1, 2]], [[1]]).ok


def test_manifests_that_differ_are_named() -> None:
    first = outcome(name="first")
    assert same_manifests(first, outcome()).ok
    other = outcome(rank(0), rank(1, published={"content_id": "else"}))
    assert same_manifests(first, other).detail == "the manifests differ: content id of rank 1 (first, second)"
    unknown = [rank(0, published={"content_id": ""}, report={"content_id": ""})]
    assert not same_manifests(outcome(*unknown), outcome(*unknown)).ok
    assert not same_manifests(first, outcome(rank(0))).ok


def test_who_gave_the_bytes_is_named() -> None:
    givers = ("first", "second")
    both = from_them({("first", "tcp"): 5, ("second", "tcp"): 5}, givers)
    assert (both.ok, both.detail) == (True, "the third replica took its bytes from first and second")
    one = from_them({("second", "tcp"): 5}, givers)
    assert one.ok
    assert one.detail.startswith("the third replica took its bytes from second alone")
    other = from_them({("first", "tcp"): 5, ("stranger", "tcp"): 5}, givers)
    assert (other.ok, other.detail) == (
        False,
        "the third replica took its bytes from stranger, not from first and second",
    )
    assert not from_them({}, givers).ok
