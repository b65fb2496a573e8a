from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cli_process import COMMAND, assert_one_line_error, environment, weightwire

from weightwire.cli.main import main


def test_help_names_every_command(tmp_path: Path) -> None:
    done = weightwire(tmp_path, "--help")
    assert done.code == 0
    for name in ("doctor", "inspect", "serve", "sources", "version"):
        assert f" {name} " in done.out
    assert "Usage: weightwire " in done.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["vrsion"], ["No such command 'vrsion'", "weightwire --help"]),
        (["version", "--jsn"], ["No such option: --jsn", "weightwire version --help"]),
        (["version", "extra"], ["unexpected extra argument", "weightwire version --help"]),
        (["doctor", "--seconds", "soon"], ["--seconds", "valid number", "weightwire doctor --help"]),
        (["doctor", "--seconds", "0"], ["--seconds", "weightwire doctor --help"]),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert len(written.err.splitlines()) == 1
    assert all(part in written.err for part in parts)


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"WEIGHTWIRE_REQUIRE_RDMA": "maybe"}, ["WEIGHTWIRE_REQUIRE_RDMA cannot be 'maybe'", "legal: 1, true"]),
        ({"WEIGHTWIRE_TRANSPORT": "tcp"}, ["WEIGHTWIRE_TRANSPORT", "did you mean WEIGHTWIRE_TRANSPORTS?"]),
        ({"WEIGHTWIRE_URL": "here\nand there"}, ["WEIGHTWIRE_URL cannot be 'here\\nand there'"]),
    ],
)
def test_wrong_settings_are_one_line_and_code_1(tmp_path: Path, variables: dict[str, str], parts: list[str]) -> None:
    assert_one_line_error(weightwire(tmp_path, "doctor", variables=variables), *parts)


@pytest.mark.parametrize("arguments", [["-v", "doctor"], ["doctor", "-v"]])
def test_the_traceback_comes_with_v_only(tmp_path: Path, arguments: list[str]) -> None:
    done = weightwire(tmp_path, *arguments, variables={"WEIGHTWIRE_ROLE": "1"})
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("weightwire: WEIGHTWIRE_ROLE cannot be '1'")


def test_version_says_what_it_stands_on(tmp_path: Path) -> None:
    done = weightwire(tmp_path, "version", "--json")
    assert done.code == 0
    assert {"weightwire", "python", "torch", "grpcio"} <= set(json.loads(done.out))
    assert weightwire(tmp_path, "version").out.startswith("weightwire ")


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    command = [*COMMAND, "version"]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_main_returns_instead_of_exiting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert main(["nonsense"]) == 2
    assert main([]) == 2
    assert "nonsense" in capsys.readouterr().err
