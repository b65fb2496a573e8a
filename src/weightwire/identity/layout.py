"""The layout id: which kernel backend, device and transforms the bytes were laid out for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from weightwire.types import Stage

_READABLE_CHARS = 512


def layout_id(
    stage: Stage,
    *,
    kernel_backend: str,
    device_architecture: str,
    transform_protocol: str,
    raw_layouts: Iterable[str | None],
) -> str:
    """What ``Identity.layout_id`` is to be.

    Args:
        stage: when the bytes are published.
        kernel_backend: such as ``torch`` or ``cutlass``.
        device_architecture: such as ``cpu`` or ``sm90``.
        transform_protocol: version of what ``post_load_weights`` does.
        raw_layouts: what every quantization method and module with weights declares about its *loaded* bytes: a
            versioned name if they depend on neither backend nor device, ``None`` where nothing is declared.

    Returns:
        In ``LOADED``, where everything is declared: the declared names alone (empty if there are none), so that unlike
        hardware can share. Otherwise backend, device and protocol: undeclared means dependent.
    """
    declared = list(raw_layouts)
    if stage is Stage.LOADED and None not in declared:
        return _short(",".join(f"raw={name}" for name in sorted({name for name in declared if name})))
    parts = [f"backend={kernel_backend}", f"device={device_architecture}", f"transform={transform_protocol}"]
    return _short(",".join(parts))


def _short(text: str) -> str:
    return text if len(text) <= _READABLE_CHARS else "sha256=" + hashlib.sha256(text.encode()).hexdigest()
