"""vLLM replicas as real processes, for tests: started, questioned, hurt and ended. Every wait has a bound."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_checkpoints import Checkpoints
from vllm_processes import (
    END_S,
    ENGINE,
    HERE,
    PUBLISH_S,
    START_S,
    Api,
    Forked,
    Offline,
    Process,
    Tokens,
    environment,
    free_port,
)

from weightwire.auth import load_secret
from weightwire.manifest.records import Manifest
from weightwire.metadata.client import MetadataClient
from weightwire.wire.messages import PublicationState
from weightwire.wire.peer_client import PeerClient
from weightwire.wire.reports import SourceView


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where replicas run.

    Attributes:
        state: for logs, and the secret.
        url: of the metadata server.
        zygote: what forks them.
        site: what makes ``vllm_faults`` a plugin.
    """

    state: Path
    url: str
    zygote: Path
    site: Path


@dataclass
class Fleet:
    """Starts replicas, and ends them all."""

    place: Place
    running: list[Process] = field(default_factory=list)

    def offline(self, model: Path, name: str, *, tp: int = 1, **options: Any) -> Offline:
        """A ``vllm.LLM``; see ``_start`` for ``options``."""
        ours, theirs = os.pipe(), os.pipe()
        engine = {"model": str(model), "tensor_parallel_size": tp} | ENGINE | options.pop("engine", {})
        extra = options.pop("extra", {})
        if options.get("load_format", "presharded") == "presharded":
            engine["model_loader_extra_config"] = self._extra(name, extra)
        engine["load_format"] = options.pop("load_format", "presharded")
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | options.pop("env", {})
        where = self._log(name)
        child = self._start({"kind": "offline", "engine": engine}, env, where, (ours[0], theirs[1]), **options)
        os.close(ours[0])
        os.close(theirs[1])
        os.set_blocking(theirs[0], False)
        made = Offline(
            name=where.stem,
            log_file=where,
            child=child,
            commands=os.fdopen(ours[1], "wb"),
            answers=os.fdopen(theirs[0], "rb", buffering=0),
        )
        self.running.append(made)
        return made

    def api(self, model: Path, name: str, *, tp: int = 1, **options: Any) -> Api:
        """``python -m vllm.entrypoints.openai.api_server``; with ``command``, the ``vllm`` command of that name."""
        port = free_port()
        kind = options.pop("command", "api")
        given: dict[str, Any] = {
            **({"--model": model} if kind == "api" else {str(model): None}),
            "--served-model-name": "m",
            "--host": "127.0.0.1",
            "--port": port,
            "--tensor-parallel-size": tp,
            "--load-format": options.pop("load_format", "presharded"),
            "--enforce-eager": None,
        }
        given |= {f"--{key.replace('_', '-')}": value for key, value in ENGINE.items() if value is not True}
        given |= {"--model-loader-extra-config": json.dumps(self._extra(name, options.pop("extra", {})))}
        given |= options.pop("engine", {})
        arguments = [str(part) for option in given.items() for part in option if part is not None]
        where = self._log(name)
        with Path(os.devnull).open("rb") as nothing, where.open("ab") as log:
            child = self._start(
                {"kind": kind, "arguments": arguments},
                options.pop("env", {}),
                where,
                (nothing.fileno(), log.fileno()),
                **options,
            )
        made = Api(name=where.stem, log_file=where, child=child, port=port)
        self.running.append(made)
        return made

    def client(self) -> MetadataClient:
        """Of the metadata server."""
        return MetadataClient(self.place.url, load_secret(self.place.state / "secret"))

    def sources(self, name: str) -> list[SourceView]:
        """What is registered under a model's name."""
        with self.client() as client:
            return client.sources(name)

    def replicas(self, name: str, *states: PublicationState) -> dict[str, list[SourceView]]:
        """Complete replicas in one of ``states`` (READY), by replica incarnation, their ranks in order."""
        found: dict[str, list[SourceView]] = {}
        for view in self.sources(name):
            if view.record.state in (states or (PublicationState.READY,)) and not view.suspect:
                found.setdefault(view.record.replica_incarnation, []).append(view)
        for views in found.values():
            views.sort(key=lambda view: (view.record.role, view.record.coordinates.tp_rank))
        return {life: views for life, views in found.items() if len(views) >= views[0].record.world_size}

    def only(self, name: str, count: int, *watched: Process) -> list[tuple[str, ...]]:
        """The shards of ``count`` replicas that hold the same: content id by rank. Fails where they differ."""
        found = self.until(name, count, PUBLISH_S, *watched)
        ids = {tuple(view.record.content_id for view in views) for views in found.values()}
        weights = {view.record.weights_id for views in found.values() for view in views}
        assert len(found) == count, found
        assert len(ids) == len(weights) == 1, found
        return list(ids)

    def manifest(self, view: SourceView) -> Manifest:
        """What a source says that it holds."""
        record = view.record
        client = PeerClient(record.endpoints[0], record.incarnation, load_secret(self.place.state / "secret"))
        try:
            return client.manifest(record.shard_key, timeout=END_S)[1].manifest
        finally:
            client.close()

    def until(self, name: str, count: int, timeout: float = START_S, *watched: Process) -> dict[str, list[SourceView]]:
        """Once ``count`` complete replicas are READY."""
        until = time.monotonic() + timeout
        while len(found := self.replicas(name)) < count:
            logs = "\n".join(one.tail() for one in watched)
            assert time.monotonic() < until, f"{len(found)} of {count} replicas: {self.sources(name)}\n{logs}"
            time.sleep(0.1)
        return found

    def reading(self, name: str, timeout: float = START_S, *watched: Process) -> None:
        """Once somebody reads from a replica of that name."""
        until = time.monotonic() + timeout
        with self.client() as client:
            while not any(view.record.active_reads for view in client.sources(name)):
                logs = "\n".join(one.tail() for one in watched)
                assert time.monotonic() < until, f"nobody reads: {client.sources(name)}\n{logs}"
                time.sleep(0.02)

    def kill(self, *processes: Process) -> None:
        """These, or all; in any state."""
        for process in list(processes or self.running):
            process.kill()
            self.running.remove(process)

    def _extra(self, name: str, more: Mapping[str, Any]) -> dict[str, Any]:
        given = {"url": self.place.url, "model_id": name, "revision": "r1", "quiet_s": 0.1} | dict(more)
        return {key: value for key, value in given.items() if value is not None}

    def _log(self, name: str) -> Path:
        base = re.sub(r"\W+", "-", name)
        count = sum(1 for _ in self.place.state.glob(f"{base}.*.log"))
        where = self.place.state / f"{base}.{count}.log"
        where.touch()
        return where

    def _start(
        self,
        what: dict[str, Any],
        env: Mapping[str, str],
        where: Path,
        streams: tuple[int, int],
        *,
        faults: Mapping[str, Any] | None = None,
        fresh: bool = False,
    ) -> Forked | subprocess.Popen[bytes]:
        """Forked from the zygote, or a ``fresh`` interpreter; with ``faults`` (see ``vllm_faults``)."""
        full = environment({"WEIGHTWIRE_SECRET_FILE": str(self.place.state / "secret"), **env})
        if faults or what["kind"] == "serve":
            full["PYTHONPATH"] += f"{os.pathsep}{self.place.site}"
        if faults:
            full["VLLM_TEST_FAULTS"] = json.dumps(dict(faults))
        with where.open("ab") as log:
            if not fresh:
                return Forked(self.place.zygote, what, full, (*streams, log.fileno()))
            command = [sys.executable, str(HERE / "vllm_child.py"), json.dumps(what)]
            return subprocess.Popen(
                command, env=full, stdin=streams[0], stdout=streams[1], stderr=log, start_new_session=True
            )


RUNNING = 3
"""Shared sources at a time."""


@dataclass(frozen=True)
class Known:
    """A source that cases share.

    Attributes:
        name: that it is published under.
        replica: it.
        tokens: its answers.
    """

    name: str
    replica: Offline
    tokens: Tokens


@dataclass
class Shared:
    """Sources that many cases read from: started on first use, left alone, ended with the session.

    The ones used last are running, no more than ``RUNNING``: an idle vLLM takes a tenth of a core.
    """

    fleet: Fleet
    checkpoints: Checkpoints
    _known: dict[str, Known] = field(default_factory=dict)
    _running: list[str] = field(default_factory=list)

    def source(self, kind: str, *, tp: int = 1, processed: bool = False) -> Known:
        """READY, from the disk; ``processed`` publishes that stage alone, where linear weights stay tensors."""
        name = _shared(kind, tp, processed=processed)
        if name not in self._running:
            while len(self._running) >= RUNNING:
                idle = self._known[self._running.pop(0)].replica
                idle.stop()  # withdrawn, and not only lost
                self.fleet.kill(idle)
            extra: dict[str, Any] = {"role": "source"} | ({"stages": ["PROCESSED"]} if processed else {})
            faults = {"plain_linear": True} if processed else None
            source = self.fleet.offline(self.checkpoints.full(kind), name, tp=tp, extra=extra, faults=faults).ready()
            self.fleet.until(name, 1, PUBLISH_S, source)
            known = self._known.get(name)
            self._known[name] = Known(name, source, known.tokens if known else source.tokens())
        else:
            self._running.remove(name)
        self._running.append(name)
        return self._known[name]

    def name(self, kind: str, tp: int = 1) -> str:
        """What a running source of that kind is published as."""
        return self.source(kind, tp=tp).name

    def tokens(self, kind: str, tp: int = 1) -> Tokens:
        """That source's answers, also once it has ended."""
        known = self._known.get(_shared(kind, tp))
        return known.tokens if known else self.source(kind, tp=tp).tokens


def _shared(kind: str, tp: int, *, processed: bool = False) -> str:
    return f"shared/{kind}-{tp}{'-processed' * processed}"


def write_site(root: Path) -> Path:
    """A directory to put on the path, which makes ``vllm_faults`` a plugin of vLLM.

    Its ``vllm`` command asks for a distribution called ``vllm``, which the CPU build is not.
    """
    import vllm

    version = vllm.__version__.partition("+")[0]
    named = root / f"vllm-{version}.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    info = root / "vllm_faults-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-faults\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfaults = vllm_faults:register\n")
    return root
