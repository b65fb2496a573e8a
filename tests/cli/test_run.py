from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cli_process import COMMAND, Done, assert_one_line_error, environment, weightwire
from cli_replicas import checkpoint, run, running, settings, without_weights
from cli_server import Serving, serving

pytestmark = pytest.mark.timeout(240)  # a machine that is busy with other tests starts processes slowly

QUESTION = "w1 w2 w3"
LADDER = ["--url", "127.0.0.1:1", "--load-format", "presharded", "--revision", "v1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoint ``tiny``, its copies, and the user's state."""
    place = tmp_path_factory.mktemp("run")
    tiny = checkpoint(place / "tiny")
    without_weights(tiny, place / "bare")
    broken = without_weights(tiny, place / "broken")
    (broken / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-1000])
    (without_weights(tiny, place / "dumb") / "tokenizer.json").unlink()
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Serving]:
    with serving(place, "--ttl", "3") as server:
        yield server


@pytest.fixture(scope="module")
def source(place: Path, server: Serving) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    options = ["--url", server.url, "--model-id", "tiny", "--revision", "v1", "--prompt", QUESTION]
    with running(place, place / "tiny", *options) as source:
        yield source


LOADS: dict[str, tuple[str, list[str]]] = {
    "good": ("bare", ["--accept-unpinned", "--json"]),
    "no revision": ("bare", []),
    "wrong revision": ("bare", ["--revision", "v2"]),
    "wrong tp": ("bare", ["--tp", "2", "--revision", "v1", "--max-amplification", "0"]),
    "nobody": ("bare", ["--revision", "v1", "--model-id", "other"]),
    "corrupt": ("broken", ["--load-format", "auto"]),
}


@pytest.fixture(scope="module")
def loads(place: Path, server: Serving, source: tuple[object, object]) -> Iterator[dict[str, Future[Done]]]:
    """Each of ``LOADS`` against the source, two at a time: most of it is processes that start."""
    assert source
    with ThreadPoolExecutor(2) as pool:

        def load(model: str, options: list[str]) -> Done:
            common = ["--url", server.url, "--load-format", "presharded", "--model-id", "tiny", "--once"]
            return run(place, place / model, *common, "--prompt", QUESTION, *options)

        yield {name: pool.submit(load, *case) for name, case in LOADS.items()}


def test_a_target_takes_its_weights_from_the_source(
    loads: dict[str, Future[Done]], source: tuple[object, dict[str, Any]]
) -> None:
    done, first = loads["good"].result(), source[1]
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert (first["source"], told["source"]) == ("disk", "peer")
    assert told["verified"] is True
    assert told["revision"] == "v1"
    assert told["transports"] == ["tcp"]
    assert told["nbytes"] > 0
    assert told["content_ids"] == first["content_ids"] != [""]
    assert told["weights_id"] == first["weights_id"]
    assert told["published"] == "LOADED"
    assert {"discover", "plan", "transfer", "verify", "publish", "post-load", "total"} <= set(told["seconds"])
    assert any(line.startswith("UNPINNED: NO REVISION WAS NAMED") for line in told["warnings"])
    assert told["answer"] == first["answer"] != ""


def test_stages_of_a_pipeline_and_a_draft(place: Path, source: tuple[object, dict[str, Any]]) -> None:
    options = ["--pp", "2", "--draft-model", str(place / "tiny"), "--once", "--prompt", QUESTION]
    done = run(place, place / "tiny", *options, "--json")
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert len(told["ranks"]) == 2
    assert (told["source"], told["draft_source"]) == ("disk", "disk")
    assert told["answer"] == source[1]["answer"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no revision", ["the only weights ready are", "(v1)", "name a revision"]),
        ("wrong revision", ["v2", "v1", "start one, or see: weightwire sources"]),
        # another of these loads may be listed beside it, still LOADING
        (
            "wrong tp",
            ["of this model there is: ", "LOADED (READY)", "under another identity", "see: weightwire sources"],
        ),
        ("nobody", ["no source", "no model.safetensors", "start one, or see: weightwire sources"]),
        ("corrupt", ["broken/model.safetensors is corrupt or truncated", "download the checkpoint again"]),
    ],
)
def test_what_cannot_be_loaded_is_one_line(loads: dict[str, Future[Done]], name: str, parts: list[str]) -> None:
    done = loads[name].result()
    assert_one_line_error(done, *parts)


@pytest.mark.parametrize(
    ("model", "options", "parts", "code"),
    [
        ("tiny", ["--load-format", "fast"], ["'fast'", "'presharded'", "weightwire run --help"], 2),
        ("tiny", ["--tp", "0"], ["--tp", "weightwire run --help"], 2),
        ("tiny", ["--tp", "2", "--ep", "3"], ["--tp 2 ranks cannot share experts in 3 groups", "divides --tp"], 1),
        ("tiny", ["--tp", "16", "--pp", "8"], ["--tp 16 and --pp 8 make 128 ranks", "at most 64"], 1),
        ("tiny", ["--attention-dp"], ["--attention-dp needs ranks that share a batch", "give --tp 2"], 1),
        ("tiny", ["--draft-model", "nowhere"], ["nowhere is not a directory", "config.json"], 1),
        ("tiny", ["--tp", "2", "--ep", "2"], ["LlamaForCausalLM has no experts to share", "leave ep at 1"], 1),
        ("tiny", ["--dtype", "int8"], ["'int8'", "'bfloat16'"], 2),
        ("nowhere", [], ["nowhere is not a directory", "config.json"], 1),
        ("dumb", ["--prompt", "x"], ["dumb has no tokenizer.json", "--prompt"], 1),
        ("tiny", ["--load-format", "presharded"], ["no metadata server is named", "--url"], 1),
        ("tiny", ["--url", "127.0.0.1:1"], ["metadata server at 127.0.0.1:1", "check that it runs"], 1),
        ("bare", ["--url", "127.0.0.1:1", "--load-format", "presharded"], ["metadata server at 127.0.0.1:1"], 1),
        ("tiny", [*LADDER, "--on-miss", "fail"], ["metadata server at 127.0.0.1:1 cannot be reached"], 1),
    ],
)
def test_what_makes_no_sense_is_one_line_at_once(
    place: Path, model: str, options: list[str], parts: list[str], code: int
) -> None:
    done = run(place, place / model, "--once", *options)
    assert_one_line_error(done, *parts, code=code)
    assert done.seconds < 30


def test_a_secret_that_does_not_match_is_one_line(place: Path, server: Serving) -> None:
    other = place / "other-secret"
    other.write_text("0123456789abcdef0123456789abcdef")
    other.chmod(0o600)
    options = ["--url", server.url, "--secret-file", str(other), "--load-format", "presharded"]
    done = run(place, place / "bare", *options)
    assert_one_line_error(done, "secret")
    assert "0123456789abcdef" not in done.err


def test_an_unreachable_server_is_a_step_of_the_ladder(place: Path) -> None:
    """With a checkpoint at hand it is read, and people are told why. (It publishes itself once the server is back.)"""
    done = run(place, place / "tiny", "--once", *LADDER, "--prompt", QUESTION, "--max-tokens", "5")
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0].startswith("tiny is ready after ")
    assert "weights from the disk (1 rank)" in lines
    assert any("no peer the metadata server at 127.0.0.1:1 cannot be reached" in line for line in lines)
    assert 1 <= len(lines[lines.index(f"> {QUESTION}") + 1].split()) <= 5
    assert not any("serving" in line for line in lines)


def processes_below(pid: int) -> list[int]:
    """All descendants, parents first."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found[1:]


def gone(processes: list[int], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_a_rank_that_dies_ends_it_with_one_line_and_a_log(place: Path, server: Serving) -> None:
    with running(place, place / "tiny", "--url", server.url, "--model-id", "dying") as (process, _):
        launcher, rank = processes_below(process.pid)
        os.kill(rank, signal.SIGKILL)
        assert process.wait(30) == 1
        assert process.stderr is not None
        (line,) = process.stderr.read().splitlines()
    assert line.startswith("weightwire: rank 0 ended with exit code -9; ")
    directory = Path(line.rsplit("logs are in ", 1)[1].rstrip(")"))
    assert "published LOADED" in (directory / "ranks.log").read_text()
    assert gone([launcher, rank])


def test_ctrl_c_while_loading_leaves_nothing_behind(place: Path, server: Serving) -> None:
    command = [*COMMAND, "run", str(place / "tiny"), "--url", server.url, "--model-id", "early"]
    with subprocess.Popen(
        command, env=environment(place, settings(place)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        until = time.monotonic() + 30
        while not (below := processes_below(process.pid)):
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=40)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert gone(below)


def test_it_serves_until_it_is_told_to_end(
    place: Path, server: Serving, source: tuple[subprocess.Popen[str], dict[str, Any]]
) -> None:
    """The last test: it ends the source."""
    process, _ = source
    listing = weightwire(place, "sources", "--url", server.url, "--model", "tiny", "--json")
    assert [view["record"]["state"] for view in json.loads(listing.out)] == ["READY"]
    below = processes_below(process.pid)
    assert len(below) == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert gone(below)
    after = weightwire(place, "sources", "--url", server.url, "--model", "tiny")
    assert after.out.strip() == "nothing is published"
    assert not [path for path in place.glob("weightwire-run-*") if not any(path.iterdir())]
