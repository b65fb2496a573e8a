"""The ``weightwire`` command. Each subcommand is a function in a file of its own name; they are listed here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from weightwire.cli.bench import app as bench
from weightwire.cli.demo import demo
from weightwire.cli.doctor import doctor
from weightwire.cli.frame import FAILURE, INTERRUPTED, USAGE, VerboseOption, begin, show_error
from weightwire.cli.inspect import inspect
from weightwire.cli.run import run
from weightwire.cli.serve import serve
from weightwire.cli.simulate import simulate
from weightwire.cli.sources import sources
from weightwire.cli.version import version
from weightwire.errors import WeightwireError

# typer may carry a copy of click of its own; whichever it is, its usage errors descend from this.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="weightwire",
    help="A starting inference replica takes its weights from a running one: verified, and without a disk.",
    epilog="Every option that names a setting has an environment variable; docs/reference.md lists them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, run, serve, sources, inspect, simulate, doctor, version):
    app.command()(command)
app.add_typer(bench)


@app.callback()
def _before(*, verbose: VerboseOption = False) -> None:
    begin(verbose=verbose)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those of the process where left out.

    Returns:
        The exit code: 0; 1 for an error, told in one line on standard error; 2 for wrong usage, likewise.
    """
    try:
        done = app(None if arguments is None else list(arguments), prog_name="weightwire", standalone_mode=False)
    except WeightwireError as error:
        show_error(error)
        return FAILURE
    except UsageError as error:
        sys.stderr.write(f"weightwire: {_usage(error)}\n")
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output left, as in `weightwire sources | head`; the flush at exit must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:  # noqa: BLE001  (the process's edge: one line instead of a traceback)
        show_error(error)
        return FAILURE
    return done if isinstance(done, int) else 0


def _usage(error: Exception) -> str:
    message = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "weightwire"
    return f"{' '.join(message.split()).rstrip('.')}; see: {path} --help"
