"""Where the ranks of a replica leave their write-once values: one protocol, three adapters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from weightwire.errors import DecisionError, MetadataError

Result = TypeVar("Result")

_POLL_S = 0.02
_RPC_WAIT_S = 5.0
"""The longest that one call to the metadata server waits; longer waits are several calls."""


class DecisionStore(Protocol):
    """Write-once values that all ranks of a replica see. Keys and values are short ASCII text."""

    def set_if_absent(self, key: str, value: bytes) -> bytes:
        """Write ``value`` unless something is there; what is there now.

        Raises:
            DecisionError: the store cannot be reached.
        """
        ...

    def get(self, key: str) -> bytes | None:
        """What is there, without waiting.

        Raises:
            DecisionError: the store cannot be reached.
        """
        ...

    def wait(self, keys: Sequence[str], timeout: float) -> dict[str, bytes]:
        """Those of ``keys`` that are there, as soon as all are, at the latest after ``timeout`` seconds.

        Raises:
            DecisionError: the store cannot be reached.
        """
        ...


class MemoryDecisions:
    """For the ranks of one process. Thread safe."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set_if_absent(self, key: str, value: bytes) -> bytes:
        """See ``DecisionStore.set_if_absent``."""
        with self._changed:
            kept = self._values.setdefault(key, value)
            self._changed.notify_all()
            return kept

    def get(self, key: str) -> bytes | None:
        """See ``DecisionStore.get``."""
        with self._changed:
            return self._values.get(key)

    def wait(self, keys: Sequence[str], timeout: float) -> dict[str, bytes]:
        """See ``DecisionStore.wait``."""
        with self._changed:
            self._changed.wait_for(lambda: all(key in self._values for key in keys), timeout)
            return {key: self._values[key] for key in keys if key in self._values}


class TorchStoreDecisions:
    """On a ``torch.distributed`` store (a ``TCPStore``, or a ``PrefixStore`` over one), without importing torch.

    Args:
        store: has ``compare_set``, ``check`` and ``get``; one that no collective uses.
        prefix: keeps our keys apart from others'.
    """

    def __init__(self, store: Any, prefix: str = "weightwire/") -> None:
        self._store = store
        self._prefix = prefix

    def set_if_absent(self, key: str, value: bytes) -> bytes:
        """See ``DecisionStore.set_if_absent``."""
        # an empty expected value sets the key only where there is none, and the answer is what is there then
        return _reached(lambda: bytes(self._store.compare_set(self._prefix + key, "", value.decode("ascii"))))

    def get(self, key: str) -> bytes | None:
        """See ``DecisionStore.get``."""
        name = self._prefix + key
        return _reached(lambda: bytes(self._store.get(name)) if self._store.check([name]) else None)

    def wait(self, keys: Sequence[str], timeout: float) -> dict[str, bytes]:
        """See ``DecisionStore.wait``."""
        # the store's own wait() tells neither which keys are there nor a timeout from a lost connection
        until = time.monotonic() + timeout
        found: dict[str, bytes] = {}
        while True:
            for key in keys:
                value = None if key in found else self.get(key)
                if value is not None:
                    found[key] = value
            left = until - time.monotonic()
            if left <= 0 or all(key in found for key in keys):
                return found
            time.sleep(min(_POLL_S, left))


class MetadataDecisions:
    """On the metadata server, where the engine has no store of its own.

    Args:
        decide: ``MetadataClient.decide``: key, value or None, seconds to wait.
        prefix: the replica's own name; all its ranks give the same one, and no other replica does.
    """

    def __init__(self, decide: Callable[[str, bytes | None, float], bytes | None], prefix: str) -> None:
        self._decide = decide
        self._prefix = f"{prefix}/"

    def set_if_absent(self, key: str, value: bytes) -> bytes:
        """See ``DecisionStore.set_if_absent``."""
        recorded = self._ask(key, value, 0.0)
        if recorded is None:
            raise DecisionError(f"the metadata server recorded nothing under {key}", "see its log")
        return recorded

    def get(self, key: str) -> bytes | None:
        """See ``DecisionStore.get``."""
        return self._ask(key, None, 0.0)

    def wait(self, keys: Sequence[str], timeout: float) -> dict[str, bytes]:
        """See ``DecisionStore.wait``."""
        until = time.monotonic() + timeout
        found: dict[str, bytes] = {}
        for key in keys:
            value = None
            while value is None:
                left = until - time.monotonic()
                value = self._ask(key, None, max(0.0, min(left, _RPC_WAIT_S)))
                if left <= 0:
                    break
            if value is not None:
                found[key] = value
        return found

    def _ask(self, key: str, value: bytes | None, wait_s: float) -> bytes | None:
        try:
            return self._decide(self._prefix + key, value, wait_s)
        except MetadataError as error:
            raise DecisionError(f"the decision could not be recorded: {error.problem}", error.remedy) from error


def _reached(call: Callable[[], Result]) -> Result:
    try:
        return call()
    except (RuntimeError, OSError) as error:  # torch's store errors are RuntimeErrors
        reason = str(error).partition("\n")[0][:200]
        raise DecisionError(f"the ranks' store cannot be reached: {reason}", "see the log of rank 0") from error
