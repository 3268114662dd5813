"""The commands, put together, and the border where errors become words."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shpool.errors import ShpoolError, SHUserWarning
from shpool_cli import completion, settings
from shpool_cli.console import CommandError, ExitCode, report, say
from shpool_cli.demo import demo
from shpool_cli.download import download
from shpool_cli.run import run
from shpool_cli.status import StatusCommand, status
from shpool_cli.tokeninfo import token

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name="shpool",
    help="One login, every process: run functions in worker processes that share one OAuth2 token.",
    epilog="Exit codes: 0 all done, 1 some jobs failed, 2 bad usage or input, 3 no login, 129 hung up, "
    "130 interrupted, 143 terminated.",
    add_completion=False,  # its option would change shell start-up files; `shpool completion` does not
    rich_markup_mode=None,  # plain text: importing rich doubles the time of --help
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,  # locals hold secrets
)
app.command()(run)
app.command()(download)
app.command(cls=StatusCommand)(status)
app.command()(token)
app.add_typer(settings.app, name="config")
app.command()(demo)
app.command()(completion.completion)

# typer brings its own copy of click in some versions and uses the package in others: only this way is there in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("shpool")
        except PackageNotFoundError:
            number = "(a checkout that is not installed)"
        typer.echo(f"shpool {number}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context,
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(ExitCode.USAGE)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; interruptions and SystemExit pass."""
    _speak_plainly()
    command = typer.main.get_command(app)
    try:
        if completion.VARIABLE in os.environ:
            return completion.answer(command, os.environ[completion.VARIABLE])
        with command.make_context("shpool", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except (ShpoolError, CommandError) as error:
        return report(error)
    except _UsageError as error:
        return _report_usage(error, command, arguments)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:  # noqa: BLE001 - the border: whatever this is, it is ours to mend
        return _report_bug(error)
    return ExitCode.OK


def _speak_plainly() -> None:
    """Show our warnings and the library's log in the form of all other lines."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.ERROR, "error")
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: object) -> None:
        if issubclass(category, SHUserWarning):
            say(f"warning: {message}")
        else:
            usual(message, category, *where)  # type: ignore[arg-type]  # passed on as they came

    warnings.showwarning = show  # type: ignore[assignment]  # keyword arguments are never used by the interpreter


def _report_usage(error: Exception, command: object, arguments: Sequence[str]) -> ExitCode:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else _path_of(command, arguments)
    text = error.format_message()  # type: ignore[attr-defined]  # every click exception has it
    say("error: " + text.replace(": Value error, ", ": ", 1))  # typer's word for a value that is none of an enum's
    say(f"hint: {path} --help lists what there is")
    return ExitCode.USAGE


def _path_of(command: object, arguments: Sequence[str]) -> str:
    """Return the command that these words name; the parser does not say of all errors where they are from."""
    path = ["shpool"]
    for word in arguments:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path.append(word)
    return " ".join(path)


def _report_bug(error: Exception) -> ExitCode:
    """Say what to report: type and places, but no message and no locals, which may hold a secret."""
    with contextlib.suppress(ValueError):
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames)
        say(f"error: shpool failed with an unexpected {type(error).__name__}")
        say(f"cause: {places}")
        say("hint: this is a bug in shpool; please report these lines and the command")
    return ExitCode.FAILED
