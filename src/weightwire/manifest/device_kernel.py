"""XXH64 as one compiled kernel on CUDA: one thread a block, through torch's run-time compiler.

``device_digest`` gives the same values from plain tensor operations on any device, some hundred times slower. Which of
the two is in use is logged once; a kernel that does not compile, or does not give a known value, is not used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
import xxhash

logger = logging.getLogger(__name__)

_SOURCE = """
template <typename T> T xxh64_block(T address, T length) {
  typedef unsigned long long u64;
  const u64 P1 = 0x9E3779B185EBCA87ULL, P2 = 0xC2B2AE3D27D4EB4FULL, P3 = 0x165667B19E3779F9ULL;
  const u64 P4 = 0x85EBCA77C2B2AE63ULL, P5 = 0x27D4EB2F165667C5ULL;
  const unsigned char* at = (const unsigned char*)address;
  const unsigned char* end = at + length;
  u64 hash = P5;
  if (length >= 32) {
    u64 lane[4] = {P1 + P2, P2, 0ULL, 0ULL - P1};
    #pragma unroll 8
    for (long long stripe = length / 32; stripe > 0; --stripe, at += 32)
      for (int i = 0; i < 4; ++i) {
        u64 v = lane[i] + ((const u64*)at)[i] * P2;
        lane[i] = ((v << 31) | (v >> 33)) * P1;
      }
    hash = ((lane[0] << 1) | (lane[0] >> 63)) + ((lane[1] << 7) | (lane[1] >> 57))
         + ((lane[2] << 12) | (lane[2] >> 52)) + ((lane[3] << 18) | (lane[3] >> 46));
    for (int i = 0; i < 4; ++i) {
      u64 v = lane[i] * P2;
      hash = (hash ^ (((v << 31) | (v >> 33)) * P1)) * P1 + P4;
    }
  }
  hash += (u64)length;
  for (; at + 8 <= end; at += 8) {
    u64 v = *(const u64*)at * P2;
    hash ^= ((v << 31) | (v >> 33)) * P1;
    hash = ((hash << 27) | (hash >> 37)) * P1 + P4;
  }
  if (at + 4 <= end) {
    hash ^= (u64)(*(const unsigned int*)at) * P1;
    hash = ((hash << 23) | (hash >> 41)) * P2 + P3;
    at += 4;
  }
  for (; at < end; ++at) {
    hash ^= (u64)(*at) * P5;
    hash = ((hash << 11) | (hash >> 53)) * P1;
  }
  hash = (hash ^ (hash >> 33)) * P2;
  hash = (hash ^ (hash >> 29)) * P3;
  return (T)(hash ^ (hash >> 32));
}
"""


def block_hashes(stage: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor | None:
    """As ``device_digest.block_hashes``; ``None`` where no kernel can be had for the device of ``stage``."""
    if stage.device.type != "cuda":
        return None
    kernel = _kernel(stage.device.index or 0)
    return None if kernel is None else _launch(kernel, stage, lengths)


_Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _launch(kernel: _Kernel, stage: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    starts = torch.arange(len(lengths), dtype=torch.int64, device=stage.device) * stage.shape[1] + stage.data_ptr()
    with torch.cuda.device(stage.device):
        return kernel(starts, torch.tensor(lengths, dtype=torch.int64, device=stage.device))


@functools.cache
def _kernel(index: int) -> _Kernel | None:
    """The compiled kernel for a device, once it has given a known value there."""
    data = bytes(range(256))[:239]
    stage = torch.zeros(256, dtype=torch.uint8)
    stage[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        kernel: _Kernel = torch.cuda.jiterator._create_jit_fn(_SOURCE)  # noqa: SLF001  (torch's documented name for it)
        found = int(_launch(kernel, stage.to(f"cuda:{index}").view(1, 256), [len(data)])) % (1 << 64)
    except (RuntimeError, AttributeError) as error:
        logger.warning("leaf digests on cuda:%d run as plain tensor operations, slowly: %s", index, error)
        return None
    if found != xxhash.xxh64_intdigest(data):
        logger.warning("leaf digests on cuda:%d run as plain tensor operations, slowly: wrong value", index)
        return None
    return kernel
