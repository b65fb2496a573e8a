from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightwire.auth import Secret
from weightwire.config import Settings
from weightwire.observability.logging import setup_logging


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    before = logging.getLogger().level
    path = tmp_path / "log"
    with path.open("w") as stream:
        handler = setup_logging("DEBUG", rank="tp1/3", incarnation="0123456789abcdef", stream=stream)
        yield path
        logging.getLogger().removeHandler(handler)
    logging.getLogger().setLevel(before)
    logging.getLogger("weightwire").setLevel(logging.NOTSET)


DYING = """
import logging, os, signal, sys
from weightwire.observability.logging import setup_logging

setup_logging("INFO", rank="tp1/3", incarnation="0123456789abcdef")
log = logging.getLogger("weightwire.test")
for number in range(500):
    log.info("line %d", number)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_h45_no_line_is_lost_when_a_rank_is_killed(tmp_path: Path) -> None:
    for sink in ("file", "pipe"):
        if sink == "file":
            with (tmp_path / "log").open("wb") as file:
                done = subprocess.run([sys.executable, "-c", DYING], stderr=file, timeout=60, check=False)
            text = (tmp_path / "log").read_text()
        else:
            done = subprocess.run([sys.executable, "-c", DYING], stderr=subprocess.PIPE, timeout=60, check=False)
            text = done.stderr.decode()
        assert done.returncode == -signal.SIGKILL
        lines = text.splitlines()
        assert [line.rsplit("line ", 1)[1] for line in lines] == [str(number) for number in range(500)]
        assert all("[tp1/3 01234567] weightwire.test: " in line for line in lines)


SHARING = """
import logging, sys
from weightwire.observability.logging import setup_logging

setup_logging("INFO", rank=sys.argv[1])
for number in range(300):
    logging.getLogger("weightwire.test").info("%s", sys.argv[1] * 200)
"""


def test_h45_ranks_that_share_a_pipe_do_not_mix_their_lines() -> None:
    reading, writing = os.pipe()
    ranks = [subprocess.Popen([sys.executable, "-c", SHARING, name], stderr=writing) for name in "ab"]
    os.close(writing)
    with os.fdopen(reading) as stream:
        lines = stream.read().splitlines()
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert len(lines) == 600
    assert all(line.endswith(("a" * 200, "b" * 200)) for line in lines)
    assert all(line.count("weightwire.test:") == 1 for line in lines)


def test_h39_a_message_cannot_forge_a_line_or_drive_the_terminal(log_file: Path) -> None:
    logging.getLogger("weightwire.x").info(
        "peer says %s", "hello\n12:00:00.000 I [tp0/1] weightwire: all is well\x1b[2J"
    )
    lines = log_file.read_text().splitlines()
    assert len(lines) == 1
    assert "hello\\n12:00:00" in lines[0]
    assert "\x1b" not in lines[0]


def test_every_line_of_a_traceback_carries_the_mark(log_file: Path) -> None:
    try:
        int("first\nsecond")
    except ValueError:
        logging.getLogger("weightwire.x").exception("it broke")
    lines = log_file.read_text().splitlines()
    assert len(lines) > 3
    assert all("[tp1/3 01234567] weightwire.x: " in line for line in lines)


def test_h49_a_secret_is_never_written(log_file: Path, tmp_path: Path) -> None:
    secret = Secret(b"hunter2hunter2hunter2")
    settings = Settings(secret_file=tmp_path / "secret")
    logging.getLogger("weightwire.x").info("%s %r %s", secret, secret, settings)
    assert "hunter2" not in log_file.read_text()
    assert "Secret(" in log_file.read_text()


def test_setting_up_again_replaces_and_levels_hold(log_file: Path, tmp_path: Path) -> None:
    with (tmp_path / "second").open("w") as stream:
        handler = setup_logging("WARNING", stream=stream)
        logging.getLogger("weightwire.x").info("quiet")
        logging.getLogger("weightwire.x").warning("loud")
        logging.getLogger("somebody.else").info("quiet")
        logging.getLogger().removeHandler(handler)
    assert log_file.read_text() == ""
    lines = (tmp_path / "second").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(" W weightwire.x: loud")
