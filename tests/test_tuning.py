from __future__ import annotations

from pathlib import Path

import pytest

from weightwire.auth import Secret
from weightwire.config import Settings
from weightwire.errors import ConfigError
from weightwire.transport.opening import close_transports, open_transports
from weightwire.tuning import Tuned, load, save, tuning_path

SECRET = Secret(b"a secret of these tests")


def test_what_was_measured_is_what_loads_use(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    assert Settings.from_env(environ).tcp_streams == 0
    save(Tuned(3, 4 << 20), tuning_path(environ))
    settings = Settings.from_env(environ, transports="tcp")
    assert (settings.tcp_streams, settings.tcp_read_bytes) == (3, 4 << 20)
    assert Settings.from_env(environ, tcp_streams=1).tcp_streams == 1
    opened = open_transports(settings, SECRET, None, "127.0.0.1", "127.0.0.1")
    assert opened.transports["tcp"].streams == 3
    close_transports(opened)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"streams": 2}',
        '{"streams": true, "read_bytes": 9}',
        '{"streams": 0, "read_bytes": 1}',
        "x" * 9000,
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        load(path)


def test_values_out_of_bounds_are_refused(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    save(Tuned(1000, 4 << 20), tuning_path(environ))
    with pytest.raises(ConfigError, match="tcp_streams"):
        Settings.from_env(environ)
    with pytest.raises(ConfigError, match="tcp_read_bytes"):
        Settings(tcp_read_bytes=5)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "weightwire").write_text("a file")
    with pytest.raises(ConfigError, match=r"tuning\.json"):
        save(Tuned(1, 1 << 20), tuning_path({"XDG_STATE_HOME": str(tmp_path)}))
