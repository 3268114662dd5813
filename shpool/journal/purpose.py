"""What a journal was written for: its target, and what names its jobs. Both stay; anything else is refused.

Beside them stands what a journal that was emptied takes the place of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shpool.errors import JournalMismatchError

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path


def note_purpose(connection: sqlite3.Connection, target: str, key_field: str | None, replaced: str) -> None:
    """Write it into the empty table ``meta``; the empty text stands for keys that are made of target and arguments."""
    facts = {"target": target, "key_field": key_field or "", "replaced": replaced}
    connection.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())


def check_purpose(connection: sqlite3.Connection, path: Path, target: str, key_field: str | None) -> None:
    """Refuse a journal that was written for something else.

    Raises:
        JournalMismatchError: It was.
    """
    found = target_of(connection)
    if found != target:
        raise JournalMismatchError(str(path), "target", repr(found), repr(target))
    noted = _meta(connection, "key_field")
    if noted is None or noted == (key_field or ""):  # none: a version wrote it that did not note this yet
        return
    advice = f"add --key {noted}" if noted else "leave out --key"
    hint = f"{advice}, or give another --journal, or --fresh to forget all that it holds"
    raise JournalMismatchError(str(path), "jobs named", _naming(noted), _naming(key_field), hint)


def target_of(connection: sqlite3.Connection) -> str:
    """Return the target a journal was written for."""
    return str(_meta(connection, "target"))


def replaced_by(connection: sqlite3.Connection) -> str:
    """Return what is still to be replaced since a journal was emptied, as the run that emptied it says; else nothing.

    Jobs begin only after that.
    """
    has_jobs = connection.execute("SELECT 1 FROM jobs LIMIT 1").fetchall()
    return "" if has_jobs else _meta(connection, "replaced") or ""


def _naming(key_field: str | None) -> str:
    return f"by their field {key_field!r}" if key_field else "by all their arguments"


def _meta(connection: sqlite3.Connection, name: str) -> str | None:
    rows = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchall()
    return str(rows[0][0]) if rows else None
