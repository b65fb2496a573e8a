"""Write ``docs/reference.md`` (variables, command line, metrics): ``python tools/gen_reference.py [--check]``.

All of it comes from the code: ``config.VARIABLES``, the typer application, ``metrics.SPECS``. ``--check`` writes
nothing and fails when the file is not what the code gives.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from weightwire.cli.main import app
from weightwire.config import SETTINGS, VARIABLES, Settings
from weightwire.observability.metrics import SPECS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"

HEAD = """\
# Reference

Made by `make docs` from the code; do not edit.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_variables(), *_commands(), *_metrics()]).rstrip("\n") + "\n"


def _variables() -> Iterator[str]:
    yield "## Environment variables\n"
    yield (
        "A command's option or an argument in code goes before the variable. Values are parsed strictly: anything that "
        "is not listed as legal is an error, and so is a name that is one slip away from one of these.\n"
    )
    yield "| variable | legal | default | what it sets |"
    yield "|---|---|---|---|"
    defaults = Settings()
    for field, variable in VARIABLES.items():
        yield f"| `{variable.name}` | {variable.legal} | {_value(getattr(defaults, field))} | {variable.doc} |"
    yield ""
    yield "## Settings without a variable\n"
    yield (
        "What one source may give away belongs to that source; every process below it would inherit a variable. Give "
        "them as options of `weightwire run`, as arguments of `Settings.from_env(…)`, or in vLLM's extra config. How "
        "tcp uses a link is measured by `weightwire bench tune`, which writes it to `tuning.json` beside the user's "
        "own secret.\n"
    )
    yield "| setting | legal | default | what it sets |"
    yield "|---|---|---|---|"
    for field, row in SETTINGS.items():
        if not row.name:
            yield f"| `{field}` | {row.legal} | {_value(getattr(defaults, field))} | {row.doc} |"
    yield ""


def _value(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _commands() -> Iterator[str]:
    yield "## Command line\n"
    group: Any = typer.main.get_command(app)
    for name, command in sorted(_leaves(group)):
        yield f"### `weightwire {name}`\n"
        yield inspect.cleandoc(command.help or "").split("\f")[0].strip() + "\n"
        yield "| | default | |"
        yield "|---|---|---|"
        for parameter in command.params:
            yield f"| {_spelling(parameter)} | {_default(parameter)} | {(parameter.help or '').strip()} |"
        yield ""


def _leaves(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Commands by their full names, those of groups too."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.make_metavar(None) if parameter.metavar is None else parameter.metavar}`"
    spelled = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
    return spelled if parameter.is_flag or not parameter.metavar else f"{spelled} `{parameter.metavar}`"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or parameter.default in ((), []):
        return ""
    return _value(parameter.default)


def _metrics() -> Iterator[str]:
    yield "## Metrics\n"
    yield "Prometheus text at `/metrics`, on a port of its own (`--metrics-port`), without a credential.\n"
    yield "| metric | type | labels | what it counts |"
    yield "|---|---|---|---|"
    for spec in SPECS:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        yield f"| `{spec.name}` | {spec.kind} | {labels} | {spec.doc} |"
    yield ""


def main() -> int:
    """Write, or compare."""
    page = render()
    if "--check" in sys.argv[1:]:
        current = PAGE.exists() and PAGE.read_text() == page
        print("docs/reference.md is current" if current else "docs/reference.md is stale; run: make docs")
        return 0 if current else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
