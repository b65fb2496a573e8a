from __future__ import annotations

import ctypes
import errno
import importlib.util
import itertools
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_support import BLOCK, logical_bytes, reference_digest, space

from weightwire.manifest.address import AddressSpace
from weightwire.manifest.host_digest import ArrivingDigests, HostDigests
from weightwire.manifest.host_library import VERSION, WAYS, Arrival, Came, HostLibrary, Tables, loaded
from weightwire.transport.memory import view
from weightwire.types import Span

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "weightwire" / "manifest" / "host_digest.c"
Library = HostLibrary | str
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def build_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles such a source; each by another name, because the loader knows libraries by theirs."""
    folder, numbers, hook = tmp_path_factory.mktemp("digest"), itertools.count(), build_hook()

    def build(text: str) -> Path:
        number = next(numbers)
        source, built = folder / f"{number}.c", folder / f"{number}.so"
        source.write_text(text)
        assert hook.compiled(source, built) == ""
        return built

    return build


@pytest.fixture(scope="module")
def built(compiled: Callable[[str], Path]) -> Path:
    return compiled(SOURCE.read_text())


@pytest.fixture(scope="module", params=[*WAYS, "xxhash"])
def library(request: pytest.FixtureRequest, built: Path) -> Library:
    if request.param == "xxhash":
        return "none here"
    if request.param == "avx512" and HostLibrary(built).way != "avx512":
        pytest.skip("this processor has no AVX-512 multiplication of 64 bits")
    return HostLibrary(built, request.param)


def digests(memory: AddressSpace, spans: list[Span], library: Library) -> bytes:
    return HostDigests(memory, spans, library).of(0, len(spans))


def reference(data: bytes, spans: list[Span]) -> bytes:
    return b"".join(reference_digest(data[span.offset : span.end]) for span in spans)


def test_every_short_length_and_those_about_a_block(library: Library) -> None:
    lengths = [*range(201), *range(BLOCK - 33, BLOCK + 34), 3 * BLOCK, 16 * BLOCK, 17 * BLOCK + 1]
    ends = list(itertools.accumulate(lengths))
    data = random.Random(1).randbytes(ends[-1])
    spans = [Span(end - nbytes, nbytes) for end, nbytes in zip(ends, lengths, strict=True)]
    assert digests(space(data), spans, library) == reference(data, spans)
    one_by_one = [HostDigests(space(data), [span], library).of(0, 1) for span in spans[:201]]
    assert b"".join(one_by_one) == reference(data, spans[:201])


pieces = st.one_of(
    st.integers(1, 200), st.integers(BLOCK - 1, BLOCK + 1), st.integers(1, 3 * BLOCK), st.just(37 * BLOCK + 5)
)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(pieces, min_size=1, max_size=40), gap=st.integers(0, 63), seed=st.integers(0, 1 << 20))
def test_any_leaves_of_any_segments(library: Library, sizes: list[int], gap: int, seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(sum(sizes))
    memory = space(data, list(itertools.accumulate(sizes))[:-1], gap)
    begins = [rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 20))]
    spans = [Span(begin, min(rng.choice((0, 1, 31, 5000, BLOCK, 1 << 20)), len(data) - begin)) for begin in begins]
    spans.append(Span(0, len(data)))
    made = HostDigests(memory, spans, library)
    assert made.of(0, len(spans)) == reference(data, spans)
    first = rng.randrange(len(spans))
    end = rng.randrange(first, len(spans) + 1)
    assert made.of(first, end) == reference(data, spans[first:end])
    hot = HostDigests(memory, spans, library, hot=True)
    assert b"".join(hot.of(at, at + 1) for at in range(len(spans))) == reference(data, spans)


@pytest.mark.parametrize("size", [1, 7, 33, 4096, 50 * 1024])
def test_leaves_of_many_small_tensors(library: Library, size: int) -> None:
    data = random.Random(size).randbytes(min(2000 * size, 3 << 20) + 5)
    spans = [Span(at, min(1 << 18, len(data) - at)) for at in range(0, len(data), 1 << 18)]
    assert digests(space(data, range(size, len(data), size)), spans, library) == reference(data, spans)


def test_spans_that_are_not_there_are_refused(library: Library) -> None:
    memory = space(bytes(100), [50])
    for span in (Span(1, 100), Span(-1, 5), Span(100, 1), Span(10, -1)):
        with pytest.raises(IndexError):
            digests(memory, [Span(0, 4), span, Span(0, 4)], library)
    made = HostDigests(memory, [Span(0, 4)], library)
    for first, end in ((0, 2), (-1, 1), (1, 0)):
        with pytest.raises(IndexError):
            made.of(first, end)
    assert digests(memory, [], library) == b""
    assert digests(space(b""), [Span(0, 0)], library) == reference_digest(b"")


WRONG = {
    "a leaf that is longer than the memory": ([100, 50], [0], [0], [151], 1),
    "a leaf that begins behind the memory": ([100, 50], [2], [0], [1], 1),
    "a leaf that begins before it": ([100, 50], [-1], [0], [1], 1),
    "a place behind its segment": ([100, 50], [0], [101], [1], 1),
    "a place before its segment": ([100, 50], [0], [-1], [1], 1),
    "a leaf of less than nothing": ([100, 50], [0], [0], [-1], 0),
    "a segment of less than nothing": ([100, -50], [0], [0], [120], 1),
    "a leaf of more than memory can be": ([100, 50], [0], [0], [2**63 - 1], 2**47),
    "more blocks than there is room for": ([100, 50], [0, 0], [0, 0], [9, 9], 1),
    "fewer blocks than were said": ([100, 50], [0, 0], [0, 0], [9, 9], 3),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tables_are_refused_before_anything_is_read(built: Path, what: str) -> None:
    *columns, blocks = WRONG[what]
    arrays = [(ctypes.c_int64 * len(column))(*column) for column in ([8, 8], *columns)]  # addresses that end a process
    address, size, first, skip, nbytes = map(ctypes.addressof, arrays)
    tables = Tables(address, size, 2, first, skip, nbytes, len(columns[1]))
    for way in {"portable", HostLibrary(built).way}:
        with pytest.raises(IndexError):
            HostLibrary(built, way).hashes(tables, min(blocks, 3))


AT_THE_EDGE = """
import ctypes, mmap, sys
from pathlib import Path
import xxhash
from weightwire.manifest.host_library import HostLibrary, Tables
page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
whole = 20 * page
area = mmap.mmap(-1, whole + 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(area)) + page
for edge in (start - page, start + whole):
    assert libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
column = lambda *values: (ctypes.c_int64 * len(values))(*values)
for way in sys.argv[2:]:
    library = HostLibrary(Path(sys.argv[1]), way)
    for nbytes in [*range(1, 300), 65535, 65536, 65537, whole]:
        for address in (start, start + whole - nbytes):
            arrays = [column(*values) for values in ([address], [nbytes], [0], [0], [nbytes])]
            address_, size, first, skip, length = map(ctypes.addressof, arrays)
            found = library.hashes(Tables(address_, size, 1, first, skip, length, 1), -(-nbytes // 65536))
            assert found[0] == xxhash.xxh64_intdigest(bytes(min(nbytes, 65536)))
print("nothing was read outside")
"""


def test_nothing_outside_of_the_segments_is_read(built: Path) -> None:
    ways = sorted({"portable", HostLibrary(built).way})
    command = [sys.executable, "-c", AT_THE_EDGE, str(built), *ways]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "nothing was read outside\n"), done.stderr


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("0x27D4EB2F165667C5", "0x27D4EB2F165667C7", "wrong values"),
        ("0xC2B2AE3D27D4EB4F", "0xC2B2AE3D27D4EB4D", "wrong values"),
        ("BLOCK = 64 * 1024", "BLOCK = 32 * 1024", "wrong values"),
        ("hash(&t, out, way == AVX512 ? LANES : 1);", "hash(&t, out, 0);", "wrong values"),
        ("    hash(t, out, lanes);", "    hash(t, out, lanes * 0);", "wrong values"),
        (f"VERSION = {VERSION},", f"VERSION = {VERSION + 1},", f"is of version {VERSION + 1}, not {VERSION}"),
        ("weightwire_host_digest_way", "weightwire_another", "is not this digest"),
    ],
)
def test_a_library_that_is_another_is_not_used(
    compiled: Callable[[str], Path], before: str, after: str, said: str
) -> None:
    text = SOURCE.read_text()
    assert before in text
    with pytest.raises(OSError, match=said):
        HostLibrary(compiled(text.replace(before, after)))


def test_what_is_no_library_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "libhost_digest.so"
    path.write_bytes(b"\x7fELF and nothing more")
    with pytest.raises(OSError, match=path.name):
        HostLibrary(path)


def test_what_is_installed_says_what_it_is() -> None:
    found = loaded()
    assert found.way in WAYS if isinstance(found, HostLibrary) else found.startswith("it ")


# --- while a socket brings the bytes ----------------------------------------------------------------------------


@pytest.fixture(params=WAYS)
def compiled_way(request: pytest.FixtureRequest, built: Path) -> HostLibrary:
    if request.param == "avx512" and HostLibrary(built).way != "avx512":
        pytest.skip("this processor has no AVX-512 multiplication of 64 bits")
    return HostLibrary(built, request.param)


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends; the second waits 50 ms at most."""
    one, other = socket.socketpair()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 50_000))
    with one, other:
        yield one, other


def arriving(memory: AddressSpace, spans: list[Span], library: HostLibrary) -> ArrivingDigests:
    found = HostDigests(memory, spans, library).arriving(0, len(spans))
    assert found is not None
    return found


def spans_of(lengths: Sequence[int]) -> list[Span]:
    ends = list(itertools.accumulate(lengths))
    return [Span(end - nbytes, nbytes) for end, nbytes in zip(ends, lengths, strict=True)]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(
        st.sampled_from([0, 1, 31, 999, BLOCK - 1, BLOCK, 3 * BLOCK + 7, 17 * BLOCK]), min_size=1, max_size=6
    ),
    cuts=st.lists(st.integers(0, 40 * BLOCK), max_size=200),
    pauses=st.lists(st.integers(0, 40 * BLOCK), max_size=4),
    here=st.integers(0, 2 * BLOCK),
)
def test_what_comes_through_a_socket_lands_and_has_its_digests(
    built: Path, lengths: list[int], cuts: list[int], pauses: list[int], here: int
) -> None:
    total = sum(lengths)
    data, spans = random.Random(total).randbytes(total), spans_of(lengths)
    here = min(here, total)
    memory = space(data[:here] + b"\x7f" * (total - here), [cut for cut in cuts if cut < total], gap=5)
    stops = sorted({here, total, *(at for at in pauses if here < at < total)})
    one, other = socket.socketpair()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 10_000))
    with one, other:
        for way in {"portable", HostLibrary(built).way}:
            digesting = arriving(memory, spans, HostLibrary(built, way))
            digesting.in_place(here)
            for begin, end in itertools.pairwise(stops):
                sender = threading.Thread(target=one.sendall, args=(data[begin:end],))
                sender.start()
                while digesting.received < end:
                    came = digesting.receive(other.fileno(), 5.0)
                    assert came in (Came.ALL, Came.LATER)
                sender.join()
            while digesting.receive(other.fileno(), 5.0) != Came.ALL:
                pass
            assert digesting.received == total
            assert digesting.digests() == reference(data, spans)
            assert logical_bytes(memory) == data
            for part in memory.segments:
                assert bytes(view(part.address - 5, 5)) == b"\xee" * 5


def test_a_leaf_of_more_pieces_than_one_call_takes(
    compiled_way: HostLibrary, wire: tuple[socket.socket, socket.socket]
) -> None:
    one, other = wire
    data = random.Random(2).randbytes(BLOCK)
    memory = space(bytes(BLOCK), range(0, BLOCK, 200), gap=3)
    digesting = arriving(memory, [Span(0, BLOCK)], compiled_way)
    one.sendall(data)
    assert digesting.receive(other.fileno(), 5.0) == Came.ALL
    assert digesting.digests() == reference(data, [Span(0, BLOCK)])
    assert logical_bytes(memory) == data


def test_nothing_is_hashed_before_all_of_it_came(
    compiled_way: HostLibrary, wire: tuple[socket.socket, socket.socket]
) -> None:
    one, other = wire
    memory = space(bytes(4 * BLOCK))
    digesting = arriving(memory, [Span(0, 3 * BLOCK), Span(3 * BLOCK, BLOCK)], compiled_way)
    one.sendall(b"x" * (3 * BLOCK + 1))
    assert digesting.receive(other.fileno(), 5.0) == Came.LATER
    assert digesting.received == 3 * BLOCK + 1
    with pytest.raises(ValueError, match="bytes were hashed"):
        digesting.digests()
    assert logical_bytes(memory) == b"x" * (3 * BLOCK + 1) + bytes(BLOCK - 1)


def test_h39_bytes_that_trickle_in_do_not_keep_it(
    compiled_way: HostLibrary, wire: tuple[socket.socket, socket.socket]
) -> None:
    one, other = wire
    digesting, over = arriving(space(bytes(BLOCK)), [Span(0, BLOCK)], compiled_way), threading.Event()

    def trickle() -> None:
        while not over.wait(0.02):
            one.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    began = time.monotonic()
    came = digesting.receive(other.fileno(), 0.2)
    took = time.monotonic() - began
    over.set()
    thread.join()
    assert came == Came.LATER
    assert took < 10  # all of it would take 22 minutes
    assert 0 < digesting.received < BLOCK


def test_an_end_and_a_broken_socket_are_told_apart(
    compiled_way: HostLibrary, wire: tuple[socket.socket, socket.socket]
) -> None:
    one, other = wire
    digesting = arriving(space(bytes(BLOCK)), [Span(0, BLOCK)], compiled_way)
    one.sendall(b"some")
    one.close()
    assert digesting.receive(other.fileno(), 5.0) == Came.ENDED
    assert digesting.received == 4
    assert digesting.receive(-1, 5.0) == errno.EBADF


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tables_are_refused_before_anything_is_received(
    built: Path, wire: tuple[socket.socket, socket.socket], what: str
) -> None:
    *columns, blocks = WRONG[what]
    one, other = wire
    one.sendall(b"x" * 100)
    arrays = [(ctypes.c_int64 * len(column))(*column) for column in ([8, 8], *columns)]  # addresses that end a process
    address, size, first, skip, nbytes = map(ctypes.addressof, arrays)
    tables = Tables(address, size, 2, first, skip, nbytes, len(columns[1]))
    hashes = (ctypes.c_uint64 * min(blocks, 3))()
    with pytest.raises(IndexError):
        HostLibrary(built).receive(other.fileno(), 1.0, tables, hashes, Arrival())
    assert other.recv(200) == b"x" * 100


def test_where_nothing_is_compiled_nothing_is_digested_on_its_way() -> None:
    assert HostDigests(space(bytes(9)), [Span(0, 9)], "none here").arriving(0, 1) is None
    with pytest.raises(IndexError):
        HostDigests(space(bytes(9)), [Span(0, 9)]).arriving(0, 2)
