from __future__ import annotations

import signal
import socket
import stat
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from cli_process import COMMAND, assert_one_line_error, environment, weightwire
from cli_server import publication, serving

from weightwire.auth import load_secret
from weightwire.cli.serve import reachable
from weightwire.wire.metadata_client import MetadataStub


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_tells_its_address_and_ends_gracefully(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as server:
        assert weightwire(tmp_path, "sources", "--url", server.url).out.strip() == "nothing is published"
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
    log = (tmp_path / "serve.log").read_text()
    assert "metadata server listens" in log
    assert "Traceback" not in log


def test_serve_prints_one_line_for_people(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "serve"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
        assert process.stdout.read() == ""
        assert process.wait(10) == 0
    assert line.startswith("metadata server: 127.0.0.1:")
    assert "WEIGHTWIRE_URL" in line


def test_the_secret_is_made_on_first_use_for_this_user_only(tmp_path: Path) -> None:
    with serving(tmp_path):
        path = tmp_path / "weightwire" / "secret"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_text().strip() not in (tmp_path / "serve.log").read_text()


def test_h50_a_port_in_use_is_an_error(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        port = server.url.rsplit(":", 1)[1]
        again = weightwire(tmp_path, "serve", "--port", port, bound=30)
        assert_one_line_error(again, f"127.0.0.1:{port}", "choose a free port")
        metrics = weightwire(tmp_path, "serve", "--metrics-port", port, bound=30)
        assert_one_line_error(metrics, f"metrics cannot be served on 127.0.0.1:{port}", "choose another port")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
        (["--host", "no-such-host.invalid"], "no-such-host.invalid"),
        (["--secret-file", "/nowhere/secret"], "cannot read the secret file /nowhere/secret"),
    ],
)
def test_what_cannot_be_served_is_one_line(tmp_path: Path, options: list[str], part: str) -> None:
    assert_one_line_error(weightwire(tmp_path, "serve", *options, bound=30), part)


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "open"
    path.write_text("hunter2hunter2hunter2")
    path.chmod(0o644)
    done = weightwire(tmp_path, "serve", "--secret-file", str(path))
    assert_one_line_error(done, "can be read by other users", f"chmod 600 {path}")
    assert "hunter2" not in done.err


def test_metrics_count_calls_and_leases(tmp_path: Path) -> None:
    with serving(tmp_path, "--metrics-port", "0") as server:
        stub = MetadataStub(server.url, load_secret(tmp_path / "weightwire" / "secret"))
        stub.publish(publication(0), 5)
        stub.sources("", 5)
        stub.close()
        assert server.metrics is not None
        with urllib.request.urlopen(server.metrics, timeout=10) as answer:
            text = answer.read().decode()
    assert "weightwire_live_leases 1.0" in text
    assert 'weightwire_requests_total{method="Publish"} 1.0' in text
    assert 'weightwire_requests_total{method="Sources"} 1.0' in text


def test_a_server_that_nobody_keeps_talking_to_forgets(tmp_path: Path) -> None:
    with serving(tmp_path, "--ttl", "0.5") as server:
        stub = MetadataStub(server.url, load_secret(tmp_path / "weightwire" / "secret"))
        stub.publish(publication(0), 5)
        deadline = time.monotonic() + 20
        while stub.sources("", 5):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stub.close()


def test_the_address_for_others_is_one_that_they_can_use() -> None:
    assert reachable("127.0.0.1", 5) == "127.0.0.1:5"
    assert reachable("::1", 5) == "[::1]:5"
    assert reachable("0.0.0.0", 5) == f"{socket.gethostname()}:5"
