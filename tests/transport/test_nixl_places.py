from __future__ import annotations

from weightwire.manifest.address import Region
from weightwire.transport.nixl.places import PAGE_BYTES, Places, joined


def test_regions_of_one_heap_are_registered_as_one() -> None:
    heap = [Region(10_000 + at * 1024, 1000, "cpu") for at in range(100)]
    assert joined(heap[::-1]) == [Region(10_000, 99 * 1024 + 1000, "cpu")]


def test_regions_stay_apart_where_an_unmapped_page_may_lie_between_or_on_a_device() -> None:
    apart = [Region(10_000, 1000, "cpu"), Region(11_000 + PAGE_BYTES, 1000, "cpu")]
    assert joined(apart) == apart
    device = [Region(10_000, 1000, "cuda:0"), Region(11_000, 1000, "cuda:0")]
    assert joined(device) == device
    assert joined([Region(10_000, 5000, "cpu"), Region(11_000, 1000, "cpu")]) == [Region(10_000, 5000, "cpu")]


def test_what_is_registered_already_is_not_registered_again() -> None:
    places = Places()
    assert places.add([Region(10_000, 1000, "cpu"), Region(12_000, 1000, "cpu")]) == [Region(10_000, 3000, "cpu")]
    bounce = Region(11_100, 500, "cpu")  # allocated later, in the gap
    assert places.add([bounce]) == []
    assert places.add([Region(50_000, 10, "cpu")]) == [Region(50_000, 10, "cpu")]


def test_regions_are_not_joined_across_one_that_was_registered_before() -> None:
    places = Places()
    assert places.add([Region(11_100, 500, "cpu")]) == [Region(11_100, 500, "cpu")]
    apart = [Region(10_000, 1000, "cpu"), Region(12_000, 1000, "cpu")]
    assert places.add(apart) == apart
    assert places.add([Region(10_000, 1000, "cuda:0")]) == [Region(10_000, 1000, "cuda:0")]
