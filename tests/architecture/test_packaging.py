"""What is installed, and what importing it does."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import weightwire

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_weightwire_is_cheap() -> None:
    heavy = "{'torch', 'grpc', 'nixl', 'numpy', 'transformers'}"
    assert run(f"import sys, weightwire; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_every_exported_name_is_there_and_none_is_missing() -> None:
    assert list(weightwire.__all__) == sorted(weightwire.__all__, key=str)
    for name in weightwire.__all__:
        assert getattr(weightwire, name) is not None
    assert {"publish", "receive", "WeightwireError", "LoadReport"} <= set(weightwire.__all__)
    assert set(weightwire.__all__) <= set(dir(weightwire))


def test_importing_the_command_line_loads_no_torch() -> None:
    assert run("import sys, weightwire.cli.main; print('torch' in sys.modules)") == "False"


def test_layers_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout


def test_the_wheel_is_typed_and_complete(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "weightwire/py.typed" in names
    source = ROOT / "src"
    assert {str(path.relative_to(source)) for path in (source / "weightwire").rglob("*.py")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("test" in name or name.endswith(".pyc") for name in names)
