from __future__ import annotations

import pytest

from weightwire.transport.nixl.lanes import Lanes, tcp_is_asked_for, tcp_is_the_only_network

STAMP = "[1795448126.729465] [host:9805 :0]   "


def table(agent: str, way: str, *rows: str) -> str:
    """As UCX 1.23 prints it."""
    rule = "+--------+-------------+------------+"
    inside = [
        f"| {agent} inter-node cfg#1 |",
        f"| {way} |",
        rule,
        "| Range  | Description | Config |",
        rule,
        *rows,
        rule,
    ]
    return "".join(f"{STAMP}{line}\n" for line in [rule, *inside])


READ = "remote memory read by ucp_get*(multi) into {} memory from {}"


def test_h46_the_transports_of_an_agent_s_reads() -> None:
    lanes = Lanes()
    assert lanes.feed(table("ab/1", READ.format("host", "host"), "| 0..inf | zero-copy   | cma/memory |")) == []
    lanes.feed(table("ab/2", READ.format("host", "host"), "| 0..inf | software emulation | tcp/lo |"))
    assert lanes.transports("ab/1") == {("cpu", "cpu"): ("cma",)}
    assert lanes.transports("ab/2") == {("cpu", "cpu"): ("tcp",)}
    assert lanes.transports("ab/3") == {}


def test_several_lanes_ranges_and_kinds_of_memory() -> None:
    lanes = Lanes()
    text = table(
        "ab/1",
        READ.format("cuda/GPU0", "cuda"),
        "| 0..4000 | short | tcp/eth0 |",
        "| 4001..inf | zero-copy | 52% on rc_mlx5/mlx5_0:1 and 48% on rc_mlx5/mlx5_1:1 |",
    )
    lanes.feed(text[:200])  # a look in the middle of a table
    lanes.feed(text)
    assert lanes.transports("ab/1") == {("cuda", "cuda"): ("rc_mlx5", "tcp")}


def test_h46_a_device_that_ucx_knows_by_name() -> None:
    lanes = Lanes()
    way = "remote memory read by ucp_get*(multi) into cuda/GPU0 from cuda/GPU0"
    lanes.feed(table("ab/1", way, "| 0..inf | zero-copy | cuda_ipc/cuda |"))
    assert lanes.transports("ab/1") == {("cuda", "cuda"): ("cuda_ipc",)}


def test_a_later_choice_replaces_an_earlier_one() -> None:
    lanes = Lanes()
    for lane in ("tcp/eth0", "rc_mlx5/mlx5_0:1"):
        lanes.feed(table("ab/1", READ.format("host", "host"), f"| 0..inf | zero-copy | {lane} |"))
    assert lanes.transports("ab/1") == {("cpu", "cpu"): ("rc_mlx5",)}


def test_other_tables_count_for_nothing_and_other_lines_are_given_back() -> None:
    lanes = Lanes()
    warning = "sock.c:355  UCX  ERROR   connect(fd=24, dest_addr=127.0.0.1:39431) failed: Connection refused"
    text = table("ab/1", "active message by ucp_am_send* from host memory", "| 0..inf | short | tcp/lo |")
    assert lanes.feed(text + STAMP + warning + "\n") == [warning]
    assert lanes.transports("ab/1") == {}


@pytest.mark.parametrize(
    ("named", "asked", "only"),
    [
        ("", False, False),
        ("all", False, False),
        ("^tcp", False, False),
        ("rc,cuda", False, False),
        ("tcp", True, True),
        (" TCP, self,cuda_copy", True, True),
        ("rc,tcp,cuda_ipc", True, False),
    ],
)
def test_tcp_is_consented_to_by_name_and_keys_are_revoked_where_there_is_rdma_besides(
    named: str, asked: bool, only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", named)
    assert (tcp_is_asked_for(), tcp_is_the_only_network()) == (asked, only)
