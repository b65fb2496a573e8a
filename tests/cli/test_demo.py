"""The demo as ``make demo`` runs it, once, with the real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_process import assert_one_line_error, weightwire


@pytest.mark.model
@pytest.mark.timeout(400)  # half a minute on two idle cores; the checkpoint may have to be built first
def test_the_demo_moves_a_real_model(tmp_path: Path) -> None:
    done = weightwire(tmp_path, "demo", "--json", bound=390, variables={"TMPDIR": str(tmp_path)})
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["ok"] is True
    first, second, third = told["replicas"]
    assert [each["name"] for each in told["replicas"]] == ["first", "second", "third"]
    assert [each["source"] for each in told["replicas"]] == ["disk", "peer", "peer"]
    assert [each["verified"] for each in (second, third)] == [True, True]
    assert all(len(each["ranks"]) == 3 for each in told["replicas"])
    assert first["content_ids"] == second["content_ids"] == third["content_ids"]
    assert len(set(first["content_ids"])) == 3
    assert second["nbytes"] == third["nbytes"] > 250_000_000
    assert second["transports"]
    phases = {"discover", "plan", "register", "transfer", "verify", "publish", "post-load", "total"}
    assert set(second["seconds"]) == set(third["seconds"]) == phases

    assert set(told["answers"].values()) == {"The capital of France is Paris."}
    assert told["tokens"]["first"] == told["tokens"]["second"]
    assert [len(tokens) for tokens in told["tokens"]["first"]] == [32] * 8
    assert {each["from"] for each in told["third_took"]} <= {
        "first",
        "second",
    }  # the model is small: one may be done first
    assert sum(each["nbytes"] for each in told["third_took"]) == third["nbytes"]
    assert [check["ok"] for check in told["checks"]] == [True, True, True]
    assert not list(tmp_path.glob("weightwire-*"))


def test_a_number_of_ranks_that_the_model_cannot_have_is_one_line(tmp_path: Path) -> None:
    assert_one_line_error(weightwire(tmp_path, "demo", "--tp", "2"), "--tp", "give 1 or 3", code=2)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    variables = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = weightwire(tmp_path, "demo", "--json", variables=variables)
    assert_one_line_error(done, f"cannot write to {tmp_path}/file/weightwire", "set XDG_CACHE_HOME")
    assert not list(tmp_path.glob("weightwire-*"))
