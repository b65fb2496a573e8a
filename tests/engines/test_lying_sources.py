"""Sources whose bytes are not what they published, readers whose memory is bad, and processes that take over a port."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from engine_fleet import SLOW, Fleet, Watch, bare

from weightwire.auth import load_secret
from weightwire.errors import LoadError
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.wire.messages import PublicationState
from weightwire.wire.reports import SourceView


def ready(views: Sequence[SourceView]) -> int:
    return sum(view.record.state is PublicationState.READY and not view.quarantined for view in views)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_h31_h54_flipped_bits_cost_one_reader_and_the_source_its_place(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    bad, good = (fleet.source(checkpoints["big"], "flipped", faults=SLOW | {"blind": True}) for _ in range(2))
    for each in (bad, good):
        each.loaded()
    tokens, digest = good.tokens(), good.digest()
    bad.ask("flip", "flipped", what="weight")
    target = fleet.target(bare(checkpoints["big"]), "flipped")
    report = target.report()
    assert report["source"] == "peer"
    assert report["retries"] > 0
    assert sorted(share["bad_leaves"] > 0 for share in report["shares"]) == [False, True]
    assert any("does not have its digest" in line for line in report["warnings"])
    assert target.digest() == digest
    assert target.tokens() == tokens
    # one report made the source look at itself: nobody pays for it again
    fleet.eventually("flipped", lambda views: ready(views) == 1)
    second = fleet.target(bare(checkpoints["big"]), "flipped").report()
    assert len(second["shares"]) == 1
    assert second["shares"][0]["bad_leaves"] == 0


def test_h36_h69_a_reader_with_bad_memory_fails_and_the_source_keeps_its_place(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    source = fleet.source(checkpoints["small"], "healthy")
    source.loaded()
    broken = fleet.target(bare(checkpoints["small"]), "healthy", faults={"corrupt": True})
    with pytest.raises(LoadError, match="does not have its digest"):
        broken.loaded()
    assert broken.replica.ranks[0].wait(10) == 1
    assert not any(event["event"] == "loaded" for event in broken.events)
    # the source has digested the leaf again by now or does it at the next beat: nothing is held against it
    fleet.eventually("healthy", lambda views: ready(views) == 1 and not views[0].reports)
    assert fleet.target(bare(checkpoints["small"]), "healthy").report()["source"] == "peer"


def test_h29_bytes_overwritten_under_a_reader_are_refused(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    source = fleet.source(checkpoints["big"], "scribbled", faults=SLOW | {"blind": True})
    source.loaded()
    tokens, digest = source.tokens(), source.digest()
    target = fleet.target(checkpoints["big"], "scribbled")
    target.moved("transfer", 0.3)
    source.ask("flip", "flipped", what="weight")
    report = target.report()
    assert report["source"] == "disk"
    assert [step["outcome"] for step in report["steps"]] == ["failed", "ok"]
    assert "does not have its digest" in report["steps"][0]["reason"]
    assert target.digest() == digest
    assert target.tokens() == tokens


def test_h29_a_source_that_withdraws_under_a_reader_is_not_blamed(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    leaving, staying = (fleet.source(checkpoints["big"], "leaving", faults=SLOW) for _ in range(2))
    for each in (leaving, staying):
        each.loaded()
    target = fleet.target(bare(checkpoints["big"]), "leaving")
    target.moved("transfer", 0.2)
    (withdrawn,) = leaving.ask("withdraw", "withdrawn")
    report = target.report()
    assert report["source"] == "peer"
    assert sum(share["nbytes"] for share in report["shares"]) == report["nbytes"]
    assert isinstance(withdrawn["seconds"], float)
    assert withdrawn["seconds"] < 15
    assert target.digest() == staying.digest()
    assert [view.reports for view in fleet.sources("leaving")] == [0]


def test_h59_what_a_failed_fill_wrote_is_restored_before_the_disk_is_read(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    source = fleet.source(checkpoints["small"], "derived")
    source.loaded()
    tokens, digest = source.tokens(), source.digest()
    source.ask("flip", "flipped", what="derived")  # these come last: all weights have arrived by then
    target = fleet.target(checkpoints["small"], "derived", faults={"poison": True})
    report = target.report()
    assert report["source"] == "disk"
    assert target.said("filling")["untouched"] is True
    assert target.digest() == digest
    assert target.tokens() == tokens


def test_h28_a_process_that_took_over_the_port_serves_as_itself_or_not_at_all(
    fleet: Fleet, checkpoints: dict[str, Path], secret_file: Path
) -> None:
    port = free_port()
    at_port = {"peer_port": port}
    first = fleet.source(checkpoints["small"], "moved", faults=at_port)
    first.loaded()
    first.signal(signal.SIGKILL)
    settings = ServerSettings(secret=load_secret(secret_file))
    with EmbeddedServer(settings) as elsewhere:
        # a stranger to the first server, which still has the record of the process that died
        env = {"WEIGHTWIRE_ROLE": "source", "WEIGHTWIRE_URL": elsewhere.url}
        stranger = fleet.start(checkpoints["other"], "moved", env=env, faults=at_port)
        stranger.loaded()
        assert fleet.target(checkpoints["small"], "moved").report()["source"] == "disk"
        stranger.kill()
    again = fleet.source(checkpoints["other"], "moved", faults=at_port)
    again.loaded()
    target = fleet.target(bare(checkpoints["small"]), "moved")
    assert target.report()["source"] == "peer"
    assert _weights(target) == _weights(again)


def _weights(watch: Watch) -> list[str]:
    return [content for content, _ in watch.digest()]
