"""What is installed, and what importing it does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import xxhash

import weightwire

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 1000
BLOCKS = (xxhash.xxh64_intdigest(CONTENT[at : at + 65536]) for at in range(0, len(CONTENT), 65536))
KNOWN = xxhash.xxh3_128_hexdigest(b"".join(value.to_bytes(8, "little") for value in BLOCKS))


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


def build(root: Path, target: str, to: Path, **environ: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(to)]
    subprocess.run(command, cwd=root, env=os.environ | environ, capture_output=True, timeout=100, check=True)
    (built,) = (path for path in to.iterdir() if path.suffix in {".whl", ".gz"})
    return built


COMPILED = pytest.param({}, marks=pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"))
DIGEST = "weightwire/manifest/libhost_digest.so"


@pytest.mark.parametrize("environ", [COMPILED, {"HATCH_BUILD_NO_HOOKS": "true"}, {"CC": "no-such-compiler"}])
def test_the_wheel_is_typed_and_complete_and_digests_right(tmp_path: Path, environ: dict[str, str]) -> None:
    wheel = build(ROOT, "wheel", tmp_path / "wheel", **environ)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "weightwire/py.typed" in names
    source = ROOT / "src"
    assert {str(path.relative_to(source)) for path in (source / "weightwire").rglob("*.py")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("test" in name or name.endswith(".pyc") for name in names)
    pure = bool(environ)
    assert wheel.name.endswith("-py3-none-any.whl") == pure
    assert (DIGEST in names) == (not pure)
    installed = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*installed, str(tmp_path / "site"), str(wheel)], capture_output=True, timeout=100, check=True)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
from weightwire.manifest import digest, host_library
assert host_library.__file__.startswith({str(tmp_path)!r}), host_library.__file__
print(type(host_library.loaded()).__name__, digest.digest_bytes(bytes(range(256)) * 1000).hex())
"""
    assert run(code).split() == ["str" if pure else "HostLibrary", KNOWN]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_an_editable_install_compiles_beside_the_sources(tmp_path: Path) -> None:
    place = tmp_path / "src" / "weightwire" / "manifest"
    place.mkdir(parents=True)
    shutil.copy(ROOT / "src" / "weightwire" / "manifest" / "host_digest.c", place)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from hatchling.bridge.app import Application
from hatch_build import HostDigestHook
hook, data = HostDigestHook({str(tmp_path)!r}, {{}}, None, None, "", "wheel", Application()), {{"force_include": {{}}}}
hook.initialize("editable", data)
hook.finalize("editable", data, "")
print(data["tag"], data["force_include"], hook._folder.exists())
"""
    tag, *rest = run(code).split()
    assert tag.startswith("py3-none-linux_")
    assert rest == ["{}", "False"]
    assert sorted(path.name for path in place.iterdir()) == ["host_digest.c", "libhost_digest.so"]


def test_the_source_distribution_has_what_is_compiled(tmp_path: Path) -> None:
    with tarfile.open(build(ROOT, "sdist", tmp_path)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"hatch_build.py", "src/weightwire/manifest/host_digest.c"} <= names
    assert not any(name.endswith(".so") for name in names)
