"""Rules that no linter of ours knows: sizes, names, blanket handlers, who may read what."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "weightwire"
GENERATED = SRC / "wire" / "generated"

MAX_FILE = 500
MAX_CLASS = 300
MAX_FUNCTION = 80
MAX_MEDIAN = 10
MAX_BLANKET_PER_KLOC = 2.0
MAX_MONKEYPATCH_PER_KLOC = 3.0
REASON = re.compile(r"#\s*(noqa: BLE001\s)?\s*(?!noqa)\S.{10,}")

READS_ENVIRONMENT = {
    "config.py": "the one table of settings",
    "cli/__init__.py": "gRPC's own log level, which it takes from nowhere else",
    "auth.py": "where the user keeps state (XDG_STATE_HOME)",
    "tuning.py": "where the user keeps state (XDG_STATE_HOME)",
    "runtime/distributed.py": "ranks, as torchrun and mpirun tell them",
    "engines/vllm/identity.py": "vLLM's own switches that choose kernels",
    "engines/native/smollm2.py": "where the user keeps caches (XDG_CACHE_HOME)",
    "transport/nixl/agent.py": "NIXL's own settings, which it takes from nowhere else",
    "transport/nixl/connection.py": "UCX's own settings, which it takes from nowhere else",
    "transport/nixl/lanes.py": "UCX's own settings, which it takes from nowhere else",
}


def python_files(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if GENERATED not in path.parents)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without the docstring: a contract is not what makes a function long."""
    first = node.body[0]
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    if not is_text:
        return lines(node)
    assert first.end_lineno is not None
    return lines(node) - (first.end_lineno - first.lineno + 1)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_files_have_at_most_500_lines() -> None:
    files = python_files("src", "tests", "tools", "bench", "examples")
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert [f"{path.relative_to(ROOT)}: {count}" for path, count in lengths.items() if count > MAX_FILE] == []


def test_functions_have_at_most_80_lines_and_classes_300() -> None:
    too_long = []
    for path in python_files("src", "tests", "tools", "bench", "examples"):
        too_long += [
            f"{where(path, each.lineno)} {each.name}" for each in functions(path) if lines(each) > MAX_FUNCTION
        ]
        classes = [each for each in ast.walk(tree(path)) if isinstance(each, ast.ClassDef)]
        too_long += [f"{where(path, each.lineno)} {each.name}" for each in classes if lines(each) > MAX_CLASS]
    assert too_long == []


def test_the_median_function_is_short() -> None:
    counts = [code_lines(each) for path in python_files("src") for each in functions(path)]
    assert statistics.median(counts) <= MAX_MEDIAN


def test_no_module_has_a_name_that_says_nothing() -> None:
    vague = re.compile(r"(^|_)(managers?|helpers?|utils?|common|misc)($|_)")
    paths = [path.relative_to(SRC) for path in python_files("src")]
    assert [str(path) for path in paths if any(vague.search(part) for part in path.with_suffix("").parts)] == []


def blanket_handlers(path: Path) -> list[ast.ExceptHandler]:
    """Handlers that catch everything and do not raise it again."""
    found = []
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        names = {each.id for each in ast.walk(node.type) if isinstance(each, ast.Name)} if node.type else {"Exception"}
        passes_on = any(isinstance(each, ast.Raise) and each.exc is None for each in ast.walk(node))
        if names & {"Exception", "BaseException"} and not passes_on:
            found.append(node)
    return found


def test_blanket_handlers_are_few_and_each_has_a_reason() -> None:
    without_reason, count, total = [], 0, 0
    for path in python_files("src"):
        text = path.read_text().splitlines()
        total += len(text)
        for handler in blanket_handlers(path):
            count += 1
            near = text[handler.lineno - 1 : handler.body[0].lineno]  # beside it, or between it and its first statement
            if not any(REASON.search(line) for line in near):
                without_reason.append(where(path, handler.lineno))
    assert without_reason == []
    assert count <= MAX_BLANKET_PER_KLOC * total / 1000


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_only_wire_imports_generated_protobuf() -> None:
    outside = []
    for path in python_files("src"):
        names = [name for node in ast.walk(tree(path)) for name in imported(node)]
        if (SRC / "wire") not in path.parents and any("_pb2" in name or "wire.generated" in name for name in names):
            outside.append(str(path.relative_to(ROOT)))
    assert outside == []


def environment_reads(path: Path) -> list[int]:
    """Lines that look something up in the process's environment; handing all of it on is not such a thing."""
    reads = []
    parents = {child: node for node in ast.walk(tree(path)) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree(path)):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"):
            continue
        whole = isinstance(parents[node], ast.Dict | ast.BinOp | ast.Starred | ast.Call)
        if node.attr in ("getenv", "environb") or (node.attr == "environ" and not whole):
            reads.append(node.lineno)
    return reads


def test_h13_only_the_table_reads_the_environment() -> None:
    outside = []
    for path in python_files("src"):
        if path.relative_to(SRC).as_posix() not in READS_ENVIRONMENT:
            outside += [where(path, line) for line in environment_reads(path)]
    assert outside == []


def test_tests_run_the_real_thing() -> None:
    total, patched, mocked = 0, 0, []
    for path in python_files("tests"):
        text = path.read_text()
        total += text.count("\n")
        patched += len(re.findall(r"\bmonkeypatch\.", text))
        mocked += [where(path, 1)] if re.search(r"^\s*(from|import) unittest\b.*mock", text, re.MULTILINE) else []
    assert mocked == []
    assert patched <= MAX_MONKEYPATCH_PER_KLOC * total / 1000
