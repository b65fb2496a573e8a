"""CUDA C++ compiled and launched with what every torch for CUDA brings along: NVRTC and the driver.

torch's own way to do this is private and looks for a toolkit with its headers; Triton wants a C compiler on the host.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Handle = ctypes.c_void_p


class Module:
    """A compiled source, loaded on one device until the process ends.

    Args:
        source: CUDA C++ without includes; its kernels are ``extern "C"``.
        options: further ones for NVRTC, such as ``-DNAME=1``.
        index: of the device.

    Raises:
        OSError: NVRTC or the driver is not here.
        RuntimeError: it does not compile, or the device does not take it; with the compiler's first lines.
    """

    def __init__(self, source: str, options: Sequence[str], index: int) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        torch.cuda.synchronize(index)  # there is a context, and it is this thread's
        with torch.cuda.device(index):
            image = _compiled(_nvrtc(), source, (_architecture(index), *options))
            self._module = Handle()
            self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), image), "load")

    def function(self, name: str) -> Handle:
        """A kernel, for ``launch``."""
        found = Handle()
        name_ = ctypes.c_char_p(name.encode())
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(found), self._module, name_), name)
        return found

    def launch(self, function: Handle, blocks: int, threads: int, *arguments: ctypes.c_uint64) -> None:
        """Queue one kernel on the current stream of the current device, which this thread has used before.

        Args:
            function: from ``function`` of this module.
            blocks: grid size, more than zero.
            threads: of a block.
            arguments: 64-bit integers or addresses; the memory must stay valid until the kernel has run.

        Raises:
            RuntimeError: the driver refuses.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        stream = Handle(torch.cuda.current_stream().cuda_stream)
        shape = (blocks, 1, 1, threads, 1, 1)
        self._check(self._driver.cuLaunchKernel(function, *shape, 0, stream, pointers, None), "launch")

    def _check(self, result: int, doing: str) -> None:
        if result:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(result, ctypes.byref(text))
            raise RuntimeError(f"{doing}: {(text.value or b'CUDA error').decode()} ({result})")


def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"--gpu-architecture=sm_{major}{minor}"


def _nvrtc() -> Any:
    with contextlib.suppress(OSError):  # knows where torch's own NVRTC is; afterwards the bare name finds it
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))
    library = ctypes.CDLL(f"libnvrtc.so.{str(torch.version.cuda).partition('.')[0]}")
    for path in _beside("/libnvrtc.so", "libnvrtc-builtins.so.*"):  # NVRTC opens them by bare name, too
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(path))
    return library


def _beside(loaded: str, pattern: str) -> list[Path]:
    """Files that match ``pattern`` in the folder of the loaded library whose path has ``loaded`` in it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if loaded in line:
            return list(Path(line[line.index("/") :]).parent.glob(pattern))
    return []


def _compiled(library: Any, source: str, options: Sequence[str]) -> bytes:
    program = Handle()
    _expect(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"weightwire.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            log = _fetched(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise RuntimeError(log.decode(errors="replace").strip("\0\n")[:500])
        return _fetched(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetched(size_of: Any, fetch: Any, program: Handle) -> bytes:
    size = ctypes.c_size_t()
    _expect(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _expect(fetch(program, buffer))
    return buffer.raw


def _expect(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC failed ({result})")
