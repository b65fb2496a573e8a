from __future__ import annotations

import gc
import threading

import pytest

from weightwire.manifest.collection import no_collection


def test_it_is_paused_inside_and_as_before_afterwards() -> None:
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_the_user_switched_off_stays_off() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_ends_the_pause() -> None:
    with pytest.raises(KeyError), no_collection():
        raise KeyError
    assert gc.isenabled()


def test_of_two_threads_the_first_to_pause_ends_it() -> None:
    inside, leave = threading.Event(), threading.Event()

    @no_collection()
    def work() -> None:
        inside.set()
        assert leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    with no_collection():
        pass
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
