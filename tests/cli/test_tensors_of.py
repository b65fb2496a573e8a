"""``weightwire run --tensors-of``: weights from a program that publishes tensors by Hugging Face's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import assert_one_line_error
from cli_replicas import checkpoint, run, without_weights
from cli_server import Serving, serving
from publish_tensors import ENGINE
from tensor_programs import Programs

pytestmark = pytest.mark.timeout(240)  # a machine that is busy with other tests starts processes slowly

ASK = ("--load-format", "presharded", "--dtype", "float32", "--revision", "r1", "--tp", "2", "--prompt", "w1 w2 w3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoint ``tiny``, a copy without weights, and the user's state."""
    place = tmp_path_factory.mktemp("tensors-of")
    without_weights(checkpoint(place / "tiny"), place / "bare")
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Serving]:
    with serving(place, "--ttl", "3") as server:
        yield server


def test_it_says_where_its_weights_came_from_and_answers_like_one_that_read_them(place: Path, server: Serving) -> None:
    asked = ["--url", server.url, "--model-id", "tiny", "--once", *ASK, "--tensors-of", ENGINE]
    nobody = run(place, place / "bare", *asked)
    assert_one_line_error(nobody, "no peer (no source", f"tensors of {ENGINE}: no source", "no model.safetensors")
    alone = run(place, place / "tiny", "--dtype", "float32", "--tp", "2", "--prompt", "w1 w2 w3", "--once", "--json")
    programs = Programs(url=server.url, secret_file=place / "weightwire" / "secret")
    try:
        programs.start(place / "tiny", "tiny", tp=2)
        told = json.loads(run(place, place / "bare", *asked, "--json").out)
        shown = run(place, place / "bare", *asked)
    finally:
        programs.kill()
    assert (told["source"], told["verified"], told["published"]) == ("tensors", True, "LOADED")
    assert told["nbytes"] > 0
    assert {"discover", "transfer", "verify"} <= set(told["seconds"])
    assert told["answer"] == json.loads(alone.out)["answer"] != ""
    assert shown.code == 0
    assert "from another program's tensors, every byte verified (2 ranks)" in shown.out
    assert "r1" in shown.out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["--tensors-of is given, and nobody is asked for weights", "--load-format presharded"]),
        (
            ["--load-format", "presharded", "--weights-id", "ab"],
            ["--weights-id pins weights of replicas", "one of them"],
        ),
    ],
)
def test_what_makes_no_sense_is_one_line_at_once(place: Path, options: list[str], parts: list[str]) -> None:
    done = run(place, place / "tiny", "--once", "--tensors-of", ENGINE, *options)
    assert_one_line_error(done, *parts)
