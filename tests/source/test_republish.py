"""A shard that was withdrawn and is published again by the same process, at once."""

from __future__ import annotations

import time
from pathlib import Path

from vision import identity

from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.loaders.member import Member
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.source.described import Claim
from weightwire.types import Coordinates

TTL_S = 20.0
"""The server's tombstone refuses whatever is not later, for two of them (hazard H68)."""


def test_h68_published_again_at_once_under_the_same_key(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o600)
    claims = [
        Claim(identity=identity(), coordinates=Coordinates(), world_size=1, replica_incarnation=life, ordinal=ordinal)
        for life, ordinal in (("first", 1), ("second", 2), ("third", 3))
    ]
    settings = ServerSettings(secret=load_secret(secret), times=Times(ttl_s=TTL_S, warming_s=0.0))
    with (
        EmbeddedServer(settings) as server,
        Member(Settings(url=server.url, secret_file=secret, transports=("tcp",))) as member,
    ):
        generations = []
        for claim in claims:
            publication = member.node.announce(claim)
            until = time.monotonic() + TTL_S / 2
            while [view.record.ordinal for view in member.metadata.sources()] != [claim.ordinal]:
                assert time.monotonic() < until, member.metadata.sources()
                time.sleep(0.02)
            generations.append(publication.generation)
            publication.withdraw(0.0)
            assert member.metadata.sources() == []
        assert generations == sorted(set(generations)), "a reader must not take one's bytes for the other's"
