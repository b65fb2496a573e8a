from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cli_process import Done, weightwire

from weightwire.cli.doctor import Verdict, check_digest, check_ports, check_rdma, check_secret, judge_transports, probe
from weightwire.config import Settings
from weightwire.engines.native.support import ROWS


def verdicts(done: Done) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in json.loads(done.out)}


def test_doctor_reads_for_real_over_tcp(tmp_path: Path) -> None:
    done = weightwire(tmp_path, "doctor", "--json")
    assert done.code == 0, done
    checks = {check["name"]: check for check in json.loads(done.out)}
    assert checks["tcp"]["verdict"] == "ok"
    assert "64 MiB read and compared" in checks["tcp"]["detail"]
    assert "tcp" in checks["transports"]["detail"]
    assert checks["digest"] == dataclasses.asdict(check_digest())
    assert list(tmp_path.iterdir()) == []  # looking makes no secret


def test_doctor_fails_where_what_is_asked_for_does_not_work(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret that everybody can read\n")
    secret.chmod(0o644)
    options = ["--json", "--seconds", "1", "--secret-file", str(secret)]
    done = weightwire(tmp_path, "doctor", *options, variables={"WEIGHTWIRE_BIND": "203.0.113.1"})
    assert done.code == 1
    assert verdicts(done)["secret"] == "FAIL"
    assert verdicts(done)["ports"] == "FAIL"
    assert "chmod 600" in done.out
    assert "everybody" not in done.out + done.err


def test_a_digest_that_was_not_compiled_is_a_note_with_the_reason() -> None:
    check = check_digest("it was not compiled")
    assert check.verdict is Verdict.NOTE
    assert "it was not compiled; install a C compiler" in check.detail


def result(*, ok: bool, path: str = "") -> dict[str, Any]:
    return {"ok": ok, "detail": "found so", "path": path, "gbps": 1.0}


@pytest.mark.parametrize(
    ("nixl", "tcp", "settings", "expected"),
    [
        (True, True, Settings(), {"nixl": "ok", "tcp": "ok", "transports": "ok"}),
        (False, True, Settings(), {"nixl": "note", "tcp": "ok", "transports": "ok"}),
        (False, False, Settings(), {"nixl": "FAIL", "tcp": "FAIL", "transports": "FAIL"}),
        (False, False, Settings(transports=("tcp",)), {"nixl": "note", "tcp": "FAIL", "transports": "FAIL"}),
        (False, True, Settings(require_rdma=True), {"nixl": "FAIL", "tcp": "ok", "transports": "ok"}),
    ],
)
def test_verdicts_depend_on_what_is_asked_for(
    nixl: bool, tcp: bool, settings: Settings, expected: dict[str, str]
) -> None:
    checks = judge_transports({"nixl": result(ok=nixl), "tcp": result(ok=tcp)}, settings)
    assert {check.name: str(check.verdict) for check in checks} == expected


def test_the_path_that_was_really_used_is_named() -> None:
    (check, *_) = judge_transports({"nixl": result(ok=True, path="nixl/ucx:cma")}, Settings())
    assert check.detail == "found so over nixl/ucx:cma"


def test_h46_no_rdma_device_is_told_and_fails_where_it_is_required(tmp_path: Path) -> None:
    assert check_rdma(required=False, root=tmp_path / "none").verdict is Verdict.NOTE
    assert check_rdma(required=True, root=tmp_path / "none").verdict is Verdict.FAIL
    (tmp_path / "mlx5_0").mkdir()
    assert check_rdma(required=True, root=tmp_path).detail == "mlx5_0"


def test_a_probe_that_hangs_or_fails_is_a_finding() -> None:
    slow = probe("tcp", 0.05)
    assert (slow["ok"], slow["detail"]) == (False, "no answer within 0.05 s")
    unknown = probe("nonsense", 60)
    assert not unknown["ok"]
    assert "no transport is called 'nonsense'" in unknown["detail"]


def test_h44_an_address_that_does_not_reach_us_is_found() -> None:
    assert check_ports(None, None).verdict is Verdict.OK
    wrong = check_ports("127.0.0.1", "127.0.0.2")
    assert wrong.verdict is Verdict.FAIL
    assert "127.0.0.2" in wrong.detail
    assert "WEIGHTWIRE_ADVERTISE" in wrong.detail


def test_a_secret_that_is_not_there_yet_is_no_fault(tmp_path: Path) -> None:
    missing = check_secret(tmp_path / "secret")
    assert missing.verdict is Verdict.FAIL  # a named file must exist; only the user's own is made


def test_the_matrix_is_the_table_that_the_code_uses(tmp_path: Path) -> None:
    done = weightwire(tmp_path, "doctor", "--matrix", "--json")
    assert done.code == 0, done
    assert json.loads(done.out) == [dataclasses.asdict(row) for row in sorted(ROWS)]
    assert "nvfp4_awq" in weightwire(tmp_path, "doctor", "--matrix").out
