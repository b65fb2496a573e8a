"""When a vLLM engine may be read: its front end says so, and the workers of the engine wait for that word.

vLLM's workers publish right after loading, but the engine goes on to profile, allocate its KV cache and capture graphs;
bytes read meanwhile would break both sides. Only the front end, another process, learns when the engine is ready. It
records the word under a key that both sides know, as a write-once decision of the metadata server.

Imports nothing of vLLM and, at import, no gRPC: the front end imports it before it forks the engine.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

from weightwire.errors import WeightwireError
from weightwire.metadata.decision import DecisionStore

log = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name

PATIENCE_S = 1800.0
"""Where a front end will speak: compiling and capturing a large model takes minutes, so silence means little."""
POLL_S = 5.0
"""One question to the server; a cancelled thread ends within it."""
RETRY_S = 2.0
"""After the server did not answer."""
REPEAT_S = 5.0
"""A server that restarted has forgotten the word, so it is repeated after so long, then twice so long, and so on."""
WORD = b"ready"

LAUNCH_VARIABLE = "_WEIGHTWIRE_VLLM_LAUNCH"
LOGGER_VARIABLE = "_WEIGHTWIRE_VLLM_LOGGER"
"""Ours, from a process of vLLM to its children; nobody else sets or reads them."""

_marked: set[int] = set()
"""This process's id once it was marked; more than one where it was forked off a marked one."""


def mark_launch(environ: MutableMapping[str, str]) -> None:
    """Give this launch of vLLM an id that all its processes inherit. Idempotent; call it from the general plugin.

    Several API servers make a configuration each, with an instance id each: only this one is theirs and the engine's.
    A process that ``multiprocessing`` did not start begins a launch of its own, whatever it inherited.

    Args:
        environ: the process's own, ``os.environ``.
    """
    if os.getpid() in _marked:
        return
    _marked.add(os.getpid())
    if multiprocessing.parent_process() is None or LAUNCH_VARIABLE not in environ:
        environ[LAUNCH_VARIABLE] = secrets.token_hex(16)
        environ.pop(LOGGER_VARIABLE, None)


def mark_logger(environ: MutableMapping[str, str]) -> None:
    """Tell the engine's processes, not yet started, that a logger will speak when the engine is ready.

    Args:
        environ: the process's own, ``os.environ``.
    """
    mark_launch(environ)
    environ[LOGGER_VARIABLE] = "1"


def word_key(config: Any, engine_index: int, environ: Mapping[str, str]) -> str:
    """The key of one engine's word: the same in its front end (or ends) and in its workers, and in no other launch.

    Args:
        config: a ``VllmConfig``; not one that vLLM derived from it, which gets another instance id.
        engine_index: of the data-parallel engine.
        environ: of the process.
    """
    suffix = f"_dp{engine_index}"  # added to the engines' own copies where Ray runs them
    name = str(config.instance_id).removesuffix(suffix)
    if _api_servers(config) > 1:
        name = environ.get(LAUNCH_VARIABLE, name)
    return f"weightwire/vllm/{name}/engine-{engine_index}/ready"


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a worker waits for. On several hosts, take rank 0's on all ranks: only its host has the front end.

    Attributes:
        key: under which the word is recorded.
        patience_s: seconds after which the engine is taken to be ready without a word.
    """

    key: str
    patience_s: float

    @classmethod
    def of(cls, config: Any, quiet_s: float, environ: Mapping[str, str]) -> Self:
        """Of a worker.

        Args:
            config: the worker's ``VllmConfig``, as its target model was loaded with.
            quiet_s: the patience where nobody may ever speak, such as with an offline ``LLM``; where a front end
                announced that it will, it is at least ``PATIENCE_S``.
            environ: of the process.
        """
        index = int(config.parallel_config.data_parallel_index)
        several = _api_servers(config) > 1 and LAUNCH_VARIABLE in environ
        will_speak = several or LOGGER_VARIABLE in environ
        patience = max(quiet_s, PATIENCE_S) if will_speak else quiet_s
        return cls(word_key(config, index, environ), patience)


def _api_servers(config: Any) -> int:
    return int(getattr(config.parallel_config, "_api_process_count", 1))


class Readiness:
    """Waits in a thread of its own, and calls back once.

    The callback runs when the word is recorded, or when the patience is over, also where the server cannot be reached
    for all that time. A server that restarts meanwhile does not matter: the front end repeats the word.

    Args:
        store: where the word is recorded.
        expected: which word, and for how long to wait.
        on_ready: called at most once, from the thread; what it raises is logged.
    """

    def __init__(self, store: DecisionStore, expected: Expectation, on_ready: Callable[[], None]) -> None:
        self._store = store
        self._expected = expected
        self._on_ready = on_ready
        self._until = time.monotonic() + expected.patience_s
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._called = False
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="weightwire-readiness", daemon=True)
        self._thread.start()

    def cancel(self) -> bool:
        """Stop: the publication was withdrawn before. Idempotent; does not wait.

        Returns:
            Whether the callback was not called, and never will be. If False it may be running right now.
        """
        with self._lock:
            self._over.set()
            return not self._called

    def _run(self) -> None:
        log.debug("weightwire: waiting for %s, for %.0f s", self._expected.key, self._expected.patience_s)
        try:
            heard = self._wait()
            if self._claim():
                self._tell(heard)
                self._on_ready()
        except WeightwireError as error:
            log.error("weightwire: not offered: %s", error)  # noqa: TRY400  (one line, as users are promised)
        except Exception:  # the thread's edge: nothing of ours may pass unseen
            log.exception("weightwire: not offered; this is a bug")

    def _claim(self) -> bool:
        with self._lock:
            self._called = not self._over.is_set()
            return self._called

    def _tell(self, heard: bool) -> None:
        if heard:
            log.debug("weightwire: the front end says that the engine is ready")
        else:
            patience = self._expected.patience_s
            log.info("weightwire: nobody said within %.0f s that the engine is ready: taken to be", patience)

    def _wait(self) -> bool:
        """Whether the word was heard; returns early when cancelled."""
        while not self._over.is_set() and (left := self._until - time.monotonic()) > 0:
            try:
                if self._store.wait(self._expected.key, min(left, POLL_S)) is not None:
                    return True
            except WeightwireError as error:
                self._complain(error)
                self._over.wait(min(left, RETRY_S))
        return False

    def _complain(self, error: WeightwireError) -> None:
        if not self._complained:
            self._complained = True
            log.warning("weightwire: cannot ask whether the engine is ready, trying on: %s", error)


class Announcement:
    """Records the word and repeats it, ever more rarely, in a thread of its own; never raises, never blocks.

    Args:
        key: see ``word_key``.
        connect: opens the store; called and left in the thread, once for each attempt, so that no connection is open
            between them.
        lasting_s: seconds after which it is not repeated any more: no worker waits longer.
    """

    def __init__(
        self, key: str, connect: Callable[[], AbstractContextManager[DecisionStore]], lasting_s: float = PATIENCE_S
    ) -> None:
        self._key = key
        self._connect = connect
        self._until = time.monotonic() + lasting_s
        self._over = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="weightwire-announcement", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the host is out of threads: vLLM has worse troubles
            log.warning("weightwire: the engine is ready, but nobody is told: %s", error)

    def stop(self) -> None:
        """Repeat it no more. Idempotent; does not wait."""
        self._over.set()

    def _run(self) -> None:
        pause = REPEAT_S
        try:
            while not self._over.is_set() and time.monotonic() < self._until:
                if self._said():
                    self._over.wait(pause)
                    pause *= 2
                else:
                    self._over.wait(RETRY_S)
        except Exception:  # the thread's edge: nothing of ours may pass unseen
            log.exception("weightwire: the engine is ready, but the workers are not told; this is a bug")

    def _said(self) -> bool:
        try:
            with self._connect() as store:
                store.record(self._key, WORD)
        except WeightwireError as error:
            if not self._complained:
                self._complained = True
                log.warning("weightwire: cannot say that the engine is ready, trying on: %s", error)
            return False
        log.debug("weightwire: recorded %s", self._key)
        return True
