"""Make ``src/weightwire/wire/generated`` from ``proto/``: ``python tools/gen_proto.py [--check]``.

protoc writes imports by proto path (``weightwire.v1``), which is no Python package of ours; they are rewritten.
``--check`` writes nothing and fails when the checked-in code is not what the protos give.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "weightwire" / "wire" / "generated"
IMPORT = re.compile(r"^from weightwire\.v1 import ", re.MULTILINE)
INIT = '"""Made by ``tools/gen_proto.py`` from ``proto/``; only ``weightwire.wire`` imports it."""\n'


def generate() -> dict[str, str]:
    """File name -> text of everything generated."""
    protos = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", f"--python_out={folder}"]
        subprocess.run([*command, f"--pyi_out={folder}", *protos], cwd=ROOT, check=True)
        made = sorted((Path(folder) / "weightwire" / "v1").iterdir())
        files = {path.name: IMPORT.sub("from weightwire.wire.generated import ", path.read_text()) for path in made}
    return {"__init__.py": INIT} | files


def main() -> int:
    """Write, or compare."""
    files = generate()
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in files.items() if _read(TARGET / name) != text]
        print(f"stale: {', '.join(stale)}; run: python tools/gen_proto.py" if stale else "generated code is current")
        return 1 if stale else 0
    TARGET.mkdir(exist_ok=True)
    for name, text in files.items():
        (TARGET / name).write_text(text)
    return 0


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
