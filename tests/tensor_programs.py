"""Programs that publish tensors by Hugging Face's names (``publish_tensors``): processes, started and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightwire.runtime.distributed import serve_store

HERE = Path(__file__).parent


@dataclass(kw_only=True)
class Programs:
    """Starts them against one metadata server, and kills what is left at the end."""

    url: str
    secret_file: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _stores: list[Any] = field(default_factory=list)

    def start(
        self,
        checkpoint: Path,
        model_id: str,
        *,
        tp: int = 1,
        odd: Mapping[int, dict[str, Any]] | None = None,
        **told: Any,
    ) -> list[list[str]]:
        """One program of ``tp`` ranks that serves: each rank's content id and weights id.

        ``told`` are fields of ``publish_tensors.Options``, ``odd`` further ones by rank.
        """
        store = serve_store() if tp > 1 else None
        self._stores.append(store)
        ranks = []
        for rank in range(tp):
            options = {"url": self.url, "model_id": model_id, "rank": rank, "tp": tp} | told | (odd or {}).get(rank, {})
            options["store"] = store.port if store is not None else 0
            ranks.append(self._start(checkpoint, options))
        self.processes += ranks
        return [self._ready(rank) for rank in ranks]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait(20)
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()
        self.processes.clear()

    def _start(self, checkpoint: Path, options: dict[str, Any]) -> subprocess.Popen[str]:
        environment = os.environ | {
            "WEIGHTWIRE_SECRET_FILE": str(self.secret_file),
            "WEIGHTWIRE_TRANSPORTS": "tcp",
            "WEIGHTWIRE_STALL_TIMEOUT": "30",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(HERE / "publish_tensors.py"), str(checkpoint), json.dumps(options)]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @staticmethod
    def _ready(process: subprocess.Popen[str]) -> list[str]:
        assert process.stdout is not None
        for line in process.stdout:
            word, *ids = line.split()
            if word == "ready":
                return ids
        raise AssertionError(f"a program ended with {process.wait(20)}")
