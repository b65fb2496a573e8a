from __future__ import annotations

import dataclasses
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import COMMAND, assert_one_line_error, environment, weightwire
from cli_server import IDENTITY, Serving, publication, serving

from weightwire.auth import Secret, load_secret
from weightwire.cli.doctor import Verdict, check_server
from weightwire.config import Settings
from weightwire.errors import GenerationMoved
from weightwire.manifest.records import DIGEST_BYTES, Entry, Layout, Manifest
from weightwire.types import Coordinates, Role, Stage, TensorClass
from weightwire.wire.messages import ManifestHeader
from weightwire.wire.metadata_client import MetadataStub
from weightwire.wire.peer_service import PeerServer

ENTRY = Entry(name="w", dtype="uint8", shape=(4,), order=(0,), kind=TensorClass.WEIGHT, nbytes=4)
MANIFEST = Manifest(layout=Layout(entries=(ENTRY,)), digests=bytes(range(DIGEST_BYTES)))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path, "--ttl", "600") as running:
        yield running


def key(state: Path) -> Secret:
    return load_secret(state / "weightwire" / "secret")


@pytest.fixture
def published(tmp_path: Path, server: Serving) -> Serving:
    stub = MetadataStub(server.url, key(tmp_path))
    for rank in range(2):
        stub.publish(publication(rank), 5)
    stub.close()
    return server


def test_sources_lists_replicas_and_ranks(tmp_path: Path, published: Serving) -> None:
    done = weightwire(tmp_path, "sources", variables={"WEIGHTWIRE_URL": published.url})
    assert done.code == 0
    header, row = (line.split() for line in done.out.splitlines())
    assert header[:8] == ["source", "model", "stage", "weights", "ranks", "state", "bytes", "progress"]
    assert row[:7] == ["f" * 12, "acme/tiny", "LOADED", "e" * 12, "2/2", "READY", "3.0"]
    ranks = weightwire(tmp_path, "sources", "--ranks", "--url", published.url)
    assert [line.split()[4] for line in ranks.out.splitlines()[1:]] == ["tp0/2", "tp1/2"]


def test_sources_gives_everything_as_json(tmp_path: Path, published: Serving) -> None:
    done = weightwire(tmp_path, "sources", "--json", "--url", published.url)
    assert {each["record"]["coordinates"]["tp_rank"] for each in json.loads(done.out)} == {0, 1}
    other = weightwire(tmp_path, "sources", "--json", "--model", "acme/other", "--url", published.url)
    assert json.loads(other.out) == []


def test_watch_goes_on_until_interrupted(tmp_path: Path, published: Serving) -> None:
    command = [*COMMAND, "sources", "--watch", "--json", "--interval", "0.1", "--url", published.url]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    assert [len(each) for each in seen] == [2, 2, 2]


@pytest.mark.parametrize("arguments", [["sources"], ["sources", "--watch"], ["inspect", "abc"]])
def test_a_server_that_is_not_there_is_one_line_soon(tmp_path: Path, arguments: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody answers there, and nobody else gets it
        url = f"127.0.0.1:{taken.getsockname()[1]}"
        done = weightwire(tmp_path, *arguments, "--url", url)
    assert_one_line_error(done, url)
    assert done.seconds < 20


def test_a_server_that_accepts_but_never_answers_is_one_line_soon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        done = weightwire(tmp_path, "sources", "--url", url)
    assert_one_line_error(done, url)
    assert done.seconds < 20


def test_h49_a_wrong_secret_gets_nothing(tmp_path: Path, published: Serving) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("quite another secret\n")
    wrong.chmod(0o600)
    done = weightwire(tmp_path, "sources", "--url", published.url, "--secret-file", str(wrong))
    assert_one_line_error(done, "secret")
    assert "acme/tiny" not in done.err
    assert "quite another" not in done.err
    assert check_server(Settings(url=published.url, secret_file=wrong)).verdict is Verdict.FAIL
    right = Settings(url=published.url, secret_file=tmp_path / "weightwire" / "secret")
    assert check_server(right).verdict is Verdict.OK


def test_no_server_named_says_how_to_name_one(tmp_path: Path) -> None:
    assert_one_line_error(weightwire(tmp_path, "sources"), "--url HOST:PORT", "WEIGHTWIRE_URL")


class OneShard:
    """A peer endpoint that has one manifest and nothing to read."""

    incarnation = "0" * 32

    def __init__(self, shard_key: str) -> None:
        self.shard_key = shard_key

    def manifest(self, shard_key: str) -> tuple[ManifestHeader, Manifest]:
        if shard_key != self.shard_key:
            raise GenerationMoved("not published", "ask again")
        header = ManifestHeader(
            shard_key=shard_key,
            incarnation=self.incarnation,
            generation=3,
            content_id=MANIFEST.content_id,
            derived_id=MANIFEST.derived_id,
            weights_id="e" * 64,
            stage=Stage.LOADED,
            role=Role.TARGET,
            coordinates=Coordinates(tp_rank=0, tp_size=2),
            build_facts={"untied": True},
        )
        return header, MANIFEST

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} is not asked of this endpoint")


def test_inspect_asks_a_live_source(tmp_path: Path, server: Serving) -> None:
    stub = MetadataStub(server.url, key(tmp_path))
    peer = PeerServer(OneShard(publication(0).shard_key), key(tmp_path))  # type: ignore[arg-type]
    try:
        record = publication(0, endpoints=("127.0.0.1:9", f"127.0.0.1:{peer.port}"), content_id=MANIFEST.content_id)
        stub.publish(record, 5)
        shown = weightwire(tmp_path, "inspect", "000000", "--url", server.url)
        assert shown.code == 0, shown
        assert MANIFEST.content_id in shown.out
        assert "untied=True" in shown.out
        saved = tmp_path / "saved.json"
        saved.write_text(weightwire(tmp_path, "inspect", record.shard_key, "--json", "--url", server.url).out)
        same = weightwire(tmp_path, "inspect", "--diff", str(saved), f"127.0.0.1:{peer.port}", "--url", server.url)
        assert same.code == 0, same
        other = tmp_path / "identity.json"
        other.write_text(json.dumps(dataclasses.replace(IDENTITY, tp_size=4).to_dict()))
        differ = weightwire(tmp_path, "inspect", "--diff", "000000", str(other), "--url", server.url)
        assert differ.code == 1
        assert "tp_size" in differ.out
        missing = weightwire(tmp_path, "inspect", "ffffff", "--url", server.url)
        assert_one_line_error(missing, "no source is called ffffff", "sources --ranks")
    finally:
        peer.stop(0)
        stub.close()


def test_inspect_of_a_source_that_is_gone_is_one_line(tmp_path: Path, published: Serving) -> None:
    done = weightwire(tmp_path, "inspect", "1" * 32, "--url", published.url)
    assert_one_line_error(done, "127.0.0.1:9")
    assert done.seconds < 20
