"""The same promises on device memory; runs where a GPU is, is skipped by name elsewhere."""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xxhash
from manifest_support import BLOCK, manifest_of, randomise, reference_digest
from torch import nn

from weightwire.manifest import device_digest, device_kernel
from weightwire.manifest.address import AddressSpace, Segment
from weightwire.manifest.catalogue import capture, catalogue
from weightwire.manifest.device_memory import tensor_at
from weightwire.manifest.digest import LeafDigests, digest_leaves, digest_span
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.plan import plan
from weightwire.manifest.records import Leaf
from weightwire.types import Span, TensorClass

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3000, 257, dtype=torch.bfloat16)
        self.layers = nn.ModuleList([nn.Linear(33, 65) for _ in range(4)])
        self.head = nn.Linear(257, 3000, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.permuted = nn.Parameter(torch.zeros(2, 3, 4).permute(2, 0, 1))
        self.gappy = nn.Parameter(torch.zeros(5, 9)[:, 2:5])
        self.register_buffer("inv_freq", torch.arange(8.0), persistent=False)


def test_h62_device_and_host_digests_are_equal() -> None:
    host = Net()
    randomise(host)
    device = copy.deepcopy(host).cuda()
    here, there = catalogue(host), catalogue(device)
    assert here.layout == there.layout
    assert {segment.device for segment in there.memory.segments} == {"cuda:0"}
    assert manifest_of(here) == manifest_of(there)
    for leaf in here.layout.leaves:
        assert digest_span(there.memory, leaf.span) == digest_span(here.memory, leaf.span)


def test_kernel_and_tensor_operations_are_xxh64_for_every_short_length() -> None:
    lengths, data = list(range(200, 0, -1)), random.Random(0).randbytes(200)
    stage = torch.full((200, 224), 0xEE, dtype=torch.uint8)
    for row, length in enumerate(lengths):
        stage[row, :length] = torch.frombuffer(bytearray(data[:length]), dtype=torch.uint8)
    stage = stage.cuda()
    kernel = device_kernel.kernel_on("cuda:0")
    assert kernel is not None
    compiled = torch.empty(200, dtype=torch.int64, device="cuda")
    kernel.hash(kernel.table(np.stack((stage.data_ptr() + np.arange(200) * 224, lengths))), compiled)
    assert torch.equal(compiled, device_digest.block_hashes(stage, lengths))
    assert [value % (1 << 64) for value in compiled.tolist()] == [xxhash.xxh64_intdigest(data[:n]) for n in lengths]


@pytest.mark.parametrize(("row", "stages"), [(512, 2), (512, 3), (1024, 3), (2048, 2)])
def test_the_shape_of_the_stage_does_not_enter(row: int, stages: int) -> None:
    kernel = device_kernel.Kernel(0, row, stages)
    data = torch.randint(0, 256, (37 * BLOCK,), dtype=torch.uint8, device="cuda")
    nbytes = np.array([BLOCK - 31 * (at % 3) for at in range(37)])
    found = torch.empty(37, dtype=torch.int64, device="cuda")
    kernel.hash(kernel.table(np.stack((data.data_ptr() + np.arange(37) * BLOCK, nbytes))), found)
    host = data.cpu().numpy().tobytes()
    expected = [xxhash.xxh64_intdigest(host[at * BLOCK : at * BLOCK + n]) for at, n in enumerate(nbytes.tolist())]
    assert [value % (1 << 64) for value in found.tolist()] == expected


@pytest.mark.parametrize("shift", [0, 1, 8, 16])
def test_odd_addresses_and_small_tensors_have_the_digests_of_the_host(shift: int) -> None:
    sizes = [3, 70_000, 1, 65_536, 200_001, 5, 5, 131_072 + 16, 9] * 3
    parts = [torch.randint(0, 256, (shift + size,), dtype=torch.uint8) for size in sizes]

    def described(tensors: list[torch.Tensor], device: str) -> AddressSpace:
        offsets = np.cumsum([0, *sizes]).tolist()
        return AddressSpace(
            [Segment(at, t.data_ptr() + shift, n, device) for at, t, n in zip(offsets, tensors, sizes, strict=False)],
            [],
            tensors,
        )

    here, there = described(parts, "cpu"), described([part.cuda() for part in parts], "cuda:0")
    leaves = [
        Leaf(Span(at, min(LEAF_BYTES, here.span.nbytes - at)), TensorClass.WEIGHT)
        for at in range(0, here.span.nbytes, LEAF_BYTES)
    ]
    assert digest_leaves(there, leaves) == digest_leaves(here, leaves)
    runs = LeafDigests(there, leaves)
    assert runs.of(range(len(leaves))) == digest_leaves(here, leaves)
    assert runs.of(range(1, 2)) == digest_leaves(here, leaves[1:2])


def test_threads_digest_beside_each_other_and_after_what_is_queued() -> None:
    data = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    memory = AddressSpace([Segment(0, data.data_ptr(), data.numel(), "cuda:0")], [], data)
    leaves = [Leaf(Span(at << 20, LEAF_BYTES), TensorClass.WEIGHT) for at in range(64)]
    random_bytes = torch.randint(0, 256, (64 << 20,), dtype=torch.uint8, device="cuda")
    expected = b"".join(reference_digest(bytes(part.numpy())) for part in random_bytes.cpu().view(64, LEAF_BYTES))
    torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
    data.copy_(random_bytes)  # still queued when the digest is asked for
    assert digest_leaves(memory, leaves) == expected
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda at: digest_leaves(memory, leaves[at : at + 16]), range(0, 64, 16)))
    assert b"".join(parts) == expected


def test_a_leaf_that_lies_on_two_devices_has_the_same_digest() -> None:
    host, mixed = Net(), Net()
    for module in (host, mixed):
        randomise(module)
    mixed.layers[1].cuda()
    assert manifest_of(catalogue(host)) == manifest_of(catalogue(mixed))


def test_memory_by_address_is_the_tensor_itself() -> None:
    tensor = torch.zeros(64, dtype=torch.uint8, device="cuda")
    tensor_at(tensor.data_ptr() + 3, 2, "cuda:0").fill_(9)
    assert tensor.cpu().tolist()[2:6] == [0, 9, 9, 0]


def test_h71_to_empty_on_a_device_is_filled_and_mirrored() -> None:
    source = Net().cuda()
    randomise(source.cpu())
    source.cuda()
    with torch.device("meta"):
        target = Net()
    names = capture(target)
    target.to_empty(device="cuda")
    here, there = catalogue(target, names), catalogue(source)
    found = plan(here.layout, manifest_of(there))
    saved = here.save_derived()
    here.poison()
    for part, other in zip(here.bind(found.layout).segments, there.memory.segments, strict=True):
        tensor_at(part.address, part.nbytes, part.device).copy_(tensor_at(other.address, other.nbytes, other.device))
    here.restore_references()
    here.check_mirrors()
    assert manifest_of(here) == manifest_of(there)
    assert torch.equal(target.head.weight, source.embed.weight)
    here.restore_derived(saved)


def test_large_tensors_are_digested_in_bounded_batches() -> None:
    module = nn.Module()
    module.register_buffer("big", torch.randint(0, 256, (700 << 20,), dtype=torch.uint8, device="cuda"))
    found = catalogue(module)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    digests = digest_leaves(found.memory, found.layout.leaves)
    assert torch.cuda.max_memory_allocated() - before < 4 << 20
    last = bytes(tensor_at(found.memory.segments[0].address + (699 << 20), LEAF_BYTES, "cuda:0").cpu().numpy())
    assert digests[-16:] == reference_digest(last)
