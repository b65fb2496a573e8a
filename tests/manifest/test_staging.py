"""Host memory for a layout: every entry as it is described, one allocation, ties and views shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightwire.errors import CatalogueError
from weightwire.manifest.catalogue import catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.records import Entry, Layout
from weightwire.manifest.staging import Staging
from weightwire.types import TensorClass


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.randn(3, 5).to(torch.bfloat16))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.nothing = nn.Parameter(torch.empty(0, 7))
        self.scalar = nn.Parameter(torch.tensor(3.0))
        self.tied = self.odd
        self.whole = nn.Parameter(torch.arange(24.0).reshape(4, 6))
        self.register_buffer("part", self.whole.data[1:3, 2:5])
        self.register_buffer("table", torch.randn(9), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False, True]))


def test_a_staged_shard_is_a_shard() -> None:
    module = Module()
    described = catalogue(module)
    staging = Staging(described.layout)
    assert staging.nbytes == described.layout.nbytes
    for segment, other in zip(described.memory.segments, staging.catalogue.memory.segments, strict=True):
        assert segment.nbytes == other.nbytes
    for name, tensor in described.tensors.items():
        staging.tensors[name].copy_(tensor)
    held = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers()))
    assert held.keys() == staging.tensors.keys()
    for name, tensor in held.items():
        assert staging.tensors[name].shape == tensor.shape, name
        assert staging.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(staging.tensors[name], tensor), name
    assert staging.tensors["turned"].stride() == module.turned.stride()
    assert staging.tensors["tied"].data_ptr() == staging.tensors["odd"].data_ptr()
    leaves = described.layout.leaves
    digests = [digest_leaves(each.memory, leaves) for each in (described, staging.catalogue)]
    assert digests[0] == digests[1]


def test_a_shard_that_does_not_fit_is_an_error() -> None:
    huge = Entry(name="w", dtype="uint8", shape=(1 << 43,), order=(0,), kind=TensorClass.WEIGHT, nbytes=1 << 43)
    with pytest.raises(CatalogueError, match="8796093022208 bytes cannot be staged"):
        Staging(Layout(entries=(huge,)))
