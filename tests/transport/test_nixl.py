"""The nixl backend, in processes of their own: pytest itself never makes an agent.

Each run is a pytest of its own, whose exact exit code counts: it made agents and left the ordinary way (H70).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nixl", reason="the package nixl is not installed")
pytestmark = pytest.mark.nixl

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def run(arguments: list[str], seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "PYTEST_"))}
    environment = cleared | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def run_tests(names: list[str], *options: str, **variables: str) -> None:
    files = [str(HERE / name) for name in names]
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *files], 110, **variables)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_conformance_on_one_host() -> None:
    run_tests(["nixl_suite.py"])


def test_hazards_on_one_host() -> None:
    run_tests(["nixl_hazards.py"])


def test_agents_made_ahead() -> None:
    run_tests(["nixl_spare.py"])


def test_conformance_over_tcp() -> None:
    chosen = "another_process or nobody or whole or order or after_a_fence or many or finished"
    run_tests(["nixl_suite.py"], "-k", chosen, UCX_TLS="tcp")


def test_hazards_over_tcp() -> None:
    run_tests(["nixl_hazards_tcp.py"], UCX_TLS="tcp")


def test_device_memory() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    run_tests(["nixl_cuda.py"])


READ = """
import sys
from transport.peers import *
from transport import nixl_backends
from weightwire.transport.nixl import NixlTransport
gate = Gate()
source, target = nixl_backends.nixl(gate), NixlTransport(SECRET, require_rdma=sys.argv[1] == "strict")
endpoint = source.describe(source.register(space(pattern(100))[0]), LEASE)
try:
    print(target.connect(endpoint, LEASE, soon()).path)
except Exception as error:
    print(error)
"""


def test_h46_what_ucx_does_not_tell_is_said_to_be_unknown_and_is_refused_where_rdma_is_required() -> None:
    lenient = run(["-c", READ, "lenient"], 60, UCX_LOG_FILE="/dev/null")
    strict = run(["-c", READ, "strict"], 60, UCX_LOG_FILE="/dev/null")
    assert (lenient.stdout.strip(), lenient.returncode) == ("nixl/ucx:?", 0), lenient.stderr
    assert strict.stdout.startswith("reads would go over nixl/ucx:?, and RDMA is required;"), strict.stderr


TOLD = """
import sys
from transport.peers import *
from transport import nixl_backends
touched = []
sys.addaudithook(lambda event, args: touched.append(args) if event in ("os.putenv", "os.unsetenv") else None)
gate = Gate()
source = nixl_backends.nixl(gate)
endpoint = source.describe(source.register(space(pattern(100))[0]), LEASE)
print(source.connect(endpoint, LEASE, soon()).path)
print(touched)
"""


def test_what_ucx_uses_is_told_and_the_environment_is_never_touched() -> None:
    """Agents are made in threads: C code that reads the environment of the process meanwhile would crash."""
    watched = run(["-c", TOLD], 60)
    assert watched.stdout.splitlines() == ["nixl/ucx:cma", "[]"], watched.stderr


def test_without_the_package_the_error_says_what_to_install() -> None:
    script = """
import sys
sys.modules["nixl"] = None
from transport.peers import SECRET
from weightwire.errors import ConfigError
from weightwire.transport.nixl import NixlTransport
try:
    NixlTransport(SECRET)
except ConfigError as error:
    print(error)
"""
    done = run(["-c", script], 60)
    assert done.stdout.strip() == "nixl is not installed; pip install weightwire[nixl]", done.stderr
