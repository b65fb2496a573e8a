"""What one process gives its readers at most: split among them, refused beyond, revised, revoked."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from vision import Encoder, identity

import weightwire
from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.errors import GenerationMoved, SourceBusy
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.observability.metrics import process_metrics
from weightwire.source.caps import Caps, split
from weightwire.source.leases import ReadLease
from weightwire.wire.messages import OpenRead, PublicationRecord, ReadGrant
from weightwire.wire.peer_client import PeerClient

RATE = 50e6


def test_the_parts_of_all_readers_make_the_cap() -> None:
    for one_sided in range(4):
        for streamed in range(4):
            parts = split(RATE, one_sided, streamed)
            served = parts.streamed if streamed else 0.0
            assert parts.each * one_sided + served <= RATE * 1.000001
            if one_sided + streamed:
                assert parts.each * one_sided + served == pytest.approx(RATE)
    assert split(0.0, 3, 2).each == split(0.0, 3, 2).streamed == 0.0


def test_readers_are_counted_by_process() -> None:
    caps = Caps(max_readers=2)
    leases = [ReadLease(token=bytes([n]), reader=name, transports=("tcp",)) for n, name in enumerate(("a", "a", "b"))]
    caps.check("a", leases)
    caps.check("c", leases[:2])
    with pytest.raises(SourceBusy, match="2 readers"):
        caps.check("c", leases)
    Caps().check("c", leases)


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o600)
    served = ServerSettings(secret=load_secret(secret), times=Times(ttl_s=3.0, warming_s=0.0))
    with EmbeddedServer(served) as server:
        yield Settings.from_env(
            {},
            url=server.url,
            secret_file=secret,
            transports=("tcp", "inproc"),
            max_rate="50MB/s",
            max_readers="2",
            wait_for_loading=20.0,
            load_timeout=40.0,
        )


@pytest.fixture
def source(settings: Settings) -> Iterator[tuple[weightwire.Published, PublicationRecord, PeerClient]]:
    torch.set_num_threads(1)
    with weightwire.publish(Encoder(8, 1), identity(), settings=settings) as published:
        record = published._publication.current()
        assert record is not None
        client = PeerClient(record.endpoints[0], record.incarnation, load_secret(settings.secret_file))
        with closing(client):
            yield published, record, client
            published._publication.withdraw(0.0)  # leases that tests leave open are not waited for


def opened(client: PeerClient, record: PublicationRecord, reader: str, *transports: str) -> ReadGrant:
    request = OpenRead(
        shard_key=record.shard_key,
        incarnation=record.incarnation,
        content_id=record.content_id,
        reader=reader,
        reader_host="host",
        transports=transports,
    )
    return client.open_read(request)


Source = tuple[weightwire.Published, PublicationRecord, PeerClient]


def test_a_grant_is_revised_when_readers_come_and_go(source: Source) -> None:
    _, record, client = source
    first = opened(client, record, "one", "inproc")
    assert first.rate == RATE
    updates = client.progress(first.lease)
    assert next(updates).rate == RATE
    second = opened(client, record, "two", "inproc")
    assert second.rate == RATE / 2
    assert RATE / 2 in {next(updates).rate for _ in range(3)}
    client.close_read(second.lease)
    assert RATE in {next(updates).rate for _ in range(3)}


def test_readers_over_tcp_are_paced_by_what_one_sided_ones_leave(source: Source) -> None:
    published, record, client = source
    pacer = published._member.node.caps.pacer
    opened(client, record, "one", "inproc")
    both = opened(client, record, "two", "tcp", "inproc")
    assert pacer.rate == RATE, "nobody reads over tcp yet"
    transport = published._member.reader.transports["tcp"]
    connection = transport.connect(both.endpoints["tcp"], both.lease, time.monotonic() + 5)
    memory = published._publication._held_now().memory
    into = transport.register(memory)  # the very bytes onto themselves
    connection.read(weightwire.types.Span(0, 1000), into).wait(time.monotonic() + 5)
    connection.fence(time.monotonic() + 5)
    assert pacer.rate == RATE / 2


def test_one_reader_more_is_refused_at_once_and_by_type(source: Source) -> None:
    _, record, client = source
    first = opened(client, record, "one", "tcp")
    opened(client, record, "two", "tcp")
    opened(client, record, "two", "tcp")  # the same process: no further reader
    with pytest.raises(SourceBusy, match="serves 2 readers, as many as it takes"):
        opened(client, record, "three", "tcp")
    client.close_read(first.lease)
    opened(client, record, "three", "tcp")


def test_a_source_can_revoke_one_grant(source: Source) -> None:
    published, record, client = source
    first, second = (opened(client, record, name, "inproc") for name in ("one", "two"))
    revoked, other = client.progress(first.lease), client.progress(second.lease)
    next(revoked)
    next(other)
    published._publication.close_read(first.lease)
    with pytest.raises(GenerationMoved):
        list(itertools.islice(revoked, 4))
    assert next(other).rate > 0


def received(settings: Settings, reports: list[object]) -> None:
    module = Encoder(8, seed=99)
    try:
        reports.append(weightwire.receive(module, identity(), settings=settings))
    except weightwire.WeightwireError as error:
        reports.append(error)


def test_a_target_waits_for_a_place_and_says_so(source: Source, settings: Settings) -> None:
    _, record, client = source
    held = [opened(client, record, name, "tcp") for name in ("one", "two")]
    reports: list[object] = []
    target = threading.Thread(target=received, args=(settings, reports))
    target.start()
    time.sleep(1.0)
    assert target.is_alive()
    client.close_read(held[0].lease)
    target.join(20)
    (report,) = reports
    assert isinstance(report, weightwire.LoadReport), report
    assert report.verified
    assert report.seconds["queue"] > 0
    assert any("had no place" in line for line in report.warnings)
    assert any("caps its bandwidth" in line for line in report.warnings)
    registry = process_metrics().registry
    assert registry.get_sample_value("weightwire_max_rate_bytes") == RATE


def test_the_wait_is_bounded_and_ends_in_a_typed_error(source: Source, settings: Settings) -> None:
    _, record, client = source
    held = [opened(client, record, name, "tcp") for name in ("one", "two")]
    reports: list[object] = []
    impatient = Settings(
        url=settings.url, secret_file=settings.secret_file, transports=("tcp",), wait_for_loading=0.6, load_timeout=20.0
    )
    received(impatient, reports)
    (error,) = reports
    assert isinstance(error, SourceBusy)
    assert "after waiting 0.6 s" in str(error)
    for grant in held:
        client.close_read(grant.lease)


def test_while_it_waits_a_target_takes_a_replica_that_has_become_ready(source: Source, settings: Settings) -> None:
    _, record, client = source
    held = [opened(client, record, name, "tcp") for name in ("one", "two")]
    reports: list[object] = []
    target = threading.Thread(target=received, args=(settings, reports))
    target.start()
    time.sleep(0.5)
    with weightwire.publish(Encoder(8, 1), identity(), settings=settings) as newcomer:
        target.join(20)
        (report,) = reports
        assert isinstance(report, weightwire.LoadReport), report
        assert report.verified
        assert all(newcomer._member.incarnation[:8] in share.peer for share in report.shares)
    for grant in held:
        client.close_read(grant.lease)


def test_a_one_sided_target_paces_itself_and_reports_it(settings: Settings) -> None:
    slow = Settings(url=settings.url, secret_file=settings.secret_file, transports=("inproc",), max_rate=4e6)
    reports: list[object] = []
    with weightwire.publish(Encoder(8, 1), identity(), settings=slow) as published:
        began = time.monotonic()
        received(slow, reports)
        elapsed = time.monotonic() - began
        assert published.report.nbytes > 4_400_000
    (report,) = reports
    assert isinstance(report, weightwire.LoadReport), report
    assert report.verified
    assert elapsed > report.nbytes / 4e6 - 0.1
    assert report.seconds["paced"] > 0.5
