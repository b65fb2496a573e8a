"""A source that is lost, or goes bad, in mid-load: the disk where there is one, else one line and exit code 1."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm_checkpoints import Checkpoints
from vllm_processes import Offline
from vllm_replicas import Fleet, Shared

SLOW = {"read_s": 1.5}
STALL_S = 3
NOTICED_S = {signal.SIGKILL: 3.0, signal.SIGSTOP: STALL_S + 12.0}
"""On a busy machine. On an idle one a killed source is noticed in less than one: ``bench/vllm_killed.py``."""
WIDE = 131072
"""So that the weights, 330 MB, are more than what else a start takes for a moment."""
PLAIN = {"plain_linear": True}
QUICK = {"stall_timeout": STALL_S, "load_timeout": 60, "transports": ["tcp"]}


def half_way(fleet: Fleet, checkpoints: Checkpoints, name: str, *, disk: bool, **extra: object) -> tuple[Offline, ...]:
    """A source that is being read, and its reader."""
    source = fleet.offline(checkpoints.full("llama"), name, extra={"role": "source"} | QUICK).ready()
    fleet.until(name, 1, 30, source)
    model = checkpoints.full("llama") if disk else checkpoints.bare("llama")
    given = {"role": "target", "poison": True} | QUICK | extra
    target = fleet.offline(model, name, extra=given, faults=SLOW)
    fleet.reading(name, 90, target)
    time.sleep(0.5)
    assert not target.lines("weightwire: received")
    return source, target


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_h26_source_lost_in_mid_load_target_has_a_disk(
    number: signal.Signals, fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    wanted = shared.tokens("llama")
    source, target = half_way(fleet, checkpoints, f"losses/disk-{number.name}", disk=True)
    source.signal(number)
    began = time.monotonic()
    target.says("weightwire: no peer, reading the disk: ", 30)
    assert time.monotonic() - began < NOTICED_S[number]
    target.ready()
    assert target.tokens() == wanted


def test_source_lost_in_mid_load_target_has_nothing(fleet: Fleet, checkpoints: Checkpoints) -> None:
    source, target = half_way(fleet, checkpoints, "losses/nothing", disk=False)
    source.kill()
    began = time.monotonic()
    assert target.ends(60) == 1
    assert time.monotonic() - began < 45
    (cause,) = target.root_causes()
    assert cause.endswith("; give weight files, or start a source")
    assert len(target.lines("weightwire: no peer, reading the disk: ")) == 1


@pytest.mark.parametrize("kind", ["says_tied", "qwen3_moe", "w8a8"])
def test_h59_refilled_from_disk_after_bytes_went_bad(
    kind: str, fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    """Everything was poisoned, some of it filled: nothing of that is left, nor a second model (H37)."""
    source = shared.source(kind)
    extra = {"role": "target", "poison": True}
    target = fleet.offline(checkpoints.full(kind), source.name, extra=extra, faults={"corrupt_after": 3}).ready()
    assert target.lines("weightwire: no peer, reading the disk: "), target.tail()
    assert not target.lines("weightwire: received")
    assert not target.lines("Duplicate layer")
    assert target.tokens() == source.tokens


def test_h37_processed_bytes_went_bad_and_the_model_is_built_again(
    fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    source = shared.source("llama", processed=True)
    extra = {"role": "target", "poison": True, "stages": ["PROCESSED"]}
    faults = {"plain_linear": True, "corrupt_after": 3}
    target = fleet.offline(checkpoints.full("llama"), source.name, extra=extra, faults=faults).ready()
    assert target.lines("weightwire: no peer, reading the disk: "), target.tail()
    assert target.tokens() == source.tokens


def test_h37_falling_back_holds_no_second_model(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """Neither where the disk refills the model that a peer began to fill, nor where another one is built."""
    model = checkpoints.full("llama", intermediate_size=WIDE)
    nbytes = (model / "model.safetensors").stat().st_size
    usual = peak(fleet.offline(model, "losses/usual", load_format="auto", faults=PLAIN))
    for stage in ("LOADED", "PROCESSED"):
        name = f"losses/{stage}"
        source = fleet.offline(model, name, extra={"role": "source", "stages": [stage]}, faults=PLAIN).ready()
        fleet.until(name, 1, 30, source)
        extra = {"role": "target", "stages": [stage], "poison": True}  # which touches all of the first model's memory
        faults = PLAIN | {"corrupt_after": 9}
        target = fleet.offline(model, name, extra=extra, faults=faults)
        most = peak(target)
        assert target.lines("weightwire: no peer, reading the disk: "), target.tail()
        assert most - usual < nbytes / 3, (stage, most, usual, nbytes)
        assert target.tokens() == source.tokens()
        fleet.kill(source, target)


def peak(replica: Offline) -> int:
    """The most bytes that were its own until it was ready."""
    most = 0
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(replica.ready)
        while not ready.done():
            most = max(most, replica.resident())
            time.sleep(0.02)
    assert ready.result() is replica
    return most
