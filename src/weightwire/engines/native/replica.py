"""A whole replica of the native runtime: its ranks as child processes, started, listened to and ended together.

A rank that ends before it was told to takes the others with it, with one line that says which and why.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from weightwire.engines.native.events import Event, error_of, read
from weightwire.engines.native.options import ReplicaOptions
from weightwire.errors import LoadError, RankLost, WeightwireError
from weightwire.runtime.distributed import serve_store
from weightwire.types import Json, Role

log = logging.getLogger(__name__)

STOP_S = 15.0
"""What ranks get to withdraw and leave before they are killed."""

GIVE_UP_S = 8.0
"""What ranks get to leave that have not loaded yet: nothing of theirs is read by anyone."""


class Replica:
    """Ranks run from construction until ``stop``. A context manager.

    Args:
        options: of the replica.
        environ: variables on top of this process's own, for all ranks (``WEIGHTWIRE_URL`` …).
        heard: called with every event, ``rank`` added, from this object's threads.
        command: how a rank is started; the options follow as the last argument.

    Raises:
        OSError: a process cannot be started.
    """

    def __init__(
        self,
        options: ReplicaOptions,
        environ: Mapping[str, str] | None = None,
        heard: Callable[[Event], None] = lambda _: None,
        command: Sequence[str] = (sys.executable, "-m", "weightwire.engines.native.rank"),
    ) -> None:
        self.options = options
        self._heard = heard
        self._store = serve_store()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stopping = False
        self._loaded = False
        self.ranks = [self._start(rank, command, environ or {}) for rank in range(options.world_size)]
        self._threads = [
            threading.Thread(target=self._listen, args=(rank,), name=f"weightwire-rank-{rank}", daemon=True)
            for rank in range(options.world_size)
        ]
        for thread in self._threads:
            thread.start()

    def loaded(self, timeout: float) -> list[Event]:
        """What each rank's load did, in rank order.

        Raises:
            WeightwireError: the error that ended a rank; all ranks are ended.
        """
        events = self._collect("loaded", timeout)
        self._loaded = True
        return events

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        timeout: float = 300.0,
        *,
        ends: Sequence[int] = (),
        role: Role = Role.TARGET,
    ) -> list[list[int]]:
        """Greedy continuations by the model ``role``, each until ``tokens`` or one of ``ends``; equal on all ranks.

        Raises:
            WeightwireError: a rank refused or ended.
        """
        asked: list[Json] = [list(prompt) for prompt in prompts]
        self._tell({"do": "generate", "prompts": asked, "tokens": tokens, "ends": list(ends), "role": role.value})
        answers = [event["tokens"] for event in self._collect("tokens", timeout)]
        if any(answer != answers[0] for answer in answers):
            raise LoadError("the ranks of one replica gave different tokens", "this is a bug: please report it")
        rows = answers[0]
        assert isinstance(rows, list)
        return [[int(str(token)) for token in row] for row in rows if isinstance(row, list)]

    def stop(self) -> list[int]:
        """Have every rank withdraw and leave; their exit codes (``-9`` for one that had to be killed). Idempotent."""
        self._stopping = True
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                assert rank.stdin is not None
                rank.stdin.close()  # the end of the commands; a frozen or dead rank does not matter here
            if not self._loaded:  # it is not listening to commands yet
                rank.terminate()
        until = time.monotonic() + (STOP_S if self._loaded else GIVE_UP_S)
        codes = [self._leave(rank, until) for rank in self.ranks]
        for thread in self._threads:
            thread.join(STOP_S)
        for rank in self.ranks:
            assert rank.stdout is not None
            rank.stdout.close()
        return codes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, rank: int, command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[str]:
        placed = {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.options.world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        return subprocess.Popen(
            [*command, self.options.to_json()],
            env={**os.environ, **environ, **placed},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _listen(self, rank: int) -> None:
        process = self.ranks[rank]
        assert process.stdout is not None
        try:
            for event in read(process.stdout):
                self._hear({**event, "rank": rank})
        except (WeightwireError, ValueError) as error:
            self._hear({"event": "failed", "rank": rank, "kind": "RankLost", "problem": str(error), "remedy": ""})
        code = process.wait()
        if not self._stopping:
            problem = f"rank {rank} ended with exit code {code}"
            self._hear(
                {"event": "ended", "rank": rank, "kind": "RankLost", "problem": problem, "remedy": "see its log"}
            )

    def _hear(self, event: Event) -> None:
        self._heard(event)
        if event["event"] != "progress":
            self._events.put(event)

    def _tell(self, command: Mapping[str, Json]) -> None:
        for rank, process in enumerate(self.ranks):
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(command) + "\n")
                process.stdin.flush()
            except OSError as error:
                raise RankLost(f"rank {rank} has ended", "see its log") from error

    def _collect(self, wanted: str, timeout: float) -> list[Event]:
        until = time.monotonic() + timeout
        found: dict[int, Event] = {}
        while len(found) < len(self.ranks):
            try:
                event = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                silent = [str(rank) for rank in range(len(self.ranks)) if rank not in found]
                raise RankLost(f"rank {', '.join(silent)} did not answer within {timeout:g} s", "see its log") from None
            if event["event"] in ("failed", "ended", "refused"):
                raise error_of(event)
            if event["event"] == wanted:
                found[int(str(event["rank"]))] = event
        return [found[rank] for rank in range(len(self.ranks))]

    def _leave(self, process: subprocess.Popen[str], until: float) -> int:
        try:
            return process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("a rank did not leave in time and is killed")
            process.kill()
            return process.wait()
