"""How large anything on the control plane may be, and the checks that refuse the rest with ``ProtocolError``."""

from __future__ import annotations

import json
import math

from weightwire.errors import ProtocolError
from weightwire.types import Json

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""Largest gRPC message either way; everything larger is streamed in parts of at most ``PART_BYTES``."""
PART_BYTES = 512 * 1024
MAX_STATES = 1_000_000
MAX_NAMES = 1_000_000
MAX_LEAVES = 4 * 1024 * 1024
"""4 TiB of one shard."""
MAX_MANIFEST_BYTES = 1024 * 1024 * 1024
"""All parts of one manifest together, as they arrive."""
MAX_NAME = 1024
MAX_JSON_BYTES = 1024 * 1024
MAX_ENDPOINT_BYTES = 64 * 1024 * 1024
"""As ``transport.base`` has it (which stands beside this package, not below it)."""
MAX_TRANSPORTS = 16
MAX_RANGES = 65_536
MAX_DECISION_BYTES = 256 * 1024
MAX_WAIT_S = 3600.0
MAX_RATE = 1e15
"""Bytes a second."""

TEXTS = {
    "shard_key": 256,
    "replica_key": 256,
    "family_key": 256,
    "replica_keys": 256,
    "family_keys": 256,
    "incarnation": 128,
    "replica_incarnation": 128,
    "exclude": 128,
    "asker": 128,
    "reporter": 128,
    "reader": 128,
    "lease_id": 128,
    "unknown": 128,
    "content_id": 128,
    "derived_id": 128,
    "weights_id": 128,
    "layout_digest": 128,
    "following": 128,
    "model_id": 1024,
    "revision": 256,
    "revisions": 256,
    "host": 256,
    "reporter_host": 256,
    "reader_host": 256,
    "endpoints": 300,
    "identity": 64 * 1024,
    "subject": 512,
    "reason": 1024,
    "detail": 1024,
    "note": 1024,
    "key": 512,
    "transports": 64,
    "transport": 64,
}
"""Longest legal text of each field, in characters; a field that is not here cannot be decoded."""

COUNTS = {
    "endpoints": 16,
    "updates": 4096,
    "checks": 4096,
    "unknown": 4096,
    "rechecks": 4096,
    "replica_keys": 64,
    "family_keys": 64,
    "revisions": 64,
    "replicas": 64,
    "groups": 64,
    "loading": 64,
    "others": 16,
    "rejected": 128,
    "exclude": 4096,
    "candidates": 64,
    "ranges": MAX_RANGES,
    "transports": MAX_TRANSPORTS,
}
"""Most elements of each repeated field; every answer stays below ``MAX_MESSAGE_BYTES`` with all of them full."""

MAX_TOLD_BYTES = 1024 * 1024
"""Digests that one ``Progress`` update tells: 65,536 leaves; more come in further updates."""

BYTES = {"lease": 256, "value": MAX_DECISION_BYTES, "digests": MAX_TOLD_BYTES}
"""Longest legal byte strings."""


def text(value: str, limit: int, what: str) -> str:
    """``value``, if it is short enough and has nothing in it that could forge a log line."""
    if len(value) > limit:
        raise ProtocolError(f"{what} has {len(value)} characters, more than {limit}")
    if not value.isprintable():
        raise ProtocolError(f"{what} holds characters that cannot be printed")
    return value


def count(number: int, limit: int, what: str) -> int:
    """``number``, if it is within ``limit``."""
    if not 0 <= number <= limit:
        raise ProtocolError(f"{what} counts {number}, outside 0..{limit}")
    return number


def real(value: float, high: float, what: str) -> float:
    """``value``, if it is a number from 0 to ``high``."""
    if not math.isfinite(value) or not 0 <= value <= high:
        raise ProtocolError(f"{what} is {value}, outside 0..{high:g}")
    return value


def parse_json(data: bytes, what: str) -> dict[str, Json]:
    """A JSON object from a peer."""
    if len(data) > MAX_JSON_BYTES:
        raise ProtocolError(f"{what} has {len(data)} bytes, more than {MAX_JSON_BYTES}")
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is not JSON") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is not a JSON object")
    return value


def dump_json(value: object, what: str) -> bytes:
    """The JSON text of an object of ours, as ``parse_json`` will take it."""
    try:
        data = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} cannot be written as JSON: {error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise ProtocolError(f"{what} has {len(data)} bytes, more than {MAX_JSON_BYTES}")
    return data


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")
