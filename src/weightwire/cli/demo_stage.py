"""What the demo plays on: a model, a metadata server, a secret and replicas, all of it gone afterwards."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from weightwire.cli.bars import Bars
from weightwire.cli.children import Child, Event
from weightwire.cli.frame import progress_console
from weightwire.cli.outcome import Outcome
from weightwire.cli.replica import Logs, ReplicaProcess
from weightwire.config import OnMiss, ReplicaRole, Settings
from weightwire.types import Stage as PublishedStage

BUILD_S = 600.0
SERVER_S = 60.0
LABEL = "demo"


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint, and a copy of its directory without any weights."""

    model_id: str
    path: Path
    bare: Path


class Stage:
    """A context manager; ``build`` first, then ``serve``, then ``start`` replicas.

    Args:
        found: settings of this process; what the demo decides itself is overridden.
        tp: ranks of each replica.
        logs: where processes log; standard error where left out.
        console: for progress.
    """

    def __init__(self, found: Settings, tp: int, logs: Logs | None, console: Console | None = None) -> None:
        self._found = found
        self._tp = tp
        self._logs = logs
        self._console = console or progress_console()
        self._open = contextlib.ExitStack()
        self._children: list[Child] = []
        self._directory = Path(tempfile.mkdtemp(prefix="weightwire-demo-"))
        self._secret = self._directory / "secret"
        self._secret.touch(mode=0o600)
        self._secret.write_text(secrets.token_hex(32))
        self._url = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for child in reversed(self._children):
                child.end()  # all at once: each takes a moment to withdraw
            self._open.close()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def build(self) -> Model:
        """The real model, built on first use.

        Raises:
            ConfigError: a package is missing, or the cache cannot be written.
        """
        bare = self._directory / "bare"
        with self._console.status("looking for the checkpoint") as status:

            def heard(event: Event) -> None:
                status.update(f"building the checkpoint, once: {event['text']}")

            command = ["weightwire.engines.native.smollm2", str(bare)]
            with Child("the checkpoint builder", command, log=self._log("checkpoint"), heard=heard) as builder:
                event = builder.expect("checkpoint", BUILD_S)
        return Model(event["model_id"], Path(event["path"]), bare)

    def serve(self) -> str:
        """Start the metadata server; its address.

        Raises:
            WeightwireError: it does not start.
        """
        command = ["weightwire.cli", "serve", "--json", "--secret-file", str(self._secret)]
        server = self._keep(Child("the metadata server", command, log=self._log("server")))
        self._url = str(server.expect("", SERVER_S)["url"])
        return self._url

    def start(self, name: str, model: Model, *, weights: bool) -> tuple[ReplicaProcess, Outcome]:
        """Start one replica and wait until it is ready.

        Args:
            name: of the replica.
            model: which.
            weights: give it the checkpoint; else config and tokenizer only, and no disk to fall back to.

        Raises:
            WeightwireError: it cannot load.
        """
        options = {
            "model": str(model.path if weights else model.bare),
            "model_id": model.model_id,
            "revision": LABEL,
            "tp": self._tp,
            "load_format": "auto" if weights else "presharded",
        }
        with Bars(self._console, transient=True) as bars:
            replica = ReplicaProcess(name, options, environ=self._environ(), log=self._log(name), bars=bars)
            self._keep(replica)
            return replica, replica.ready(self._found)

    def _keep(self, child: Child) -> Child:
        self._children.append(child)
        self._open.enter_context(child)
        return child

    def _log(self, name: str) -> Path | None:
        return self._logs.file(name) if self._logs else None

    def _environ(self) -> dict[str, str]:
        return {
            "WEIGHTWIRE_URL": self._url,
            "WEIGHTWIRE_SECRET_FILE": str(self._secret),
            "WEIGHTWIRE_ROLE": ReplicaRole.AUTO.value,
            "WEIGHTWIRE_STAGES": ",".join(PublishedStage),
            "WEIGHTWIRE_ON_MISS": OnMiss.FAIL.value,
            "WEIGHTWIRE_ACCEPT_UNPINNED": "0",
            "WEIGHTWIRE_LOG_LEVEL": "DEBUG" if self._logs is None else "INFO",
        }
