from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from cli_process import COMMAND, assert_one_line_error, environment, weightwire

SHORT = ("--mib", "16", "--seconds", "1")


def test_tune_measures_loopback_and_writes_what_loads_will_use(tmp_path: Path) -> None:
    file = tmp_path / "weightwire" / "tuning.json"
    dry = weightwire(tmp_path, "bench", "tune", *SHORT, "--dry-run", "--json")
    assert dry.code == 0, dry
    measured = json.loads(dry.out)
    assert {row["streams"] for row in measured["rows"]} >= {1, 2}
    assert all(row["speed"] > 0 for row in measured["rows"])
    assert not file.exists()
    done = weightwire(tmp_path, "bench", "tune", *SHORT)
    assert done.code == 0, done
    assert f"written to {file}" in done.out
    assert json.loads(file.read_text())["streams"] >= 1


def test_tune_measures_the_link_to_another_end(tmp_path: Path) -> None:
    command = [*COMMAND, "bench", "serve", "--host", "127.0.0.1", "--mib", "16"]
    with subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        told = other.stdout.readline().split()
        assert told[:3] == ["weightwire", "bench", "tune"]
        done = weightwire(tmp_path, *told[1:], "--seconds", "1", "--dry-run")
        other.send_signal(signal.SIGTERM)
        assert other.wait(30) == 130
    assert done.code == 0, done
    assert "not written" in done.out


def test_tune_says_why_it_cannot_measure(tmp_path: Path) -> None:
    done = weightwire(tmp_path, "bench", "tune", *SHORT, "--peer", "00")
    assert_one_line_error(done, "endpoint")
    assert_one_line_error(weightwire(tmp_path, "bench", "tune", "--peer", "10.0.0.1"), "bench serve", code=2)
