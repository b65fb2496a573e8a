from __future__ import annotations

import pytest

from weightwire.simulate.network import Stage, deliver


def free(*rates: float) -> list[Stage]:
    return [Stage(rate) for rate in rates]


@pytest.mark.parametrize(
    ("rates", "there"), [((10, 10), 11.0), ((10, 5), 21.0), ((5, 10), 21.0), ((10, 4, 2, 10), 51.0)]
)
def test_a_chunk_passes_free_stages_as_fast_as_the_narrowest(rates: tuple[float, ...], there: float) -> None:
    assert deliver(free(*rates), 1.0, 100) == pytest.approx(there)


def test_what_comes_from_two_senders_shares_the_receivers_link() -> None:
    receiver = Stage(10.0)
    assert deliver([Stage(10.0), receiver], 0.0, 100) == pytest.approx(10.0)
    assert deliver([Stage(10.0), receiver], 0.0, 100) == pytest.approx(20.0)
    assert deliver([Stage(10.0), receiver], 50.0, 100) == pytest.approx(60.0), "it was idle meanwhile"


def test_a_stage_begins_when_it_is_free_and_ends_no_sooner_than_the_one_before() -> None:
    stage = Stage(10.0, free=3.0)
    assert stage.pass_on(1.0, 2.0, 50) == pytest.approx((3.0, 8.0))
    assert stage.pass_on(9.0, 99.0, 50) == pytest.approx((9.0, 99.0))
    assert stage.free == pytest.approx(99.0)
