from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client import generate_latest

from weightwire.errors import ConfigError
from weightwire.observability.metrics import PHASES, RECEIVED, SERVED, SPECS, Metrics, process_metrics, serve_metrics


def shown(metrics: Metrics) -> list[str]:
    return [line for line in generate_latest(metrics.registry).decode().splitlines() if not line.startswith("#")]


def test_plain_values_come_out_as_prometheus_metrics() -> None:
    metrics = Metrics()
    metrics.phase("transfer", 0.3)
    metrics.moved("tcp", RECEIVED, 1 << 30)
    metrics.moved("tcp", SERVED, 5)
    metrics.load("peer")
    metrics.retry("PeerLost")
    metrics.bad_leaves(2)
    metrics.slow_path("nixl", "tcp")
    metrics.path("nixl", "nixl/ucx:cma")
    metrics.leases(3)
    metrics.held(17)
    metrics.live_leases(6)
    metrics.request("FindReplicas")
    lines = shown(metrics)
    for line in (
        'weightwire_phase_seconds_sum{phase="transfer"} 0.3',
        f'weightwire_bytes_total{{direction="received",transport="tcp"}} {float(1 << 30)}',
        'weightwire_bytes_total{direction="served",transport="tcp"} 5.0',
        'weightwire_loads_total{outcome="peer"} 1.0',
        'weightwire_retries_total{reason="PeerLost"} 1.0',
        "weightwire_bad_leaves_total 2.0",
        'weightwire_slow_path_total{expected="nixl",used="tcp"} 1.0',
        'weightwire_transport_path_info{path="nixl/ucx:cma",transport="nixl"} 1.0',
        "weightwire_read_leases 3.0",
        "weightwire_raw_held_bytes 17.0",
        "weightwire_live_leases 6.0",
        'weightwire_requests_total{method="FindReplicas"} 1.0',
    ):
        name = line.rsplit(" ", 1)[0]
        found = [each for each in lines if each.rsplit(" ", 1)[0] == name]
        assert [float(each.rsplit(" ", 1)[1]) for each in found] == [float(line.rsplit(" ", 1)[1])], name


def test_h46_a_slow_path_has_a_metric() -> None:
    metrics = Metrics()
    assert not [line for line in shown(metrics) if "slow_path_total{" in line]
    metrics.slow_path("rdma", "tcp")
    assert 'weightwire_slow_path_total{expected="rdma",used="tcp"} 1.0' in shown(metrics)


def test_only_one_state_is_shown() -> None:
    metrics = Metrics()
    for state in ("LOADING", "READY", "READY", "PAUSED", "READY"):
        metrics.state(state)
    assert [line for line in shown(metrics) if line.startswith("weightwire_state")] == [
        'weightwire_state{state="READY"} 1.0'
    ]


BAD: list[Callable[[Metrics], object]] = [
    lambda m: m.phase("nonsense", 1.0),
    lambda m: m.phase("transfer", "soon"),  # type: ignore[arg-type]
    lambda m: m.moved("tcp", RECEIVED, -1),
    lambda m: m.moved("tcp", RECEIVED, None),  # type: ignore[arg-type]
    lambda m: m.leases("many"),  # type: ignore[arg-type]
    lambda m: m.live_leases(None),  # type: ignore[arg-type]
    lambda m: m.bad_leaves(1 << 100000),
]


@pytest.mark.parametrize("call", BAD)
def test_metrics_never_raise(call: Callable[[Metrics], object], caplog: pytest.LogCaptureFixture) -> None:
    call(Metrics())
    assert "a metric was not recorded" in caplog.text


def test_two_objects_do_not_share_and_the_process_has_one() -> None:
    one, other = Metrics(), Metrics()
    one.leases(1)
    assert "weightwire_read_leases 0.0" in shown(other)
    assert process_metrics() is process_metrics()


def test_the_table_is_complete_and_documented() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)
    assert all(spec.name.startswith("weightwire_") and spec.doc.endswith(".") for spec in SPECS)
    assert {"discover", "register", "transfer", "verify", "post_load"} < set(PHASES)


def test_metrics_are_served_over_http_and_the_port_is_freed() -> None:
    metrics = Metrics()
    metrics.leases(4)
    server = serve_metrics("127.0.0.1", 0, metrics)
    host, port = server.address
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        assert "weightwire_read_leases 4.0" in answer.read().decode()
    server.close()
    server.close()
    serve_metrics(host, port, metrics).close()


def test_a_client_that_says_nothing_does_not_hold_up_the_others() -> None:
    server = serve_metrics("127.0.0.1", 0, Metrics())
    with socket.create_connection(server.address, timeout=10):
        began = time.monotonic()
        with urllib.request.urlopen("http://{}:{}/metrics".format(*server.address), timeout=10) as answer:
            assert answer.status == 200
        server.close()
        assert time.monotonic() - began < 5


def test_h50_a_taken_port_is_an_error() -> None:
    server = serve_metrics("127.0.0.1", 0, Metrics())
    _, port = server.address
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use; choose another port"):
        serve_metrics("127.0.0.1", port, Metrics())
    code = (
        "import sys\nfrom weightwire.errors import ConfigError\n"
        "from weightwire.observability.metrics import serve_metrics\n"
        "try:\n serve_metrics('127.0.0.1', int(sys.argv[1]))\nexcept ConfigError:\n sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(port)], timeout=60, check=False).returncode == 7
    server.close()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("203.0.113.1", 0)])
def test_what_cannot_be_listened_on_is_a_config_error(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"metrics cannot be served on {host}:{port}"):
        serve_metrics(host, port, Metrics())
