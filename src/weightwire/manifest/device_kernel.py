"""XXH64 of many blocks as one CUDA kernel, and a kernel that gathers the blocks that lie in pieces.

A warp hashes eight blocks at a time. XXH64 is four independent lanes over stripes of 32 bytes, so four threads share a
block. What they read next is on its way into shared memory meanwhile, each block's in runs of ``ROW`` bytes that the
whole warp fetches together: a block of its own for each thread, read as it comes, is fifty times slower.

``device_digest`` gives the same values from plain tensor operations on any device, far more slowly. Which of the two is
in use is logged once; a kernel that does not compile, or does not give known values, is not used.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading

import numpy as np
import torch
import xxhash

from weightwire.manifest.device_blocks import Column
from weightwire.manifest.device_compiler import Module
from weightwire.manifest.records import BLOCK_BYTES

logger = logging.getLogger(__name__)

ROW = 1024
STAGES = 3
WARP_BLOCKS = 8
THREADS = 32
GATHER_THREADS = 256

SOURCE = r"""
typedef unsigned long long u64;
typedef unsigned int u32;

const u64 P1 = 0x9E3779B185EBCA87ULL, P2 = 0xC2B2AE3D27D4EB4FULL, P3 = 0x165667B19E3779F9ULL;
const u64 P4 = 0x85EBCA77C2B2AE63ULL, P5 = 0x27D4EB2F165667C5ULL;
const u32 EVERY = 0xFFFFFFFFu, BLOCKS = 8, STRIPE = 32;
const u32 PITCH = ROW + STRIPE;  // so that eight rows read at once lie in different banks

__device__ __forceinline__ u64 rotl(u64 value, int by) { return (value << by) | (value >> (64 - by)); }
__device__ __forceinline__ u64 mixed(u64 lane, u64 word) { return rotl(lane + word * P2, 31) * P1; }

__device__ __forceinline__ void copy16(unsigned char* to, const unsigned char* from) {
#if __CUDA_ARCH__ >= 800
  u32 shared = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
#else
  *(uint4*)to = *(const uint4*)from;
#endif
}

__device__ __forceinline__ void end_of_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

__device__ __forceinline__ void await_oldest_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
#endif
}

__device__ __forceinline__ u64 finished(u64 hash, const unsigned char* at, u32 rest) {
  for (; rest >= 8; rest -= 8, at += 8) hash = rotl(hash ^ mixed(0, *(const u64*)at), 27) * P1 + P4;
  if (rest >= 4) {
    hash = rotl(hash ^ *(const u32*)at * P1, 23) * P2 + P3;
    rest -= 4, at += 4;
  }
  for (; rest > 0; --rest, ++at) hash = rotl(hash ^ *at * P5, 11) * P1;
  hash = (hash ^ (hash >> 33)) * P2;
  hash = (hash ^ (hash >> 29)) * P3;
  return hash ^ (hash >> 32);
}

// address: of each block, a multiple of 16. out: its XXH64 with seed 0.
extern "C" __global__ void __launch_bounds__(32)
xxh64_blocks(const u64* address, const u64* length, u64* out, u64 count) {
  __shared__ __align__(16) unsigned char tile[STAGES][BLOCKS][PITCH];
  const u32 thread = threadIdx.x, mine = thread / 4, lane = thread % 4;
  const u64 block = (u64)blockIdx.x * BLOCKS + mine;
  const u32 nbytes = block < count ? (u32)length[block] : 0;
  const u64 at = block < count ? address[block] : 0;
  const u32 whole = nbytes / STRIPE * STRIPE;
  u64 start[BLOCKS];
  u32 size[BLOCKS], longest = 0;
#pragma unroll
  for (u32 row = 0; row < BLOCKS; ++row) {
    start[row] = __shfl_sync(EVERY, at, row * 4);
    size[row] = __shfl_sync(EVERY, whole, row * 4);
    longest = size[row] > longest ? size[row] : longest;
  }
  u64 state = lane == 0 ? P1 + P2 : lane == 1 ? P2 : lane == 2 ? 0 : 0 - P1;

  auto load = [&](u32 number) {
    unsigned char* to = tile[number % STAGES][0];
#pragma unroll
    for (u32 row = 0; row < BLOCKS; ++row)
#pragma unroll
      for (u32 part = 0; part < ROW; part += 512) {
        const u32 column = part + thread * 16, offset = number * ROW + column;
        if (offset < size[row]) copy16(to + row * PITCH + column, (const unsigned char*)start[row] + offset);
      }
    end_of_group();
  };
  const u32 tiles = (longest + ROW - 1) / ROW;
#pragma unroll 1
  for (u32 number = 0; number < STAGES - 1; ++number) load(number);
#pragma unroll 1
  for (u32 number = 0; number < tiles; ++number) {
    await_oldest_group();
    __syncwarp();  // everybody's part of this tile is here, and nobody reads the one before any more
    load(number + STAGES - 1);
    const u64* words = (const u64*)tile[number % STAGES][mine] + lane;
    const u32 done = number * ROW;
    if (whole >= done + ROW) {
#pragma unroll
      for (u32 stripe = 0; stripe < ROW / STRIPE; ++stripe) state = mixed(state, words[stripe * 4]);
    } else {
#pragma unroll 1
      for (u32 stripe = 0; done + stripe * STRIPE < whole; ++stripe) state = mixed(state, words[stripe * 4]);
    }
  }

  u64 lanes[4], hash = P5;
#pragma unroll
  for (u32 each = 0; each < 4; ++each) lanes[each] = __shfl_sync(EVERY, state, (thread & ~3u) + each);
  if (nbytes >= STRIPE) {
    hash = rotl(lanes[0], 1) + rotl(lanes[1], 7) + rotl(lanes[2], 12) + rotl(lanes[3], 18);
#pragma unroll
    for (u32 each = 0; each < 4; ++each) hash = (hash ^ mixed(0, lanes[each])) * P1 + P4;
  }
  if (block < count && lane == 0)
    out[block] = finished(hash + nbytes, (const unsigned char*)at + whole, nbytes - whole);
}

extern "C" __global__ void __launch_bounds__(256) gather(const u64* from, const u64* to, const u64* length) {
  const unsigned char* source = (const unsigned char*)from[blockIdx.x];
  unsigned char* target = (unsigned char*)to[blockIdx.x];
  const u32 nbytes = (u32)length[blockIdx.x];
  const u32 wide = ((u64)source | (u64)target) % 16 ? 0 : nbytes / 16;
  for (u32 at = threadIdx.x; at < wide; at += 256) ((uint4*)target)[at] = ((const uint4*)source)[at];
  for (u32 at = wide * 16 + threadIdx.x; at < nbytes; at += 256) target[at] = source[at];
}
"""


class Kernel:
    """Both kernels, on one device. Safe to use from several threads, which have used the device before.

    Attributes:
        device: the device.

    Args:
        index: of the CUDA device.
        row: bytes of a block that are fetched together; a multiple of 512.
        stages: tiles in shared memory, at least two; with ``row`` at most 48 KiB.

    Raises:
        OSError: there is no compiler.
        RuntimeError: it does not compile here.
    """

    def __init__(self, index: int, row: int = ROW, stages: int = STAGES) -> None:
        self.device = torch.device("cuda", index)
        self._module = Module(SOURCE, ("--std=c++17", f"-DROW={row}", f"-DSTAGES={stages}"), index)
        self._hash = self._module.function("xxh64_blocks")
        self._gather = self._module.function("gather")

    def table(self, columns: Column) -> torch.Tensor:
        """``columns`` (rows of equal length) on the device, made on the current stream."""
        return torch.from_numpy(columns).to(self.device)

    def hash(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Queue XXH64 (seed 0) of blocks, as ``int64`` bit patterns, on the current stream.

        Args:
            blocks: a ``table`` of two rows, or a part of one: the address of each block on this device, a multiple of
                16, and its length, 1 to ``BLOCK_BYTES``. A length of 0 reads nothing and gives a meaningless value.
            out: shape ``(blocks,)``, ``int64``, contiguous, on this device.
        """
        count = blocks.shape[1]
        self._launch(self._hash, -(-count // WARP_BLOCKS), THREADS, *_rows(blocks), out.data_ptr(), count)

    def gather(self, copies: torch.Tensor) -> None:
        """Queue copies, each at most ``BLOCK_BYTES`` long, on the current stream.

        Args:
            copies: a ``table`` of three rows: from, to, length; addresses of this device.
        """
        self._launch(self._gather, copies.shape[1], GATHER_THREADS, *_rows(copies))

    def _launch(self, function: ctypes.c_void_p, blocks: int, threads: int, *arguments: int) -> None:
        with torch.cuda.device(self.device):
            self._module.launch(function, blocks, threads, *map(ctypes.c_uint64, arguments))


def _rows(table: torch.Tensor) -> list[int]:
    """The address of each row."""
    return [table.data_ptr() + row * table.stride(0) * table.itemsize for row in range(table.shape[0])]


_lock = threading.Lock()


def kernel_on(device: str) -> Kernel | None:
    """The kernels for ``device``, compiled on first use; ``None`` where there are none (a reason is logged once)."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    with _lock:  # or two threads would both compile
        return _checked(int(index or 0))


@functools.cache
def _checked(index: int) -> Kernel | None:
    try:
        with torch.cuda.device(index):
            kernel = Kernel(index)
            wrong = _wrong(kernel, torch.device("cuda", index))
    except (OSError, RuntimeError, AttributeError) as error:
        wrong = str(error)
    if wrong:
        logger.warning("leaf digests on cuda:%d run as plain tensor operations, slowly: %s", index, wrong)
        return None
    return kernel


_CHECKED = (BLOCK_BYTES, 239, 1, BLOCK_BYTES - 1, 32, 31, ROW, ROW + 33, BLOCK_BYTES, 7, 12)


def _wrong(kernel: Kernel, device: torch.device) -> str:
    """What is wrong with the values that ``kernel`` gives; empty if nothing."""
    data = np.random.default_rng(0).integers(0, 256, (len(_CHECKED), BLOCK_BYTES), dtype=np.uint8)
    scattered = torch.from_numpy(data).to(device)
    rows = torch.empty_like(scattered)
    found = torch.zeros(len(_CHECKED), dtype=torch.int64, device=device)
    nbytes = np.array(_CHECKED, dtype=np.int64)
    offsets = np.arange(len(_CHECKED), dtype=np.int64) * BLOCK_BYTES
    kernel.gather(kernel.table(np.stack((scattered.data_ptr() + offsets, rows.data_ptr() + offsets, nbytes))))
    kernel.hash(kernel.table(np.stack((rows.data_ptr() + offsets, nbytes))), found)
    pairs = zip(found.tolist(), data, _CHECKED, strict=True)
    if all(value % (1 << 64) == xxhash.xxh64_intdigest(row[:n].tobytes()) for value, row, n in pairs):
        return ""
    return "the kernel gives wrong values"
