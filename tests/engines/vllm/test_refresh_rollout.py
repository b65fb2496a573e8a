"""The calls that move a server to other weights, against one that answers as vLLM does, or fails at one of them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from weightwire.engines.vllm import rollout
from weightwire.engines.vllm.rollout import Gone, Refused, Rollout
from weightwire.engines.vllm.staging import Request

WHY = "weightwire: nobody serves it; start one"
SAID = f"Call to collective_rpc method failed: Worker failed with error '{WHY}', please check the stack trace above"


@dataclass
class Server:
    """Answers POST and GET with what it was told; ``calls`` are the paths and bodies in their order.

    Attributes:
        fails: path -> status, for that path and every call of it.
        slow_s: path -> seconds before it answers, the first time.
        resets: answers of ``reset_prefix_cache``; True when they are used up.
        dead_after: path after which nothing is answered any more.
    """

    fails: dict[str, int] = field(default_factory=dict)
    slow_s: dict[str, float] = field(default_factory=dict)
    resets: list[bool] = field(default_factory=list)
    dead_after: str = ""
    paused: bool = False
    calls: list[tuple[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    url: str = ""

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append((path, body))
        name = path.partition("?")[0].strip("/")
        time.sleep(self.slow_s.pop(name, 0.0))
        if self.dead_after and any(self.dead_after in earlier for earlier, _ in self.calls[:-1]):
            return 500, {"error": {"message": "EngineDeadError"}}
        if name in self.fails:
            return self.fails[name], {"error": {"message": SAID}}
        if name in ("pause", "resume"):
            self.paused = name == "pause"
        if name == "is_paused":
            return 200, {"is_paused": self.paused}
        if name == "reset_prefix_cache":
            return 200, {"success": self.resets.pop(0) if self.resets else True}
        return 200, {}

    @property
    def paths(self) -> list[str]:
        """Without the questions for its health, which change nothing."""
        return [path.strip("/") for path, _ in self.calls if path != "/health"]


@pytest.fixture
def server() -> Iterator[Server]:
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        def do_GET(self) -> None:
            self._answer(b"")

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, body: bytes) -> None:
            told.keys.add(self.headers.get("Authorization", ""))
            status, said = told.answer(self.path, json.loads(body) if body else None)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        told.url = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield told
        listening.shutdown()
        thread.join()


def move(server: Server, **how: Any) -> dict[str, float]:
    return Rollout(url=server.url, request=Request(ordinal=2), **how).run()


STAGING = ["is_paused", "start_weight_update", "update_weights"]
ENDED = "finish_weight_update"
ABANDONED = ["update_weights", ENDED]
"""Never ended with something staged: that would swap it in."""


def test_the_calls_in_their_order(server: Server) -> None:
    seconds = move(server, mode="abort")
    caches = ["reset_prefix_cache?reset_external=true", "reset_mm_cache", "reset_encoder_cache"]
    assert server.paths == [*STAGING, "pause?mode=abort", ENDED, *caches, "resume"]
    assert dict(server.calls)["/update_weights"] == {"update_info": {"ordinal": 2}}
    assert dict(server.calls)["/finish_weight_update"] == {"weight_version": "ordinal 2"}
    assert not server.paused
    assert seconds.keys() == {"stage", "drain", "swap", "paused"}
    assert seconds["paused"] >= seconds["swap"]


def test_nothing_is_paused_where_staging_fails(server: Server) -> None:
    server.fails["update_weights"] = 500
    with pytest.raises(Refused, match="nobody serves it; start one; the old weights serve") as refused:
        move(server)
    assert "please check" not in refused.value.problem
    assert server.paths == [*STAGING, ENDED]


def test_a_server_that_ends_while_it_stages_is_not_said_to_serve(server: Server) -> None:
    server.fails |= {"update_weights": 500, "health": 503}
    with pytest.raises(Gone, match="the server ended while it staged"):
        move(server)
    assert server.paths == [*STAGING, ENDED]


def test_a_server_without_the_endpoints(server: Server) -> None:
    server.fails["is_paused"] = 404
    with pytest.raises(Refused, match="start it with VLLM_SERVER_DEV_MODE=1"):
        move(server)


def test_a_server_that_somebody_else_paused_stays_paused(server: Server) -> None:
    server.paused = True
    with pytest.raises(Refused, match="is paused already"):
        move(server)
    assert server.paths == ["is_paused"]


def test_requests_that_do_not_end_in_time(server: Server) -> None:
    server.slow_s["pause"] = 0.6
    with pytest.raises(Refused, match=r"still under way after 0\.2 s"):
        move(server, drain_s=0.2)
    assert server.paths == [*STAGING, "pause?mode=wait", "resume", *ABANDONED]
    assert server.calls[-2][1] == {"update_info": {"abandon": True}}
    assert server.calls[-1][1] == {}, "an abandoned session must not name a weight version"


def test_staging_that_takes_too_long(server: Server) -> None:
    server.slow_s["update_weights"] = 0.3
    with pytest.raises(Refused, match=r"not staged within 0\.2 s"):
        move(server, stage_s=0.2)
    assert server.paths == [*STAGING, *ABANDONED]


def test_workers_that_do_not_swap_leave_the_old_weights_serving(server: Server) -> None:
    server.fails[ENDED] = 500
    with pytest.raises(Refused, match="nobody serves it"):
        move(server)
    assert server.paths == [*STAGING, "pause?mode=wait", ENDED, "start_weight_update", ENDED, "resume"]
    assert not server.paused


def test_an_engine_that_ended_in_the_swap_is_not_resumed(server: Server) -> None:
    server.fails[ENDED] = 500
    server.dead_after = ENDED
    with pytest.raises(Gone, match="the swap failed and the engine ended"):
        move(server)
    assert "resume" not in server.paths


def test_a_swap_without_an_answer(server: Server) -> None:
    server.slow_s[ENDED] = 0.6
    with pytest.raises(Gone, match="the swap did not end"):
        move(server, swap_s=0.2)
    assert "resume" not in server.paths


def test_a_prefix_cache_that_needs_a_moment(server: Server) -> None:
    server.resets = [False, False]
    move(server)
    assert server.paths.count("reset_prefix_cache?reset_external=true") == 3


def test_a_prefix_cache_that_stays_keeps_the_server_paused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "CALL_S", 0.3)
    server.resets = [False] * 1000
    with pytest.raises(Gone, match="the server stays paused"):
        move(server)
    assert server.paused
    assert "resume" not in server.paths


def test_the_command(server: Server, caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    caplog.set_level("INFO", logger="weightwire.rollout")
    assert rollout.main(["--url", server.url + "/", "--latest", "--api-key-file", str(key)]) == 0
    assert server.keys == {"Bearer sesame"}
    assert dict(server.calls)["/update_weights"] == {"update_info": {"latest": True}}
    assert "weightwire: refreshed (seconds: stage " in caplog.text
    assert "sesame" not in caplog.text + repr(rollout.parse(["--url", "http://x", "--latest"]))
    server.fails["update_weights"] = 500
    assert rollout.main(["--url", server.url, "--ordinal", "3"]) == 1
    assert "weightwire: not refreshed: " in caplog.text
    assert rollout.main(["--url", server.url, "--weights-id", "no"]) == 1
    assert rollout.main(["--url", "file:///etc", "--latest"]) == 1
    assert rollout.main(["--url", server.url, "--latest", "--api-key-file", str(tmp_path / "none")]) == 1
    assert rollout.main(["--url", "http://127.0.0.1:9", "--latest"]) == 2
    for wrong in (["--url", server.url], ["--url", server.url, "--latest", "--ordinal", "1"], ["--latest"]):
        with pytest.raises(SystemExit):
            rollout.main(wrong)
