"""Replicas that start together, and one that starts while another is still loading."""

from __future__ import annotations

import time
from pathlib import Path

from vllm_checkpoints import Checkpoints
from vllm_replicas import Fleet, Shared

from weightwire.wire.messages import PublicationState


def test_third_starts_while_the_second_is_loading(
    fleet: Fleet, shared: Shared, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    first, gate = shared.source("qwen3"), tmp_path / "gate"
    name, model = first.name, checkpoints.bare("qwen3")
    patient = {"on_miss": "fail", "poison": True, "stall_timeout": 120}
    second = fleet.offline(model, name, extra=patient, faults={"gate": str(gate), "gate_after": 3})
    fleet.reading(name, 90, second)
    third = fleet.offline(model, name, extra=patient)
    third.says("Starting to load model")
    assert not second.lines("weightwire: received"), "the second was done before the third began"
    gate.touch()
    second.ready()
    third.ready()
    fleet.only(name, 3, second, third)
    assert first.tokens == second.tokens() == third.tokens()


def test_h25_two_start_in_the_same_second(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """Both have weights, nobody serves yet: no deadlock. Whoever finds the other reads from it."""
    name = "starts/together"
    began = time.monotonic()
    both = [fleet.offline(checkpoints.full("llama"), name) for _ in range(2)]
    assert time.monotonic() - began < 1
    for replica in both:
        replica.ready()
    fleet.only(name, 2, *both)
    assert both[0].tokens() == both[1].tokens()


def test_server_down_at_start(fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    """The disk, after one bounded try."""
    began = time.monotonic()
    alone = fleet.offline(checkpoints.full("llama"), "starts/down", extra={"url": "127.0.0.1:9"})
    alone.says("weightwire: no peer, reading the disk: ")
    tried = time.monotonic() - began
    assert tried < 60, "five seconds, and what a busy machine takes to get there"
    assert alone.ready().tokens() == shared.tokens("llama")


def test_h24_nobody_serves_and_nothing_is_on_the_disk(fleet: Fleet, checkpoints: Checkpoints) -> None:
    alone = fleet.offline(checkpoints.bare("llama"), "starts/nobody", extra={"on_miss": "fail"})
    assert alone.ends(120) == 1
    (cause,) = alone.root_causes()
    assert "nobody serves this model" in cause
    assert fleet.sources("starts/nobody") == []


def test_h52_held_until_the_engine_is_ready(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """The front end of a real server says when; workers never offer what the engine still warms up with."""
    name = "starts/held"
    server = fleet.api(checkpoints.full("llama"), name, extra={"quiet_s": 3600}, faults={"warm_up_s": 5.0})
    seen: list[PublicationState] = []
    offered_before_health = False
    until = time.monotonic() + 200
    with fleet.client() as client:
        while PublicationState.READY not in seen and time.monotonic() < until:
            initialised = bool(server.lines("init engine (profile"))
            states = {view.record.state for view in client.sources(name)}
            offered_before_health |= PublicationState.READY in states and not initialised
            seen += [state for state in states if state not in seen]
            server.wait_for(lambda: True)
            time.sleep(0.1)
    assert PublicationState.HELD in seen, (seen, server.tail())
    assert PublicationState.READY in seen, (seen, server.tail())
    assert not offered_before_health, server.tail()
    assert server.lines("weightwire: the engine is ready"), server.tail()
    server.ready()
    target = fleet.api(checkpoints.bare("llama"), name, extra={"on_miss": "fail", "poison": True}).ready()
    assert target.lines("weightwire: received ")
    assert target.tokens() == server.tokens()
