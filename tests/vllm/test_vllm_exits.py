"""How processes end: with the exit codes that they ought to have, and without a crash of any worker (hazard H70)."""

from __future__ import annotations

import signal
import time
from typing import Any

from vllm_checkpoints import Checkpoints
from vllm_processes import Process
from vllm_replicas import Fleet, Shared

CRASHES = ("Segmentation fault", "Fatal Python error", "core dumped", "exit code: -11", "exitcode -11")


def assert_no_crash(process: Process) -> None:
    for sign in CRASHES:
        assert not process.lines(sign), process.tail()


def test_h70_offline_source_and_target_end_with_zero(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """Both made NIXL agents, which crash at an interpreter's usual end; what they published is gone at once."""
    name = "exits/offline"
    first = fleet.offline(checkpoints.full("llama"), name).ready()
    fleet.until(name, 1, 30, first)
    second = fleet.offline(checkpoints.bare("llama"), name, extra={"on_miss": "fail", "poison": True}).ready()
    assert "over nixl/" in second.says("weightwire: received "), second.tail()
    fleet.only(name, 2, first, second)
    assert second.tokens() == first.tokens()
    assert first.stop() == 0
    assert second.stop() == 0
    assert fleet.sources(name) == []
    assert_no_crash(first)
    assert_no_crash(second)


def test_h70_two_workers_end_with_zero(fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    extra = {"on_miss": "fail", "role": "target"}
    replica = fleet.offline(checkpoints.bare("llama"), shared.name("llama", 2), tp=2, extra=extra).ready()
    assert all("over nixl/" in line for line in replica.lines("weightwire: received ")), replica.tail()
    assert replica.stop() == 0
    assert_no_crash(replica)


def test_h70_vllm_serve_with_a_shutdown_timeout_withdraws(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """The README's command. Its processes are spawned, as is vLLM's way (other tests fork): the plugin is there."""
    name = "exits/server"
    how: dict[str, Any] = {"command": "serve", "engine": {"--shutdown-timeout": 10}, "fresh": True}
    server = fleet.api(checkpoints.full("llama"), name, extra={"quiet_s": 3600}, **how).ready()
    fleet.until(name, 1, 30, server)
    assert server.lines("(EngineCore pid="), "no process of its own"
    assert server.lines("(Worker pid="), "no process of its own"
    target = fleet.offline(checkpoints.bare("llama"), name, extra={"on_miss": "fail", "role": "target"}).ready()
    assert target.tokens() == server.tokens()
    began = time.monotonic()
    server.terminate()
    assert server.ends(60) in (0, -signal.SIGTERM)
    assert time.monotonic() - began < 40
    assert fleet.sources(name) == [], "withdrawn, not only suspect"
    assert_no_crash(server)
