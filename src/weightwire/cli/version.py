"""``weightwire version``."""

from __future__ import annotations

import json
import platform
from importlib import metadata

from weightwire.cli.frame import JsonOption, VerboseOption, begin, out

PACKAGES = ("weightwire", "torch", "grpcio", "protobuf", "xxhash", "nixl", "vllm")


def version(*, as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Print the versions of weightwire and of what it stands on."""
    begin(verbose=verbose)
    found = {name: _installed(name) for name in PACKAGES} | {"python": platform.python_version()}
    if as_json:
        out().print_json(json.dumps(found))
        return
    others = ", ".join(f"{name} {text or '-'}" for name, text in found.items() if name != "weightwire")
    out().print(f"weightwire {found['weightwire']} ({others})")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
