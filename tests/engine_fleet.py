"""Replicas as real processes, for tests: started, watched, questioned, hurt and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from runtime_models import BASE, random_tensors
from safetensors.torch import save_file

from weightwire.auth import load_secret
from weightwire.engines.native.events import Event
from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.replica import Replica
from weightwire.metadata.client import MetadataClient
from weightwire.wire.reports import SourceView

HERE = Path(__file__).parent
LOAD_S = 90.0
PROMPTS = [[3, 14, 15, 92, 65], [35, 8, 9]]
TOKENS = 6

SLOW = {"throttle_s": 0.1}
"""Faults of a source that takes about two seconds for ``BIG``."""

# 39 leaves: enough to be in the middle of
BIG: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}


def write_bf16(directory: Path, changes: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """A checkpoint of ``runtime_models.BASE`` with ``changes``, in bfloat16."""
    config = {**BASE, **(changes or {})}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in random_tensors(config, seed).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def bare(checkpoint: Path) -> Path:
    """The same directory without weights."""
    directory = checkpoint.with_name(checkpoint.name + "-bare")
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text((checkpoint / "config.json").read_text())
    return directory


@dataclass(kw_only=True)
class Watch:
    """One replica under watch."""

    replica: Replica = field(init=False)
    events: list[Event] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def hear(self, event: Event) -> None:
        with self._news:
            self.events.append(event)
            self._news.notify_all()

    def wait_for(self, wanted: Callable[[Event], bool], timeout: float = LOAD_S) -> Event:
        """The first event that is ``wanted``, past ones included."""
        with self._news:
            found = self._news.wait_for(lambda: next(filter(wanted, self.events), None), timeout)
        assert found is not None, [event for event in self.events if event["event"] != "progress"]
        return found

    def count(self, name: str) -> int:
        """How many events of that name there were."""
        with self._news:
            return sum(event["event"] == name for event in self.events)

    def said(self, name: str, timeout: float = LOAD_S) -> Event:
        return self.wait_for(lambda event: event["event"] == name, timeout)

    def moved(self, phase: str, fraction: float, timeout: float = LOAD_S) -> Event:
        """Wait until ``phase`` has got that far."""
        return self.wait_for(
            lambda event: (
                event["event"] == "progress"
                and event["phase"] == phase
                and _number(event["done"]) >= fraction * _number(event["total"])
            ),
            timeout,
        )

    def loaded(self, timeout: float = LOAD_S) -> list[dict[str, Any]]:
        """The report of each rank."""
        return [dict(event) for event in self.replica.loaded(timeout)]

    def report(self) -> dict[str, Any]:
        """Of a replica with one rank that has loaded."""
        (event,) = self.loaded()
        report: dict[str, Any] = event["report"]
        return report

    def ask(self, command: str, answer: str, **arguments: Any) -> list[Event]:
        """Each rank's answer."""
        self.replica._tell({"do": command, **arguments})
        return self.replica._collect(answer, 60)

    def digest(self, role: str = "target") -> list[list[str]]:
        """What the tensors of each rank hold now: content id, derived id."""
        events = self.ask("digest", "digest", role=role)
        return [[str(event["content_id"]), str(event["derived_id"])] for event in events]

    def tokens(self) -> list[list[int]]:
        return self.replica.generate(PROMPTS, TOKENS)

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        started = self.wait_for(lambda event: event["event"] == "started" and event["rank"] == rank)
        os.kill(int(_number(started["pid"])), number)

    def end(self) -> list[int]:
        """Leave in peace: the exit codes."""
        self.leave()
        return self.replica.stop()

    def leave(self) -> None:
        """Have it leave, without waiting (the interpreter takes seconds to end after torch)."""
        for rank in self.replica.ranks:
            assert rank.stdin is not None
            rank.stdin.close()

    def kill(self) -> None:
        """Whatever state it is in; the zygote kills a rank whose shadow is gone."""
        for rank in self.replica.ranks:
            rank.kill()
        self.replica.stop()


def _number(value: Any) -> float:
    assert isinstance(value, int | float)
    return value


@contextlib.contextmanager
def zygote(socket: Path) -> Iterator[Path]:
    """A running zygote at ``socket``."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "engine_zygote.py"), "serve", str(socket)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield socket
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


@dataclass(kw_only=True)
class Fleet:
    """Starts replicas against one metadata server, and ends them all."""

    url: str
    secret_file: Path
    zygote: Path
    watches: list[Watch] = field(default_factory=list)

    def start(
        self,
        checkpoint: Path,
        model_id: str,
        *,
        env: dict[str, str] | None = None,
        faults: dict[str, Any] | None = None,
        **options: Any,
    ) -> Watch:
        """A replica; ``options`` are those of ``ReplicaOptions``."""
        given: dict[str, Any] = {"load_format": "presharded", "revision": "r1"} | options
        watch = Watch()
        watch.replica = Replica(
            ReplicaOptions(model=str(checkpoint), model_id=model_id, **given),
            self.environment() | {"RANK_FAULTS": json.dumps(faults or {})} | (env or {}),
            watch.hear,
            (sys.executable, "-S", "-E", str(HERE / "engine_zygote.py"), str(self.zygote)),
        )
        self.watches.append(watch)
        return watch

    def source(self, checkpoint: Path, model_id: str, **options: Any) -> Watch:
        """A replica that reads the disk and publishes."""
        return self.start(checkpoint, model_id, **({"env": {"WEIGHTWIRE_ROLE": "source"}} | options))

    def target(self, checkpoint: Path, model_id: str, **options: Any) -> Watch:
        """A replica that only loads."""
        env = {"WEIGHTWIRE_ROLE": "target"} | options.pop("env", {})
        return self.start(checkpoint, model_id, env=env, **options)

    def sources(self, model_id: str) -> list[SourceView]:
        """What the metadata server has of a model."""
        with MetadataClient(self.url, load_secret(self.secret_file)) as client:
            return client.sources(model_id)

    def eventually(self, model_id: str, wanted: Callable[[Sequence[SourceView]], bool], timeout: float = 15.0) -> None:
        """Wait until the server's view is ``wanted``."""
        until = time.monotonic() + timeout
        while not wanted(views := self.sources(model_id)):
            assert time.monotonic() < until, views
            time.sleep(0.1)

    def end(self, *watches: Watch) -> set[int]:
        """Have them all leave in peace, together: their exit codes."""
        for watch in watches:
            watch.leave()
        return {code for watch in watches for code in watch.end()}

    def kill(self) -> None:
        for watch in self.watches:
            watch.kill()

    def environment(self) -> dict[str, str]:
        """Of every rank."""
        return {
            "WEIGHTWIRE_URL": self.url,
            "WEIGHTWIRE_SECRET_FILE": str(self.secret_file),
            "WEIGHTWIRE_TRANSPORTS": "tcp",
            "WEIGHTWIRE_STALL_TIMEOUT": "3",
            "WEIGHTWIRE_LOAD_TIMEOUT": "60",
            "WEIGHTWIRE_WAIT_FOR_LOADING": "30",
            "WEIGHTWIRE_LOG_LEVEL": "WARNING",
        }
