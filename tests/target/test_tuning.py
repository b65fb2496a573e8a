from __future__ import annotations

import json

import numpy as np
import pytest
from transport.peers import SECRET, soon

from weightwire.errors import TransferError
from weightwire.target import tuning
from weightwire.target.tuning import MIB, ROUNDS, Measurement, Setting, choose, measure, serve, settings_to_try

TRIED = [Setting(1, 2 * MIB), Setting(2, 2 * MIB), Setting(2, 16 * MIB)]


def test_the_fewest_streams_and_smallest_reads_of_the_best_are_chosen() -> None:
    one, two, large = TRIED
    assert choose({one: [1.0], two: [2.0, 1.0, 3.0], large: [2.05]}) == two
    assert choose({one: [1.99], two: [2.0], large: [2.0]}) == one
    assert choose({one: [1.0], two: [2.0], large: [2.5]}) == large


def test_one_core_tries_fewer_streams_than_many() -> None:
    assert {each.streams for each in settings_to_try(1)} == {1, 2}
    assert max(each.streams for each in settings_to_try(16)) == 8


def test_a_measurement_takes_turns_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("weightwire.target.tuning.time.monotonic", lambda: clock[0])

    def pull(setting: Setting, nbytes: int, until: float) -> float:
        assert until == 40.0
        clock[0] += nbytes / 125e6
        return 125e6 * setting.streams

    found = list(measure(pull, TRIED, 256 * MIB, 10.0))
    assert [setting for setting, _ in found[:3]] == TRIED
    assert len(TRIED) <= len(found) < ROUNDS * len(TRIED)
    assert clock[0] < 15.0


def test_pulls_from_another_end_are_verified(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = serve(SECRET, "127.0.0.1", 16 * MIB)
    endpoint = bytes.fromhex(json.loads(capfd.readouterr().out)["endpoint"])
    try:
        assert Measurement(SECRET, endpoint, 16 * MIB).pull(Setting(3, 2 * MIB), 16 * MIB, soon(20)) > 0
        monkeypatch.setattr(tuning, "content", lambda nbytes: np.zeros(nbytes, dtype=np.uint8))
        with pytest.raises(TransferError):
            Measurement(SECRET, endpoint, 16 * MIB).pull(Setting(1, 2 * MIB), 16 * MIB, soon(20))
    finally:
        transport.close()
