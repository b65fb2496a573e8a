from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vision import identity

from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.loaders.member import Member
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.source.described import Claim
from weightwire.types import Coordinates
from weightwire.wire.messages import PublicationState


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Member]:
    """This process as a source, with a server of its own."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o600)
    times = Times(ttl_s=1.5, warming_s=0.0)
    with (
        EmbeddedServer(ServerSettings(secret=load_secret(secret), times=times)) as server,
        Member(Settings(url=server.url, secret_file=secret, transports=("tcp",))) as running,
    ):
        yield running


def test_h25_whoever_is_announced_is_known_before_it_can_ask_who_came_earlier(member: Member) -> None:
    for life in range(5):
        wanted = dataclasses.replace(identity(), model_id=f"tests/{life}")
        claim = Claim(identity=wanted, coordinates=Coordinates(), world_size=1, replica_incarnation=str(life))
        member.node.announce(claim)
        assert len(list(member.metadata.sources())) == life + 1


def test_h24_the_progress_of_a_loading_replica_reaches_those_who_wait_for_it(member: Member) -> None:
    claim = Claim(identity=identity(), coordinates=Coordinates(), world_size=1, replica_incarnation="life")
    publication = member.node.announce(claim)
    seen: list[float] = []
    for done in (0, 100, 400, 900):  # the size is not known yet when it registers
        publication.progress(done, 1000 if done else 0)
        until = time.monotonic() + 10
        while [view.record.bytes_done for view in member.metadata.sources()] != [done]:
            assert time.monotonic() < until, done
            time.sleep(0.05)
        (view,) = member.metadata.sources()
        assert view.record.state is PublicationState.LOADING
        seen.append(view.record.fraction)
    assert seen == pytest.approx([0.0, 0.1, 0.4, 0.9])
