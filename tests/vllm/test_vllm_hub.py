"""The name of a model on the Hub and the same command on every replica: only the first one downloads the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm_checkpoints import Checkpoints
from vllm_hub import Hub, hub
from vllm_processes import CPU, Offline, zygote
from vllm_replicas import Fleet, Place

MODEL = "acme/tiny"


@pytest.fixture(scope="module")
def where() -> Iterator[Hub]:
    with hub() as where:
        yield where


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``HF_HOME`` of every replica: what its host has of the Hub already."""
    return tmp_path_factory.mktemp("hosts") / "home"


@pytest.fixture(scope="module")
def hosts(place: Place, where: Hub, home: Path) -> Iterator[Place]:
    """Where replicas know the Hub: its client reads ``HF_*`` when it is imported, so they are forked from there."""
    settings = {"HF_ENDPOINT": where.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setitem(CPU, name, value)
        with zygote(home.parent) as socket:
            yield replace(place, zygote=socket)


@pytest.fixture
def fleet(hosts: Place) -> Iterator[Fleet]:
    fleet = Fleet(hosts)
    try:
        yield fleet
    finally:
        fleet.kill()


def replica(fleet: Fleet, **extra: Any) -> Offline:
    """The command of every replica: nothing but the Hub's name says what is wanted."""
    named = {"model_id": None, "revision": None}
    return fleet.offline(Path(MODEL), MODEL, extra=named | extra).ready()


def revisions(fleet: Fleet, count: int, *watched: Offline) -> list[str]:
    """What ``count`` replicas say that they serve."""
    views = fleet.until(MODEL, count, 20, *watched).values()
    return sorted(one[0].record.revision for one in views)


def downloads(where: Hub) -> tuple[int, int]:
    """Bytes of weight files that were fetched since the last call, and of everything else."""
    asked = where.asked()
    weights = sum(one.nbytes for one in asked if one.of_weights)
    return weights, sum(one.nbytes for one in asked) - weights


@pytest.mark.timeout(600, method="signal", func_only=True)  # by signal: replicas are ended then
def test_only_the_first_replica_downloads(fleet: Fleet, checkpoints: Checkpoints, where: Hub, home: Path) -> None:
    old = where.push(MODEL, checkpoints.full("llama"))
    first = replica(fleet)
    said = f"weightwire: up to {old.weights / 1e6:.1f} MB of {MODEL} are downloaded"
    assert first.lines("weightwire: no peer, reading the disk: no source")
    assert first.lines(said), first.tail()
    assert downloads(where)[0] == old.weights
    assert revisions(fleet, 1, first) == [old.sha]
    expected = first.tokens()

    home.rename(home.with_name("first"))
    second = replica(fleet, poison=True)
    assert second.lines("weightwire: received"), second.tail()
    assert not second.lines("are downloaded")
    assert not second.lines("UNPINNED")
    weights = [one for one in where.requests if one.file.endswith(".safetensors")]
    assert not weights, weights
    small = sum(blob.size for name, blob in old.files.items() if name != "model.safetensors")
    assert small <= downloads(where)[1] < small + (64 << 10)  # and a few descriptions
    assert second.tokens() == expected
    assert revisions(fleet, 2, first, second) == [old.sha] * 2
    assert first.stop() == 0

    home.rename(home.with_name("second"))
    home.with_name("first").rename(home)  # its cache still says that main is the old commit
    new = where.push(MODEL, checkpoints.full("llama", seed=1))
    where.hangs_up_on = "blobs"  # which is how the size of a download is asked: to know it is not needed
    third = replica(fleet)
    assert not third.lines("weightwire: received"), third.tail()
    assert downloads(where)[0] == new.weights
    assert third.tokens() != expected
    assert revisions(fleet, 2, second, third) == sorted([old.sha, new.sha])

    where.hangs_up_on = None
    again = replica(fleet, role="source")
    assert not again.lines("are downloaded")  # they are there
    assert downloads(where)[0] == 0
    assert again.tokens() == third.tokens()
    assert [second.stop(), third.stop(), again.stop()] == [0, 0, 0]
