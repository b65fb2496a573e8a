from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.manifest.address import AddressSpace, Segment
from weightwire.types import Span


def segments_of(start: int, parts: list[tuple[int, int, str]]) -> list[Segment]:
    made, offset = [], start
    for nbytes, address, device in parts:
        made.append(Segment(offset, address, nbytes, device))
        offset += nbytes
    return made


parts = st.tuples(st.integers(1, 9), st.integers(1, 1 << 62), st.sampled_from(["cpu", "cuda:0", "cuda:1"]))
spaces = st.builds(segments_of, st.integers(0, 5), st.lists(parts, min_size=1, max_size=8))


def byte(segments: list[Segment], at: int) -> tuple[str, int]:
    """Where logical byte ``at`` lies."""
    home = next(each for each in segments if each.offset <= at < each.offset + each.nbytes)
    return home.device, home.address + at - home.offset


@given(spaces, st.data())
def test_every_byte_of_a_span_lies_where_its_segment_says(segments: list[Segment], data: st.DataObject) -> None:
    space = AddressSpace(segments, (), None)
    assert list(space.segments) == segments
    begin = data.draw(st.integers(space.span.offset, space.span.end))
    span = Span(begin, data.draw(st.integers(0, space.span.end - begin)))
    found = space.slices(span)
    assert [each.offset for each in found] == [begin, *(each.offset + each.nbytes for each in found)][: len(found)]
    assert sum(each.nbytes for each in found) == span.nbytes
    assert [byte(found, at) for at in range(begin, span.end)] == [byte(segments, at) for at in range(begin, span.end)]
    assert space.devices(span) == {each.device for each in found}
    assert space.devices() == {each.device for each in segments}
    assert list(space.segments) == segments  # what was given away was a copy


@given(spaces, spaces)
def test_two_spaces_lie_alike_exactly_where_their_segments_do(one: list[Segment], other: list[Segment]) -> None:
    assert AddressSpace(one, (), None).lies_as(AddressSpace(other, (), None)) == (one == other)
    assert AddressSpace(one, (), None).lies_as(AddressSpace(list(one), (), None))


@given(spaces)
def test_what_lies_outside_is_refused(segments: list[Segment]) -> None:
    space = AddressSpace(segments, (), None)
    for span in (Span(space.span.end, 1), Span(space.span.offset - 1, 2), Span(space.span.offset, -1)):
        with pytest.raises(IndexError):
            space.slices(span)


def test_segments_follow_each_other_or_are_refused() -> None:
    with pytest.raises(ValueError, match="at offset 11"):
        AddressSpace([Segment(0, 1, 10, "cpu"), Segment(11, 50, 5, "cpu")], (), None)


def test_an_empty_space_covers_nothing() -> None:
    empty = AddressSpace([], (), None)
    assert (empty.span, empty.segments, empty.slices(Span(0, 0)), empty.devices()) == (Span(0, 0), (), [], set())
