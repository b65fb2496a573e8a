"""Replicas on two hosts, the metadata server on a third: as ``docs/vllm/two-nodes.md`` says, over real cables.

The hosts are network namespaces of this machine (``vllm_hosts``); without root there are none, and nothing is run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import vllm_hosts
from vllm_checkpoints import Checkpoints
from vllm_hosts import FAST_LINK, LINK, Host
from vllm_processes import Offline, Process, metadata_server
from vllm_replicas import Fleet, Place

NAME = "hosts/llama"
PORT = 8470
STALL_S = 3
PORTS = 2
"""Of a worker."""


@dataclass
class Town:
    """Hosts that can reach each other, and what runs on them."""

    fleet: Fleet
    server: Host
    one: Host
    other: Host
    url: str

    def replica(self, where: Host, model: Path, *, env: dict[str, str] | None = None, **options: Any) -> Offline:
        """On one of the hosts."""
        extra = {"url": self.url} | options.pop("extra", {})
        return self.fleet.offline(model, NAME, env=where.environment | (env or {}), extra=extra, **options)

    def records(self) -> list[dict[str, Any]]:
        """What the server tells its operator."""
        said = self.server.weightwire("sources", "--url", self.url, "--model", NAME, "--json")
        assert said.returncode == 0, said.stderr
        return [view["record"] for view in json.loads(said.stdout) if not view["suspect"]]

    def offered(self, count: int, *watched: Process, timeout: float = 30.0) -> list[dict[str, Any]]:
        """The records of ``count`` ranks, once they are READY."""
        until = time.monotonic() + timeout
        while len(found := [one for one in self.records() if one["state"] == "READY"]) < count:
            assert time.monotonic() < until, "\n".join([str(self.records()), *(each.tail() for each in watched)])
            time.sleep(0.2)
        return found


@pytest.fixture(scope="module")
def town(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    if reason := vllm_hosts.why_not():
        pytest.skip(reason)
    files = tmp_path_factory.mktemp("hosts")
    secret = (place.state / "secret").read_text()
    fleet = Fleet(place)
    with vllm_hosts.hosts(files, secret) as (server, (one, other)):
        options = ("--host", server.address, "--ttl", "5")
        with metadata_server(server.files, *options, port=PORT, where=server.command()) as url:
            try:
                yield Town(fleet, server, one, other, url)
            finally:
                fleet.kill()


def addresses(records: list[dict[str, Any]]) -> set[str]:
    return {endpoint.rpartition(":")[0] for record in records for endpoint in record["endpoints"]}


def test_replicas_on_two_hosts(town: Town, checkpoints: Checkpoints) -> None:
    """Each worker reads its own shard over the network that its source names; then that host is gone in mid-load."""
    model, bare = checkpoints.full("llama"), checkpoints.bare("llama")
    nbytes = (model / "model.safetensors").stat().st_size
    by_fast = {"WEIGHTWIRE_BIND": town.one.fast}
    first = town.replica(town.one, model, tp=2, env=by_fast, extra={"role": "source"}).ready()
    assert addresses(town.offered(2, first)) == {town.one.fast}
    assert town.one.listening(town.one.fast) == 2 * PORTS, "what a firewall has to let through"

    before = {link: town.other.received(link) for link in (LINK, FAST_LINK)}
    second = town.replica(town.other, bare, tp=2, extra={"on_miss": "fail", "poison": True}).ready()
    came = {link: town.other.received(link) - before[link] for link in before}
    received = second.lines("weightwire: received ")
    assert len(received) == 2, second.tail()
    assert all(" over tcp " in line for line in received), received
    assert second.lines("nixl failed ("), second.tail()
    assert nbytes < came[FAST_LINK] < 1.3 * nbytes, came
    assert came[LINK] < 0.1 * nbytes, came
    assert second.tokens() == first.tokens()
    ranks = town.offered(4, first, second)
    assert addresses(ranks) == {town.one.fast, town.other.address}
    assert len({record["content_id"] for record in ranks}) == 2
    assert first.stop() == 0

    faults, quick = {"read_s": 0.5}, {"stall_timeout": STALL_S, "poison": True, "role": "target"}
    third = town.replica(town.one, model, tp=2, extra=quick, faults=faults)
    third.wait_for(lambda: any(one["active_reads"] for one in town.records()), what="reading")
    town.other.unplug(LINK)
    began = time.monotonic()
    third.says("weightwire: no peer, reading the disk: ", 10 * STALL_S)
    took = time.monotonic() - began
    assert third.ready().tokens() == second.tokens()
    assert not third.lines("weightwire: received ")
    assert took < 5 * STALL_S
    town.other.plug(LINK)
    town.offered(2, second)  # it registers again


def test_a_host_that_others_cannot_reach_says_so(town: Town, checkpoints: Checkpoints) -> None:
    unreachable = {"WEIGHTWIRE_ADVERTISE": "10.99.0.9"}
    alone = town.replica(town.one, checkpoints.full("llama"), env=unreachable).ready()
    (line,) = alone.lines("weightwire: no peer, reading the disk: ")
    assert "10.99.0.9" in line
    assert "cannot be reached from its own machine" in line
    assert len(alone.lines("Loading weights took")) == 1
    assert not [one for one in town.records() if one["coordinates"]["tp_size"] == 1]
    said = town.other.weightwire("doctor", "--url", town.url)
    assert said.returncode == 0, said.stdout + said.stderr
    assert town.url in said.stdout
