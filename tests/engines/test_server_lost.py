"""The metadata server goes away, comes back empty, or was never there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from engine_fleet import SLOW, Fleet, bare

from weightwire.auth import load_secret
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.wire.messages import PublicationState


class Server:
    """One that can be stopped, and started again on its port, empty."""

    def __init__(self, secret_file: Path) -> None:
        self._secret = load_secret(secret_file)
        self._running = ExitStack()
        self.port = 0
        self.start()

    def start(self) -> None:
        times = Times(ttl_s=3.0, warming_s=0.0)
        settings = ServerSettings(secret=self._secret, port=self.port, times=times, grace_s=0.1)
        self.port = self._running.enter_context(EmbeddedServer(settings)).port

    def stop(self) -> None:
        self._running.close()


@pytest.fixture
def mortal(secret_file: Path) -> Iterator[Server]:
    server = Server(secret_file)
    yield server
    server.stop()


@pytest.fixture
def lonely(mortal: Server, secret_file: Path, forks: Path) -> Iterator[Fleet]:
    fleet = Fleet(url=f"127.0.0.1:{mortal.port}", secret_file=secret_file, zygote=forks)
    yield fleet
    fleet.kill()


def test_h33_h68_a_load_survives_its_server_and_sources_come_back_by_themselves(
    lonely: Fleet, mortal: Server, checkpoints: dict[str, Path]
) -> None:
    slow = lonely.source(checkpoints["big"], "survivor", faults=SLOW)
    leaver = lonely.source(checkpoints["small"], "leaver")
    for watch in (slow, leaver):
        watch.loaded()
    target = lonely.target(bare(checkpoints["big"]), "survivor")
    target.moved("transfer", 0.2)
    mortal.stop()
    report = target.report()
    assert report["source"] == "peer"
    assert report["retries"] == 0
    assert target.digest() == slow.digest()
    leaver.ask("withdraw", "withdrawn")  # takes effect though nobody can be told
    mortal.start()
    lonely.eventually("survivor", lambda views: [view.record.state for view in views] == [PublicationState.READY])
    assert lonely.target(bare(checkpoints["big"]), "survivor").report()["source"] == "peer"
    assert lonely.sources("leaver") == []


def test_h33_without_a_server_the_disk_is_read_after_one_bounded_try(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    began = time.monotonic()
    report = fleet.start(checkpoints["small"], "alone", env={"WEIGHTWIRE_URL": "127.0.0.1:9"}).report()
    assert report["source"] == "disk"
    assert "127.0.0.1:9" in report["steps"][0]["reason"]
    assert report["seconds"]["discover"] < 20
    assert time.monotonic() - began < 60
