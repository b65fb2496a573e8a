"""Move a running vLLM server to other published weights: the calls in their order, each with a bound.

    python -m weightwire.engines.vllm.rollout --url http://host:8000 --ordinal 2

The server runs with ``--weight-transfer-config '{"backend": "weightwire"}'`` and ``VLLM_SERVER_DEV_MODE=1``, which
opens these endpoints to everybody who reaches it: keep its port inside.

1. ``start_weight_update``, ``update_weights``: the new weights are staged and verified. Nothing is paused; where this
   command is told of the metadata server (``--metadata`` or ``WEIGHTWIRE_URL``), the server goes on answering while its
   weights arrive, else vLLM's engine waits for its workers.
2. ``pause``: requests under way end (``wait``) or are aborted (``abort``); new ones queue.
3. ``finish_weight_update``: the swap. ``reset_prefix_cache`` and the other caches: they hold what old weights computed.
4. ``resume``.

Whatever fails before the swap: the session is ended, the engine resumed, the old weights serve. Imports nothing of
vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import secrets
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.engines.vllm.staging import Request, told_key
from weightwire.errors import AuthError, ConfigError, LoadError, MetadataError, WeightwireError
from weightwire.metadata.client import MetadataClient
from weightwire.metadata.decision import ServerDecisions

log = logging.getLogger("weightwire.rollout")

SLICE_S = 2.0
"""One question to the metadata server."""
CALL_S = 30.0
"""For calls that only change a state."""
CACHES = ("reset_mm_cache", "reset_encoder_cache")
RETRY_S = 0.2
MAX_ANSWER = 1 << 20
MODES = ("wait", "abort")
"""Not ``keep``: requests would go on with what the old weights computed for them."""


class Refused(LoadError):
    """The server answered, and said no."""


class Gone(LoadError):
    """The server did not answer within the bound, or not at all."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One server's move.

    Attributes:
        url: of the server.
        request: which weights.
        mode: what becomes of requests that are under way.
        stage_s: bound for staging.
        drain_s: bound for requests that are under way.
        swap_s: bound for the swap.
        api_key: the server's, if it has one.
        metadata: the metadata server, where staging shall go on in the background.
    """

    url: str
    request: Request
    mode: str = "wait"
    stage_s: float = 600.0
    drain_s: float = 120.0
    swap_s: float = 120.0
    api_key: str = field(default="", repr=False)
    metadata: Settings | None = None

    def run(self) -> dict[str, float]:
        """Seconds by phase (``stage``, ``drain``, ``swap``, ``paused``), once the new weights serve.

        Raises:
            Refused: they do not: the old weights serve, and the reason is in the message.
            Gone: the server cannot be reached; after the swap began, its weights are unknown: look at its log.
        """
        seconds: dict[str, float] = {}
        self._check()
        with _timed(seconds, "stage"):
            self._stage()
        began = time.monotonic()
        with _timed(seconds, "drain"):
            self._pause()
        with _timed(seconds, "swap"):
            self._swap()
            self._forget()
        self._call("resume")
        seconds["paused"] = time.monotonic() - began
        return seconds

    def _check(self) -> None:
        try:
            paused = self._call("is_paused", method="GET")
        except Refused as error:
            raise Refused(
                f"{self.url} has no endpoints for weight updates ({error.problem})",
                "start it with VLLM_SERVER_DEV_MODE=1",
            ) from error
        if paused.get("is_paused"):
            raise Refused(f"{self.url} is paused already", "somebody else updates it; wait, or POST /resume")

    def _stage(self) -> None:
        until = time.monotonic() + self.stage_s
        self._call("start_weight_update")
        try:
            if self.metadata is not None:
                self._in_background(self.metadata, until)
            self._update(self.request, until - time.monotonic())
        except Refused as error:
            self._end()
            if not self._healthy():
                raise Gone(f"the server ended while it staged ({error.problem})", "start it again") from error
            raise
        except Gone as error:
            if not self._healthy():
                raise
            self._abandon(self.stage_s)  # answered once staging is over
            raise Refused(
                f"the new weights were not staged within {self.stage_s:g} s",
                "the old weights serve; try again, with a longer --stage-timeout",
            ) from error

    def _in_background(self, settings: Settings, until: float) -> None:
        """Return when staging is over, one way or the other; what came of it is asked afterwards."""
        token = secrets.token_hex(16)
        self._update(dataclasses.replace(self.request, background=True, tell=token), CALL_S)
        try:
            with MetadataClient(str(settings.url), load_secret(settings.secret_file)) as metadata:
                while ServerDecisions(metadata).wait(told_key(token), SLICE_S) is None:
                    if not self._healthy():
                        raise Gone("the server ended while it staged", "see its log; start it again")
                    if time.monotonic() >= until:
                        raise Gone("staging did not end", "see the server's log")
        except (MetadataError, AuthError) as error:
            log.warning("weightwire: waiting with the engine, since %s", error)

    def _update(self, request: Request, timeout: float) -> None:
        self._call("update_weights", {"update_info": request.to_json()}, timeout=max(timeout, 0.1))

    def _pause(self) -> None:
        try:
            self._call(f"pause?mode={self.mode}", timeout=self.drain_s)
        except Gone as error:
            self._call("resume")
            self._abandon()
            raise Refused(
                f"requests were still under way after {self.drain_s:g} s",
                "the old weights serve; try again, with a longer --drain-timeout or with --mode abort",
            ) from error
        except Refused:
            self._call("resume")
            self._abandon()
            raise

    def _swap(self) -> None:
        version = {"weight_version": self.request.describe()} if not self.request.latest else {}
        try:
            self._call("finish_weight_update", version, timeout=self.swap_s)
        except Refused as error:
            if not self._healthy():
                raise Gone(f"the swap failed and the engine ended ({error.problem})", "start it again") from error
            with contextlib.suppress(Refused):  # by the worker that told; now the session is open on all
                self._call("start_weight_update")
            self._end()
            self._call("resume")
            raise
        except Gone as error:
            raise Gone(f"the swap did not end ({error.problem})", "see the server's log; start it again") from error

    def _forget(self) -> None:
        """Drop what the old weights computed; the server stays paused where that cannot be."""
        until = time.monotonic() + CALL_S
        while not self._call("reset_prefix_cache?reset_external=true").get("success"):
            if time.monotonic() >= until:
                raise Gone(
                    "the new weights are in, but the prefix cache could not be reset; the server stays paused",
                    "POST /reset_prefix_cache, then /resume, or start it again",
                )
            time.sleep(RETRY_S)
        for cache in CACHES:
            self._call(cache)

    def _abandon(self, timeout: float = CALL_S) -> None:
        """Drop what was staged, then end the session: one that ends with something staged swaps it in."""
        self._update(Request(abandon=True), timeout)
        self._end()

    def _end(self) -> None:
        """End a session that failed: the worker that told of the failure has ended it already, and says so."""
        with contextlib.suppress(Refused):
            self._call("finish_weight_update", {})

    def _healthy(self) -> bool:
        try:
            self._call("health", method="GET")
        except (Refused, Gone):
            return False
        return True

    def _call(
        self, path: str, body: dict[str, Any] | None = None, *, method: str = "POST", timeout: float = CALL_S
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        asked = urllib.request.Request(f"{self.url}/{path}", data, headers, method=method)  # noqa: S310  (checked)
        where = f"{self.url}/{path.partition('?')[0]}"
        try:
            with urllib.request.urlopen(asked, timeout=timeout) as answer:  # noqa: S310
                said = answer.read(MAX_ANSWER)
        except urllib.error.HTTPError as error:
            raise Refused(f"{where}: {_reason(error)}", "the old weights serve") from error
        except (OSError, ValueError) as error:  # ValueError: an answer that is no HTTP
            raise Gone(f"{where} does not answer ({error})", "see the server's log") from error
        try:
            found = json.loads(said or b"{}")
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def _reason(error: urllib.error.HTTPError) -> str:
    """One line of what vLLM says, without what it wraps around it."""
    try:
        said = json.loads(error.read(MAX_ANSWER))
        text = str(said["error"]["message"])
    except (ValueError, TypeError, KeyError, OSError):
        return f"HTTP {error.code}"
    _, ours, rest = text.partition("weightwire: ")
    text = rest.partition("', please check")[0] if ours else text
    return " ".join(text.split())[:400]


def parse(arguments: Sequence[str] | None = None) -> Rollout:
    """From a command line.

    Raises:
        ConfigError: a value makes no sense.
        SystemExit: as ``argparse``: ``--help``, an unknown option.
    """
    parser = argparse.ArgumentParser(
        prog="python -m weightwire.engines.vllm.rollout",
        description="Move a running vLLM server to other published weights of its model.",
    )
    parser.add_argument("--url", required=True, help="of the server, such as http://host:8000")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--ordinal", type=int, help="take the weights with this ordinal")
    which.add_argument("--latest", action="store_true", help="take the highest ordinal, if it is newer")
    which.add_argument("--weights-id", help="take exactly these weights")
    parser.add_argument("--mode", choices=MODES, default="wait", help="for requests that are under way (%(default)s)")
    parser.add_argument("--stage-timeout", type=float, default=Rollout.stage_s, metavar="S", help="(%(default)g)")
    parser.add_argument("--drain-timeout", type=float, default=Rollout.drain_s, metavar="S", help="(%(default)g)")
    parser.add_argument("--swap-timeout", type=float, default=Rollout.swap_s, metavar="S", help="(%(default)g)")
    parser.add_argument("--metadata", metavar="HOST:PORT", help="of the metadata server (WEIGHTWIRE_URL)")
    parser.add_argument("--api-key-file", type=Path, help="with the server's key, where it has one")
    given = parser.parse_args(arguments)
    url = str(given.url).rstrip("/")
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"--url cannot be {url[:100]!r}", "give http://host:port")
    settings = Settings.from_env(url=given.metadata)
    return Rollout(
        url=url,
        request=Request(ordinal=given.ordinal, weights_id=given.weights_id, latest=given.latest),
        mode=given.mode,
        stage_s=given.stage_timeout,
        drain_s=given.drain_timeout,
        swap_s=given.swap_timeout,
        api_key=_key(given.api_key_file),
        metadata=settings if settings.url else None,
    )


def _key(path: Path | None) -> str:
    try:
        return path.read_text().strip() if path else ""
    except OSError as error:
        raise ConfigError(f"--api-key-file {path} cannot be read ({error.strerror})", "name a readable file") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 the new weights serve, 1 the old ones do, 2 look at the server."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        seconds = parse(arguments).run()
    except Gone as error:
        log.error("weightwire: %s", error)  # noqa: TRY400  (one line is the contract)
        return 2
    except WeightwireError as error:
        log.error("weightwire: not refreshed: %s", error)  # noqa: TRY400
        return 1
    log.info("weightwire: refreshed (seconds: %s)", ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
