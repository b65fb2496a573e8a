from __future__ import annotations

import random
import threading

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_support import BLOCK, reference_digest, space

from weightwire.manifest import device_digest, digest
from weightwire.manifest.address import AddressSpace, Segment
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.memory import view
from weightwire.manifest.records import DIGEST_BYTES, Leaf
from weightwire.types import Span, TensorClass

SIZES = [0, 1, 3, 4, 7, 8, 15, 31, 32, 33, 63, 64, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 4, 3 * BLOCK + 37, LEAF_BYTES]


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def host(memory: AddressSpace) -> bytes:
    return digest.digest_span(memory, memory.span)


def device(memory: AddressSpace) -> bytes:
    return device_digest.digest_leaves([memory.slices(memory.span)])


def leaf(offset: int, nbytes: int) -> Leaf:
    return Leaf(Span(offset, nbytes), TensorClass.WEIGHT)


@pytest.mark.parametrize("nbytes", SIZES)
def test_h62_host_and_device_give_the_value_of_the_definition(nbytes: int) -> None:
    data = random_bytes(nbytes)
    assert host(space(data)) == device(space(data)) == digest.digest_bytes(data) == reference_digest(data)
    assert len(reference_digest(data)) == DIGEST_BYTES


@pytest.mark.parametrize("value", [0x00, 0x80, 0xFF])
def test_extreme_bytes_wrap_the_same_way_on_the_device(value: int) -> None:
    data = bytes([value]) * (2 * BLOCK + 45)
    assert device(space(data)) == reference_digest(data)


def test_block_hashes_are_xxh64_for_every_short_length() -> None:
    lengths = list(range(200, 0, -1))
    stage, data = torch.full((200, 224), 0xEE, dtype=torch.uint8), random_bytes(200)
    for row, length in enumerate(lengths):
        stage[row, :length] = torch.frombuffer(bytearray(data[:length]), dtype=torch.uint8)
    found = [value % (1 << 64) for value in device_digest.block_hashes(stage, lengths).tolist()]
    assert found == [xxhash.xxh64_intdigest(data[:length]) for length in lengths]


@settings(deadline=None, max_examples=40)
@given(nbytes=st.integers(1, 3 * BLOCK), cuts=st.lists(st.integers(1, 3 * BLOCK), max_size=6), gap=st.integers(0, 9))
def test_h62_segments_alignment_and_gaps_do_not_enter(nbytes: int, cuts: list[int], gap: int) -> None:
    data = random_bytes(nbytes)
    memory = space(data, [cut for cut in cuts if cut < nbytes], gap)
    assert host(memory) == device(memory) == reference_digest(data)


@settings(deadline=None, max_examples=40)
@given(nbytes=st.integers(1, 2 * BLOCK), seed=st.integers(0, 1 << 20), bits=st.integers(1, 2))
def test_h31_h63_any_one_or_two_flipped_bits_show(nbytes: int, seed: int, bits: int) -> None:
    data, rng = bytearray(random_bytes(nbytes)), random.Random(seed)
    before = host(space(bytes(data)))
    for bit in rng.sample(range(nbytes * 8), bits):
        data[bit // 8] ^= 1 << bit % 8
    after = space(bytes(data))
    assert host(after) != before
    assert device(after) == host(after)


@pytest.mark.parametrize("distance", [8, 32, 64, BLOCK, 5 * BLOCK])
def test_h63_two_top_bits_do_not_cancel(distance: int) -> None:
    data = bytearray(random_bytes(6 * BLOCK))
    before = reference_digest(bytes(data))
    for at in (7, 7 + distance):
        data[at] ^= 0x80
    assert host(space(bytes(data))) != before


@pytest.mark.parametrize("size", [2, 8, 32, 512, BLOCK])
def test_h63_swapped_neighbours_show(size: int) -> None:
    data = random_bytes(4 * BLOCK)
    swapped = data[size : 2 * size] + data[:size] + data[2 * size :]
    assert host(space(swapped)) != host(space(data))


def test_h63_equal_rows_moved_to_another_place_show() -> None:
    zero, one = bytes(BLOCK), b"\1" * BLOCK
    assert len({host(space(b"".join(rows))) for rows in ([zero, one, one], [one, zero, one], [one, one, zero])}) == 3
    assert host(space(bytes(BLOCK))) != host(space(bytes(BLOCK + 1)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_leaves_are_digested_in_the_order_asked_for(threads: int) -> None:
    data = random_bytes(3 * LEAF_BYTES + 77)
    memory = space(data, [100, LEAF_BYTES + 5])
    leaves = [leaf(at, min(LEAF_BYTES, len(data) - at)) for at in (2 * LEAF_BYTES, 0, 3 * LEAF_BYTES, LEAF_BYTES)] * 9
    seen: list[int] = []
    found = digest.digest_leaves(memory, leaves, threads=threads, progress=seen.append)
    assert found == b"".join(reference_digest(data[one.span.offset : one.span.end]) for one in leaves)
    assert sum(seen) == sum(one.span.nbytes for one in leaves)


def test_digest_sees_a_change_made_through_the_tensor() -> None:
    tensor = torch.zeros(1000, dtype=torch.bfloat16)
    memory = AddressSpace([Segment(0, tensor.data_ptr(), 2000, "cpu")], [], tensor)
    before = host(memory)
    tensor[999] = 1
    assert host(memory) != before


def test_span_outside_the_memory_is_refused() -> None:
    with pytest.raises(IndexError):
        digest.digest_span(space(b"abc"), Span(1, 3))


def test_a_view_is_the_memory_itself() -> None:
    tensor = torch.zeros(4, dtype=torch.uint8)
    view(tensor.data_ptr() + 1, 2)[:] = b"ab"
    assert tensor.tolist() == [0, 97, 98, 0]
    assert view(0, 0).nbytes == 0


def test_h55_host_digest_needs_no_memory_of_its_own() -> None:
    import resource

    tensor = torch.ones(96 << 20, dtype=torch.uint8)
    memory = AddressSpace([Segment(0, tensor.data_ptr(), tensor.numel(), "cpu")], [], tensor)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest.digest_leaves(memory, [leaf(at << 20, 1 << 20) for at in range(96)])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


def test_other_threads_run_while_a_leaf_is_hashed() -> None:
    tensor = torch.ones(32 << 20, dtype=torch.uint8)
    memory = AddressSpace([Segment(0, tensor.data_ptr(), tensor.numel(), "cpu")], [], tensor)
    counted, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    digest.digest_leaves(memory, [leaf(at << 20, 1 << 20) for at in range(32)])
    done.set()
    thread.join(10)
    assert counted[0] > 100
