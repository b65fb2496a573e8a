"""The same promises on device memory; runs where a GPU is, is skipped by name elsewhere."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import xxhash
from manifest_support import manifest_of, randomise, reference_digest
from torch import nn

from weightwire.manifest import device_digest, device_kernel
from weightwire.manifest.catalogue import capture, catalogue
from weightwire.manifest.device_memory import tensor_at
from weightwire.manifest.digest import digest_leaves, digest_span
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.plan import plan

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
    compiled = device_kernel.block_hashes(stage, lengths)
    assert compiled is not None
    assert torch.equal(compiled, device_digest.block_hashes(stage, lengths))
    assert [value % (1 << 64) for value in compiled.tolist()] == [xxhash.xxh64_intdigest(data[:n]) for n in lengths]


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
    assert torch.cuda.max_memory_allocated() - before < 400 << 20
    last = bytes(tensor_at(found.memory.segments[0].address + (699 << 20), LEAF_BYTES, "cuda:0").cpu().numpy())
    assert digests[-16:] == reference_digest(last)
