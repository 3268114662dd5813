"""Names of files and folders to write to, as the command line has them: what a Path would lose is seen here."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from shpool_cli.console import CommandError

# Once the command has standard output for itself, these lead to standard error, like descriptor 1.
_STDOUT = frozenset({"/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"})
_BESIDE = ("", "-wal", "-shm", "-journal", ".lock")  # a journal: what SQLite and its lock put there


def results_file(text: str) -> Path | None:
    """Return where results go; None, for ``-`` and the like, is standard output."""
    given = str(text)
    if given == "-" or os.path.normpath(given) in _STDOUT:
        return None
    if os.path.basename(given) in {"", ".", ".."}:  # noqa: PTH119 - a Path has lost the slash at the end
        msg = f"{given!r} is no name of a file"
        raise typer.BadParameter(msg)
    return Path(given)


def files_folder(text: str) -> Path:
    """Return where files go."""
    given = str(text)
    if given == "-":
        msg = "--to - is no folder: files do not go to standard output"
        raise CommandError(msg, "give the name of a folder; one of this name is --to ./-")
    if not given:
        msg = "'' is no name of a folder"
        raise typer.BadParameter(msg)
    return Path(given)


def own_files(source: str, output: Path | None, journal: Path | None) -> tuple[str, ...]:
    """Return the paths of what a run itself reads and writes, without links on the way to their folders.

    Args:
        source: The INPUT.
        output: The file of the results, None for standard output.
        journal: The journal, if there is one.
    """
    names = [] if source == "-" else [source]
    names += [str(path) for path in (output, journal) if path is not None]
    links = [os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name)) for name in names]  # noqa: PTH118, PTH119, PTH120 - a Path's resolve() raises where links lead in a circle
    files = [os.path.realpath(name) for name in names]
    beside = [] if journal is None else [os.path.realpath(journal) + suffix for suffix in _BESIDE]
    return (*links, *files, *beside)
