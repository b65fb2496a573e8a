"""Build hook: compile the host digest where there is a C compiler; without one the wheel is pure and works as well.

The library knows no Python, so the wheel is for any Python 3 of one platform (``py3-none-linux_x86_64``). An editable
install gets it beside the sources. ``HATCH_BUILD_NO_HOOKS=true`` (Hatch's own) leaves it out; ``CC`` names a compiler.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = Path("weightwire", "manifest")
SOURCE, LIBRARY = "host_digest.c", "libhost_digest.so"
OPTIONS = "-std=c11 -O3 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Wconversion -Werror"
COMPILE_S = 120


class HostDigestHook(BuildHookInterface[Any]):
    """Adds the library to a wheel, or says why there is none."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is built; ``version`` is ``standard`` or ``editable``."""
        self._folder = Path(tempfile.mkdtemp(prefix="weightwire-build-"))
        built, beside = self._folder / LIBRARY, Path(self.root, "src", PLACE)
        if problem := compiled(beside / SOURCE, built):
            self.app.display_warning(f"weightwire: {problem}; digests will be slower (`weightwire doctor` says so)")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        if version == "editable":
            place(built, beside / LIBRARY)
        else:
            build_data["force_include"][str(built)] = str(PLACE / LIBRARY)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is written."""
        del version, build_data, artifact_path
        shutil.rmtree(self._folder, ignore_errors=True)


def compiled(source: Path, to: Path) -> str:
    """Compile ``source`` into the shared library ``to``; what is wrong, or nothing."""
    if sys.platform != "linux":
        return f"its compiled digest is for Linux, not {sys.platform}"
    command = [*shlex.split(os.environ.get("CC", "cc")), *OPTIONS.split(), "-o", str(to), str(source)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no C compiler ({error})"
    if done.returncode:
        return f"{SOURCE} does not compile: {(done.stderr.strip() or 'no message').splitlines()[0]}"
    return ""


def place(built: Path, to: Path) -> None:
    """Put it into place in one step: a process may have the one before it mapped."""
    beside = to.with_suffix(f".{os.getpid()}")
    shutil.copyfile(built, beside)
    beside.replace(to)
