from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from weightwire.manifest.address import AddressSpace, Segment
from weightwire.transport.nixl import pieces
from weightwire.transport.nixl.pieces import Joined, Run
from weightwire.types import Span

SIZES = st.lists(st.sampled_from([1, 2, 3, 1000, 5_000_000, pieces.MAX_BYTES, pieces.MAX_BYTES * 2 + 1]), min_size=1)
DEVICES = ("cpu", "cuda:0")


def memory(sizes: list[int], total: int, start: int, *, gaps: bool) -> AddressSpace:
    segments, offset, address = [], 0, start
    for number, wanted in enumerate([*sizes, total]):
        nbytes = min(wanted, total - offset)
        if nbytes:
            segments.append(Segment(offset, address, nbytes, DEVICES[gaps and number % 3 == 2]))
        offset += nbytes
        address += nbytes + (17 if gaps else 0)
    return AddressSpace(segments, (), None)


def moves(local: list[Segment], remote: list[Segment]) -> list[pieces.Piece]:
    joined = Joined(AddressSpace(local, (), None), AddressSpace(remote, (), None))
    return list(joined.pieces(joined.span))


@settings(deadline=None)
@given(ours=SIZES, theirs=SIZES, gaps=st.booleans(), skip=st.integers(0, 1000))
def test_every_byte_is_moved_once_from_its_place_to_its_place(
    ours: list[int], theirs: list[int], gaps: bool, skip: int
) -> None:
    total = min(sum(ours), sum(theirs)) + 5
    local, remote = memory(ours, total, 1 << 20, gaps=gaps), memory(theirs, total, 1 << 50, gaps=gaps)
    span = Span(min(skip, total - 1), total - min(skip, total - 1))
    at = span.offset
    for piece in Joined(local, remote).pieces(span):
        assert 0 < piece.nbytes <= (pieces.MAX_BYTES if piece.local == "cpu" else pieces.MAX_DEVICE_BYTES)
        assert len(piece.runs) <= pieces.MAX_RUNS
        for run in piece.runs:
            for space, address, device in ((local, run.local, piece.local), (remote, run.remote, piece.remote)):
                begin = at
                for segment in space.slices(Span(at, run.nbytes)):
                    assert (segment.address, segment.device) == (address + segment.offset - begin, device)
            at += run.nbytes
    assert at == span.end


def test_runs_that_follow_each_other_on_both_sides_are_one() -> None:
    local = [Segment(at * 10, 1000 + at * 10, 10, "cpu") for at in range(5000)]
    remote = [Segment(0, 9000, 25_000, "cpu"), Segment(25_000, 90_000, 25_000, "cpu")]
    assert [piece.runs for piece in moves(local, remote)] == [[Run(1000, 9000, 25_000), Run(26_000, 90_000, 25_000)]]


def test_allocations_that_touch_on_both_sides_stay_apart_on_a_device() -> None:
    local = [Segment(at * 10, 1000 + at * 10, 10, "cuda:0") for at in range(3)]
    remote = [Segment(at * 10, 9000 + at * 10, 10, "cuda:0") for at in range(3)]
    assert [piece.runs for piece in moves(local, remote)] == [[Run(1000 + n, 9000 + n, 10) for n in (0, 10, 20)]]


def test_many_small_runs_are_cut_by_their_number() -> None:
    local = [Segment(at, 1000 + at * 2, 1, "cpu") for at in range(5000)]
    found = moves(local, [Segment(0, 9000, 5000, "cpu")])
    assert [len(piece.runs) for piece in found] == [2048, 2048, 904]


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=5), most=st.integers(1, 300))
def test_a_split_piece_is_the_same_bytes_in_two(sizes: list[int], most: int) -> None:
    runs = [Run(number * 1000, number * 2000, nbytes) for number, nbytes in enumerate(sizes)]
    whole = pieces.Piece.of("cpu", "cuda:0", runs)
    head, rest = whole.split(most)
    assert head.nbytes == min(most, whole.nbytes)
    assert (rest is None) == (most >= whole.nbytes)
    parts = [head, rest] if rest else [head]
    assert sum(part.nbytes for part in parts) == whole.nbytes
    moved = [(run.local + at, run.remote + at) for part in parts for run in part.runs for at in range(run.nbytes)]
    assert moved == [(run.local + at, run.remote + at) for run in whole.runs for at in range(run.nbytes)]
