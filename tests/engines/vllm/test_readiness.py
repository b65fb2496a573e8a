from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from wire_samples import OTHER_SECRET, SECRET

from weightwire.auth import Secret
from weightwire.engines.vllm.readiness import (
    LAUNCH_VARIABLE,
    LOGGER_VARIABLE,
    PATIENCE_S,
    WORD,
    Announcement,
    Expectation,
    Readiness,
    mark_launch,
    mark_logger,
    word_key,
)
from weightwire.metadata.client import MetadataClient
from weightwire.metadata.decision import DecisionStore, MemoryDecisions, ServerDecisions
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings

LONG = 60.0
SOON = 15.0
"""Far below ``LONG``, and above anything that a busy machine does to an answer that is due at once."""


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(ServerSettings(secret=SECRET, grace_s=0.1)) as running:
        yield running


@contextlib.contextmanager
def connect(url: str, secret: Secret = SECRET) -> Iterator[DecisionStore]:
    with MetadataClient(url, secret, timeout=2.0) as client:
        yield ServerDecisions(client)


class Worker:
    """One that has published, and counts how often it was told to offer."""

    def __init__(self, store: DecisionStore, key: str, patience_s: float = LONG) -> None:
        self.times: list[float] = []
        self.told = threading.Event()
        self.began = time.monotonic()
        self.readiness = Readiness(store, Expectation(key, patience_s), self._offer)

    def _offer(self) -> None:
        self.times.append(time.monotonic() - self.began)
        self.told.set()

    @property
    def ended(self) -> bool:
        return not self.readiness._thread.is_alive()


@contextlib.contextmanager
def announced(key: str, url: str, secret: Secret = SECRET) -> Iterator[Announcement]:
    announcement = Announcement(key, partial(connect, url, secret))
    try:
        yield announcement
    finally:
        announcement.stop()
        announcement._thread.join(10)
        assert not announcement._thread.is_alive()


def closed_port(server: EmbeddedServer) -> str:
    server.stop()
    return server.url


def eventually(true: Callable[[], bool], within_s: float = SOON) -> bool:
    until = time.monotonic() + within_s
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_h52_two_workers_wait_for_one_word_and_offer_once(server: EmbeddedServer) -> None:
    with connect(server.url) as one, connect(server.url) as two:
        workers = [Worker(store, "life") for store in (one, two)]
        time.sleep(0.5)
        assert not any(worker.told.is_set() for worker in workers)
        with announced("life", server.url), announced("life", server.url):  # two API servers, one word
            assert all(worker.told.wait(SOON) for worker in workers)
            assert eventually(lambda: all(worker.ended for worker in workers))
        assert [len(worker.times) for worker in workers] == [1, 1]


def test_a_word_that_is_already_recorded_is_heard_at_once(server: EmbeddedServer) -> None:
    with connect(server.url) as store:
        store.record("life", WORD)
        worker = Worker(store, "life")
        assert worker.told.wait(SOON)
        other = Worker(store, "another-life", 0.3)
        assert other.told.wait(SOON)
        assert other.times[0] >= 0.3


def test_where_nobody_speaks_the_quiet_time_counts(server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with connect(server.url) as store:
        worker = Worker(store, "offline", 1.0)
        assert worker.told.wait(SOON)
        assert eventually(lambda: worker.ended)
    assert len(worker.times) == 1
    assert worker.times[0] >= 1.0
    assert "nobody said within 1 s that the engine is ready" in caplog.text


def test_a_server_that_is_down_delays_for_the_quiet_time(
    server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(closed_port(server)) as store:
        worker = Worker(store, "life", 3.0)
        assert worker.told.wait(3.0 + SOON)
        assert eventually(lambda: worker.ended)
    assert len(worker.times) == 1
    assert worker.times[0] >= 3.0
    assert caplog.text.count("cannot ask whether the engine is ready") == 1  # and not once a second


def test_cancelled_before_the_word_nothing_is_ever_offered(server: EmbeddedServer) -> None:
    with connect(server.url) as store:
        waiting = Worker(store, "life")
        assert waiting.readiness.cancel()
        assert waiting.readiness.cancel()
        store.record("life", WORD)
        assert eventually(lambda: waiting.ended)
        assert waiting.times == []
    quiet = Worker(MemoryDecisions(), "life", 0.5)
    assert quiet.readiness.cancel()
    assert not quiet.told.wait(1.0)


def test_cancelled_while_the_server_is_down_the_thread_ends(server: EmbeddedServer) -> None:
    with connect(closed_port(server)) as store:
        worker = Worker(store, "life")
        time.sleep(0.3)
        assert worker.readiness.cancel()
        assert eventually(lambda: worker.ended)
        assert worker.times == []


def test_cancelled_too_late_it_says_so() -> None:
    worker = Worker(MemoryDecisions(), "life", 0.0)
    assert worker.told.wait(SOON)
    assert not worker.readiness.cancel()
    assert len(worker.times) == 1


def test_cancelled_at_the_moment_of_the_word_both_sides_agree() -> None:
    outcomes = set()
    for turn in range(100):
        store = MemoryDecisions()
        worker = Worker(store, "life")
        if turn % 2:
            store.record("life", WORD)  # the worker is about to wake
        else:
            threading.Timer(0.0001 * turn, store.record, args=("life", WORD)).start()
        time.sleep(0.0001 * (turn % 50) if turn < 90 else 0.1)  # a busy machine takes the longer ones to hear it
        cancelled = worker.readiness.cancel()
        outcomes.add(cancelled)
        assert eventually(lambda: worker.ended)  # noqa: B023
        assert len(worker.times) == (0 if cancelled else 1)
    assert outcomes == {True, False}


def test_a_server_that_restarted_hears_the_word_again(server: EmbeddedServer) -> None:
    with connect(server.url) as store, announced("life", server.url):
        assert eventually(lambda: store.wait("life", 0.0) == WORD)
        server.stop()
        worker = Worker(store, "life")
        time.sleep(0.3)
        settings = ServerSettings(secret=SECRET, port=server.port, grace_s=0.1)
        with EmbeddedServer(settings):
            assert worker.told.wait(15.0)
        assert worker.times[0] < LONG / 2


def test_the_front_end_waits_for_a_server_that_is_not_there_yet(
    server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = closed_port(server)
    with connect(url) as store:
        began = time.monotonic()
        with announced("life", url):
            assert time.monotonic() - began < 2  # vLLM's front end is not held up
            worker = Worker(store, "life")
            assert eventually(lambda: "cannot say that the engine is ready" in caplog.text)
            with EmbeddedServer(ServerSettings(secret=SECRET, port=server.port, grace_s=0.1)):
                assert worker.told.wait(15.0)
    assert caplog.text.count("cannot say that the engine is ready") == 1


def test_a_front_end_with_another_secret_is_not_heard(server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    with connect(server.url) as store, announced("life", server.url, OTHER_SECRET):
        assert eventually(lambda: "cannot say that the engine is ready" in caplog.text)
        assert store.wait("life", 0.0) is None


def test_a_callback_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise KeyError("what")

    readiness = Readiness(MemoryDecisions(), Expectation("life", 0.0), fail)
    readiness._thread.join(SOON)
    assert "not offered; this is a bug" in caplog.text


def test_words_go_on_only_as_long_as_a_worker_could_wait(server: EmbeddedServer) -> None:
    announcement = Announcement("life", partial(connect, closed_port(server)), lasting_s=0.5)
    announcement._thread.join(SOON + 2.0)
    assert not announcement._thread.is_alive()


# ---- which word


def config(instance: str = "1763921", index: int = 0, api_servers: int = 1) -> Any:
    parallel = SimpleNamespace(data_parallel_index=index, _api_process_count=api_servers)
    return SimpleNamespace(instance_id=instance, parallel_config=parallel)


def test_front_end_and_workers_know_one_key() -> None:
    front = word_key(config(), 1, {})
    assert front == word_key(config("1763921_dp1"), 1, {})  # as the engines of Ray call themselves
    assert Expectation.of(config(index=1), 30.0, {}).key == front
    assert len({front, word_key(config(), 0, {}), word_key(config("1763922"), 1, {})}) == 3


def test_several_api_servers_share_the_launch_and_not_the_instance() -> None:
    launch = {LAUNCH_VARIABLE: "abc"}
    keys = {word_key(config(name, api_servers=2), 0, launch) for name in ("1", "2", "3")}
    assert keys == {Expectation.of(config("4", api_servers=2), 30.0, launch).key}
    assert word_key(config("1"), 0, launch) != word_key(config("2"), 0, launch)


def test_h52_silence_is_no_word_where_a_front_end_will_speak() -> None:
    marked = {LOGGER_VARIABLE: "1"}
    assert Expectation.of(config(), 30.0, {}).patience_s == 30.0
    assert Expectation.of(config(), 30.0, marked).patience_s == PATIENCE_S
    assert Expectation.of(config(), 3600.0, marked).patience_s == 3600.0
    assert Expectation.of(config(api_servers=2), 30.0, {LAUNCH_VARIABLE: "abc"}).patience_s == PATIENCE_S
    assert Expectation.of(config(api_servers=2), 30.0, {}).patience_s == 30.0  # it would not hear it


def launch_of_a_child(pipe: Any) -> None:
    mark_launch(os.environ)
    pipe.send((os.environ[LAUNCH_VARIABLE], LOGGER_VARIABLE in os.environ))


def in_a_child() -> tuple[str, bool]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=launch_of_a_child, args=(theirs,))
    child.start()
    assert ours.poll(30)
    found: tuple[str, bool] = ours.recv()
    child.join(10)
    return found


ROOT = f"""
import os, sys
from weightwire.engines.vllm.readiness import mark_launch
before = os.environ.get({LAUNCH_VARIABLE!r})
mark_launch(os.environ)
first = os.environ[{LAUNCH_VARIABLE!r}]
mark_launch(os.environ)
assert first == os.environ[{LAUNCH_VARIABLE!r}]
assert not any(name.split(".")[0] == "grpc" for name in sys.modules), "a front end imports this before it forks"
print(before != first, {LOGGER_VARIABLE!r} in os.environ)
"""


def test_processes_of_one_launch_share_its_id_and_a_launch_inside_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv(LAUNCH_VARIABLE, "to be removed afterwards")
        patched.setenv(LOGGER_VARIABLE, "too")
        mark_logger(os.environ)
        mine = os.environ[LAUNCH_VARIABLE]
        assert in_a_child() == (mine, True)
        said = subprocess.run([sys.executable, "-c", ROOT], capture_output=True, text=True, timeout=60, check=True)
        assert said.stdout.split() == ["True", "False"]
