"""What every command shares: options, consoles, and how an error is shown."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weightwire.auth import Secret, load_secret
from weightwire.config import Settings
from weightwire.errors import ConfigError, WeightwireError
from weightwire.observability.logging import setup_logging

FAILURE = 1
USAGE = 2
INTERRUPTED = 130

UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="HOST:PORT", help="The metadata server; else WEIGHTWIRE_URL.", show_default=False),
]
SecretOption = Annotated[
    Path | None,
    typer.Option(
        "--secret-file",
        metavar="FILE",
        help="File with the shared secret (mode 0600); else WEIGHTWIRE_SECRET_FILE, else the user's own.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, and show the traceback of an error.")]


class _Verbosity:
    """Whether this run of the command was asked to show tracebacks."""

    on = False


def begin(*, verbose: bool, level: str | None = None) -> None:
    """First thing in every command: set up logging, and remember whether errors show their traceback.

    Args:
        verbose: log from DEBUG on; so it stays once it was asked for, before the command's name or behind it.
        level: log from here on otherwise; WARNING where left out, so that a command prints its result and nothing else.
    """
    _Verbosity.on = verbose or _Verbosity.on
    setup_logging("DEBUG" if _Verbosity.on else level or "WARNING")


def is_verbose() -> bool:
    """Whether ``-v`` was given, before the command's name or behind it."""
    return _Verbosity.on


def progress_console() -> Console:
    """Where progress is drawn: standard error, and only on a terminal that no log lines are written to."""
    return Console(stderr=True, highlight=False, force_terminal=False if _Verbosity.on else None)


def out() -> Console:
    """Where results go. A table is as wide as the terminal; where there is none, as wide as it needs to be."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def settings(**overrides: object) -> Settings:
    """Settings from the environment and a command's options (``None``: not given)."""
    return Settings.from_env(None, **overrides)


def require_url(found: Settings) -> str:
    """The metadata server's ``host:port``.

    Raises:
        ConfigError: none was named.
    """
    if found.url is None:
        raise ConfigError("no metadata server is named", "give --url HOST:PORT or set WEIGHTWIRE_URL")
    return found.url


def secret(found: Settings) -> Secret:
    """The shared secret; made on first use where it is the user's own.

    Raises:
        AuthError: it cannot be read, or others can read it.
    """
    return load_secret(found.secret_file)


def show_error(error: BaseException) -> None:
    """One line on standard error; with ``-v`` the traceback before it."""
    if _Verbosity.on:
        traceback.print_exception(error, file=sys.stderr)
    text = str(error) if isinstance(error, WeightwireError) else _unexpected(error)
    sys.stderr.write(f"weightwire: {' '.join(text.split())}\n")
    sys.stderr.flush()


def _unexpected(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}"
    remedy = "see the traceback above" if _Verbosity.on else "run it again with -v for the traceback"
    return f"unexpected {type(error).__name__}: {error}; this is a bug, {remedy}"
