from __future__ import annotations

import pytest

from weightwire.simulate.network import Host, Rack, Stage, deliver
from weightwire.simulate.world import World


def test_events_happen_in_order_of_time_then_of_entry() -> None:
    world, seen = World(), list[str]()
    world.at(2.0, seen.append, "c")
    world.at(1.0, seen.append, "a")
    world.at(1.0, lambda: world.at(1.0, seen.append, "b"))
    world.at(9.0, seen.append, "never")
    world.run(5.0)
    assert seen == ["a", "b", "c"]
    assert (world.now, world.events) == (2.0, 4)


def host(rate: float, rack: Rack | None = None) -> Host:
    return Host(Stage(rate), Stage(rate), rack)


def test_a_chunk_passes_free_links_as_fast_as_the_narrowest() -> None:
    assert deliver(host(10.0), host(10.0), 1.0, 100) == pytest.approx(11.0)
    assert deliver(host(10.0), host(5.0), 1.0, 100) == pytest.approx(21.0)
    assert deliver(host(5.0), host(10.0), 1.0, 100) == pytest.approx(21.0)


def test_what_comes_from_two_senders_shares_the_receivers_link() -> None:
    receiver = host(10.0)
    assert deliver(host(10.0), receiver, 0.0, 100) == pytest.approx(10.0)
    assert deliver(host(10.0), receiver, 0.0, 100) == pytest.approx(20.0)
    assert deliver(host(10.0), receiver, 50.0, 100) == pytest.approx(60.0), "it was idle meanwhile"


def test_only_what_leaves_a_rack_passes_its_link() -> None:
    here, there = (Rack(Stage(2.0), Stage(4.0)) for _ in range(2))
    assert deliver(host(10.0, here), host(10.0, here), 0.0, 100) == pytest.approx(10.0)
    assert deliver(host(10.0, here), host(10.0, there), 0.0, 100) == pytest.approx(50.0)
    assert (here.up.served, here.down.served, there.down.served) == (100, 0, 100)
