"""Memory of this process by address, without copies. Host memory only; ``device_memory`` has the rest."""

from __future__ import annotations

import ctypes

_PYBUF_WRITE = 0x200
_from_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_from_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_from_memory.restype = ctypes.py_object


def view(address: int, nbytes: int) -> memoryview:
    """A writable view (format ``B``) of host memory, which the caller keeps alive for as long as the view is used.

    Args:
        address: of the first byte; ours, from an ``AddressSpace``, never from a peer.
        nbytes: length, may be zero.
    """
    if nbytes == 0:
        return memoryview(bytearray())
    found: memoryview = _from_memory(address, nbytes, _PYBUF_WRITE)
    return found
