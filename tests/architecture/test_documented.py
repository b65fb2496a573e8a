"""Every environment variable, command-line flag and metric is in ``docs/reference.md``, as the code has it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer.main

from weightwire.cli.main import app
from weightwire.config import VARIABLES
from weightwire.observability.metrics import SPECS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference.md").read_text()


def test_the_page_is_what_the_code_gives() -> None:
    command = [sys.executable, str(ROOT / "tools" / "gen_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_memory_is_that_of_the_figures() -> None:
    command = [sys.executable, str(ROOT / "bench" / "stage_cost_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_variable_and_metric_is_there() -> None:
    names = [variable.name for variable in VARIABLES.values()] + [spec.name for spec in SPECS]
    assert [name for name in names if f"| `{name}` |" not in PAGE] == []


def members(command: Any) -> dict[str, Any]:
    """Of a group of commands; none of a command."""
    return getattr(command, "commands", {})


def test_every_command_and_flag_is_there_with_a_description() -> None:
    group: Any = typer.main.get_command(app)
    nested = [(f"{name} {each}", one) for name, g in group.commands.items() for each, one in members(g).items()]
    for name, command in [*((n, c) for n, c in group.commands.items() if not members(c)), *nested]:
        assert command.help, name
        section = PAGE.split(f"### `weightwire {name}`\n", 1)[1].split("\n## ", 1)[0].split("\n### ", 1)[0]
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)
            if parameter.param_type_name == "option":
                assert all(f"`{option}`" in section for option in parameter.opts), (name, parameter.opts)


def test_docs_name_no_variable_that_does_not_exist() -> None:
    known = {variable.name for variable in VARIABLES.values()}
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {name for page in pages for name in re.findall(r"\bWEIGHTWIRE_[A-Z][A-Z_]+\b", page.read_text())}
    assert named - known == set()
