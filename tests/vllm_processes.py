"""vLLM processes, for tests: forked or fresh, questioned, hurt and ended. Every wait has a bound."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SRC = HERE.parent / "src"
START_S = 150.0
"""Until a replica is ready: five to ten seconds, but machines are busy at times."""
PUBLISH_S = 30.0
END_S = 60.0
TAIL = 40
PROMPTS = [
    "The capital of France is",
    "A prime number is",
    "Water boils at",
    "Once upon a time",
    "def fibonacci(n):",
    "The opposite of hot is",
    "List three colours:",
    "In the year 1969",
]
TOKENS = 32
CPU = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
ENGINE: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
}
ROOT_CAUSE = re.compile(r"weightwire: [^;\n]+; [^\n]+")

Tokens = list[list[int]]


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's, without settings of ours, able to import ours; then ``more``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WEIGHTWIRE_", "VLLM_"))}
    places = [str(HERE), str(SRC), *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return kept | CPU | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(places))} | dict(more)


class Forked:
    """A process that the zygote forked, with the few methods of ``Popen`` that are needed."""

    def __init__(self, zygote: Path, options: dict[str, Any], env: dict[str, str], streams: Sequence[int]) -> None:
        request = json.dumps({"options": json.dumps(options), "environment": env}).encode()
        self._line = socket.socket(socket.AF_UNIX)
        self._line.settimeout(END_S)
        self._line.connect(str(zygote))
        socket.send_fds(self._line, [len(request).to_bytes(4, "big")], list(streams))
        self._line.sendall(request)
        pid = b""
        while not pid.endswith(b"\n"):
            heard = self._line.recv(1)
            assert heard, "the zygote is gone"
            pid += heard
        self.pid = int(pid)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, ``-N`` after signal N; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """As ``Popen.wait``."""
        if self.returncode is None:
            self._line.settimeout(max(timeout, 1e-3))
            try:
                said = self._line.recv(16)
            except TimeoutError:
                raise subprocess.TimeoutExpired("a forked replica", timeout) from None
            self.returncode = int(said or -signal.SIGKILL)
            self._line.close()
        return self.returncode


@dataclass(kw_only=True)
class Process:
    """A process group and its log."""

    name: str
    log_file: Path
    child: Forked | subprocess.Popen[bytes]

    def log(self) -> str:
        """All that it has printed so far."""
        return self.log_file.read_text(errors="replace")

    def tail(self) -> str:
        """The end of the log, for messages."""
        return "\n".join([f"--- {self.log_file}", *self.log().splitlines()[-TAIL:]])

    def lines(self, part: str) -> list[str]:
        """Lines of the log that hold ``part``."""
        return [line for line in self.log().splitlines() if part in line]

    def resident(self) -> int:
        """Bytes of the process that was started that are in memory and its own."""
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        match = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
        return int(match[1]) * 1024 if match else 0

    def root_causes(self) -> list[str]:
        """Lines in which weightwire says what was fatal, and what to do; vLLM's own tracebacks do not count."""
        return [match[0] for line in self.lines("ERROR") if (match := ROOT_CAUSE.search(line))]

    def wait_for(self, wanted: Callable[[], Any], timeout: float = START_S, *, what: str = "") -> Any:
        """The first true answer of ``wanted``; fails as soon as the process is gone."""
        until = time.monotonic() + timeout
        while not (answer := wanted()):
            gone = self.child.poll()
            if gone is not None and not (answer := wanted()):
                raise AssertionError(f"{self.name} ended with {gone} before {what or wanted}\n{self.tail()}")
            assert time.monotonic() < until, f"{self.name}: no {what or wanted} in {timeout} s\n{self.tail()}"
            time.sleep(0.05)
        return answer

    def says(self, part: str, timeout: float = START_S) -> str:
        """The first line with ``part``, waited for."""
        line: str = self.wait_for(lambda: next(iter(self.lines(part)), None), timeout, what=part)
        return line

    def ends(self, timeout: float) -> int:
        """Its exit code, waited for."""
        try:
            return self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout} s\n{self.tail()}") from None

    def signal(self, number: signal.Signals) -> None:
        """To all its processes."""
        for send in (os.killpg, os.kill):  # it leads its group a moment after its start
            with contextlib.suppress(ProcessLookupError):
                send(self.child.pid, number)

    def terminate(self) -> None:
        """SIGTERM to the one that was started, as a supervisor sends it."""
        os.kill(self.child.pid, signal.SIGTERM)

    def kill(self) -> None:
        """All its processes, whatever state they are in."""
        self.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(END_S)


@dataclass(kw_only=True)
class Offline(Process):
    """A ``vllm.LLM`` in a process."""

    commands: Any
    answers: Any
    _events: list[dict[str, Any]] = field(default_factory=list)
    _partial: bytes = b""

    def event(self, name: str, timeout: float) -> dict[str, Any]:
        """The oldest event of that name that nobody has taken yet."""
        answer: dict[str, Any] = self.wait_for(lambda: self._take(name), timeout, what=f"event {name}")
        return answer

    def ready(self, timeout: float = START_S) -> Offline:
        """Once the engine has started."""
        self.event("ready", timeout)
        return self

    def tokens(self, prompts: Sequence[str] = PROMPTS, tokens: int = TOKENS) -> Tokens:
        """Greedy answers."""
        self._tell(do="generate", prompts=list(prompts), tokens=tokens)
        made: Tokens = self.event("generated", START_S)["tokens"]
        assert len({tuple(one) for one in made}) == len(prompts), "answers that do not depend on the prompt say nothing"
        return made

    def reload(self, model: Path) -> None:
        """Other weights in place, by an iterator, of which nobody is told."""
        self._tell(do="reload", model=str(model))
        self.event("reloaded", END_S)

    def withdraw(self) -> dict[str, int]:
        """End what its worker publishes: see ``vllm_child``."""
        self._tell(do="withdraw")
        return self.event("withdrawn", END_S)

    def stop(self, timeout: float = END_S) -> int:
        """Leave as a script does at its end: the exit code."""
        self._tell(do="stop")
        return self.ends(timeout)

    def kill(self) -> None:
        super().kill()
        self.commands.close()
        self.answers.close()

    def _tell(self, **command: Any) -> None:
        self.commands.write(json.dumps(command).encode() + b"\n")
        self.commands.flush()

    def _take(self, name: str) -> dict[str, Any] | None:
        while chunk := self.answers.read(65536):  # not blocking
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            self._events += [json.loads(line) for line in lines]
        for event in self._events:
            if event["event"] == name:
                self._events.remove(event)
                return event
        return None


@dataclass(kw_only=True)
class Api(Process):
    """vLLM's OpenAI server in a process."""

    port: int

    def ready(self, timeout: float = START_S) -> Api:
        """Once it answers."""
        self.wait_for(self.healthy, timeout, what="/health")
        return self

    def healthy(self) -> bool:
        """Whether it answers now."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, timeout: float = 60.0, **body: Any) -> dict[str, Any]:
        """POST ``body``; the answer's JSON. Where the server refuses, its log is told."""
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                said: dict[str, Any] = json.loads(answer.read() or b"{}")
                return said
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error}: {error.read().decode()}\n{self.tail()}") from error

    def tokens(self, prompts: Sequence[str] = PROMPTS, tokens: int = TOKENS) -> Tokens:
        """Greedy answers of the completions endpoint."""
        said = self.ask(
            "/v1/completions",
            model="m",
            prompt=list(prompts),
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        return [choice["token_ids"] for choice in sorted(said["choices"], key=lambda choice: int(choice["index"]))]


@contextlib.contextmanager
def zygote(state: Path) -> Iterator[Path]:
    """A running ``vllm_zygote`` and its socket."""
    path = state / "zygote"
    command = [sys.executable, str(HERE / "vllm_zygote.py"), "serve", str(path)]
    with (
        (state / "zygote.log").open("wb") as log,
        subprocess.Popen(
            command, env=environment({}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            heard = next((line for line in process.stdout if line == b"ready\n"), None)
            assert heard, (state / "zygote.log").read_text()
            yield path
        finally:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            process.kill()


@contextlib.contextmanager
def metadata_server(state: Path, *options: str, port: int = 0, where: Sequence[str] = ()) -> Iterator[str]:
    """A running ``weightwire serve``: its address. Its secret is in ``state``; ``where`` goes before its command."""
    if not (state / "secret").exists():
        (state / "secret").touch(mode=0o600)
        (state / "secret").write_text(secrets.token_hex(32))
    command = [*where, sys.executable, "-m", "weightwire.cli", "serve", "--json", "--port", str(port), *options]
    env = environment({"WEIGHTWIRE_SECRET_FILE": str(state / "secret"), "COLUMNS": "200"})
    with (
        (state / "serve.log").open("wb") as log,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        assert process.stdout is not None
        try:
            told = process.stdout.readline()
            assert told, (state / "serve.log").read_text()
            yield json.loads(told)["url"]
        finally:
            process.kill()


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
