"""The journal's file: made, recognised, or refused with the reason."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from shpool.errors import JournalError, JournalFullError, JournalMismatchError, JournalNotFoundError, NotAJournalError
from shpool.journal.purpose import check_purpose, note_purpose
from shpool.journal.rows import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator

APPLICATION_ID = 0x73687021  # "shp!" in the header of the file: PRAGMA application_id
FORMAT_VERSION = 2  # of the tables: PRAGMA user_version

_BUSY_TIMEOUT = 5.0  # s to wait for SQLite's locks: those who read hold them for milliseconds
_TIDYING_TIMEOUT = 300  # ms to wait for those who read, at the end of a run
_CHECKPOINT_PAGES = 4000  # of 4 KiB: pages of the index of keys are written many times before they are copied back
_CACHE_KIB = 8192  # of the writing connection; SQLite's 2 MiB holds a tenth of the index of a million keys
_HEADER = 100  # bytes
_NO_SPACE = 64 * 1024  # bytes left on a disk that is called full: SQLite's files grow by 32 KiB at a time


def resolved(path: Path | str) -> Path:
    """Return the file itself, whatever links lead to it: there is one lock per file."""
    return Path(os.path.realpath(path))


def check_place(path: Path) -> None:
    """Refuse, before anything is made, what can hold no journal."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.parent.is_dir():
            return
        reason = f"there is no folder {path.parent}"
        raise JournalError(str(path), reason, "create it, or give another --journal") from None
    except OSError as exc:  # a folder that may not be entered, a name that is too long, links in a circle
        reason = f"it cannot be reached: {exc.strerror}"
        raise JournalError(str(path), reason, "give another --journal, that you may read and write") from None
    if stat.S_ISDIR(mode):
        raise JournalError(str(path), "it is a folder", "give the name of a file as --journal")
    if not stat.S_ISREG(mode):
        raise NotAJournalError(str(path), "it is no regular file")


def open_for_writing(
    path: Path, target: str, key_field: str | None, replaced: str, *, fresh: bool
) -> sqlite3.Connection:
    """Open a journal, making it where there is none; the caller holds its lock.

    Args:
        path: The file, past ``resolved`` and ``check_place``.
        target: What the journal is for.
        key_field: The field that names its jobs, if one does.
        replaced: Noted in one that begins anew, see ``replaced_by``.
        fresh: Forget all that it holds.

    Raises:
        JournalError: It cannot be used: each class says why.
    """
    _make_private(path)
    try:
        return _opened(path, target, key_field, replaced, fresh=fresh)
    except JournalError as exc:
        if not (fresh and _is_damage(str(exc.__cause__)) and _looks_like_ours(path)):
            raise
    for damaged in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        damaged.unlink(missing_ok=True)
    _make_private(path)
    return _opened(path, target, key_field, replaced, fresh=fresh)


def _opened(path: Path, target: str, key_field: str | None, replaced: str, *, fresh: bool) -> sqlite3.Connection:
    connection = connect(path, "rw")
    try:
        with translated(path):
            _prepare(connection, path, target, key_field, replaced, fresh=fresh)
    except BaseException:
        connection.close()
        raise
    return connection


def _make_private(path: Path) -> None:
    """Create the file for this user only: arguments and results are nobody else's business."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # its name is durable before what it holds is
        finally:
            os.close(folder)
    except FileExistsError:
        pass
    except OSError as exc:
        reason = f"cannot be created: {exc.strerror}"
        raise JournalError(str(path), reason, "give a --journal in a folder you may write to") from exc


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open an existing file.

    Args:
        path: The file.
        mode: ``rw``, ``ro``, or ``ro&immutable=1`` as in SQLite's URIs.

    Raises:
        JournalError: SQLite cannot open it.
    """
    with translated(path):
        # Whoever holds a connection uses it in one thread at a time; that need not be the one that opened it.
        return sqlite3.connect(
            f"file:{quote(os.fsencode(path))}?mode={mode}",
            uri=True,
            timeout=_BUSY_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
        )


def _prepare(  # noqa: PLR0913 - as ``open_for_writing``
    connection: sqlite3.Connection, path: Path, target: str, key_field: str | None, replaced: str, *, fresh: bool
) -> None:
    is_new = check_format(connection, path, fresh=fresh)
    _make_durable(connection, path)
    with transaction(connection):
        if is_new or fresh:
            _make_tables(connection, target, key_field, replaced)
        else:
            check_purpose(connection, path, target, key_field)


def check_format(connection: sqlite3.Connection, path: Path, *, fresh: bool = False) -> bool:
    """Refuse a file that is no journal, or one of another format unless it is to begin anew.

    Returns:
        Whether the file holds nothing at all yet.
    """
    application = _first(connection, "PRAGMA application_id")
    version = _first(connection, "PRAGMA user_version")
    if application == APPLICATION_ID:
        if version != FORMAT_VERSION and not fresh:
            raise JournalMismatchError(str(path), "format version", str(version), str(FORMAT_VERSION))
        return False
    if application or version or _first(connection, "SELECT count(*) FROM sqlite_master"):
        raise NotAJournalError(str(path), "it is another SQLite database")
    return True


def holds_jobs(connection: sqlite3.Connection) -> bool:
    """Tell whether any job was ever written down."""
    return bool(_first(connection, "SELECT EXISTS (SELECT 1 FROM jobs)"))


def _first(connection: sqlite3.Connection, query: str) -> object:
    rows = connection.execute(query).fetchall()
    return rows[0][0] if rows else None


def _make_durable(connection: sqlite3.Connection, path: Path) -> None:
    """Let readers read while a run writes, and let a commit return only once it is on the disk."""
    if _first(connection, "PRAGMA journal_mode = WAL") != "wal":
        raise JournalError(str(path), "its file system has no shared memory", "give a --journal on a local disk")
    for setting in (
        "synchronous = FULL",
        "fullfsync = ON",  # macOS: fsync alone leaves it in the drive's cache
        "checkpoint_fullfsync = ON",
        f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
        f"cache_size = -{_CACHE_KIB}",
    ):
        connection.execute(f"PRAGMA {setting}")


def _make_tables(connection: sqlite3.Connection, target: str, key_field: str | None, replaced: str) -> None:
    """Begin with empty tables, in one transaction: killed meanwhile, all is as before."""
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        connection.execute(f'DROP TABLE "{name}"')
    for statement in SCHEMA:
        connection.execute(statement)
    note_purpose(connection, target, key_field, replaced)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """Commit what happens inside, durably, or nothing of it."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite itself rolls back where the disk is full
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as journal errors that say what to do.

    Python 3.10 has no error codes on them, hence the texts.
    """
    try:
        yield
    except sqlite3.Error as exc:
        raise _in_words(path, str(exc)) from exc


def _in_words(path: Path, text: str) -> JournalError:
    if "not a database" in text:
        return NotAJournalError(str(path), "it is no SQLite database")
    if "is full" in text or ("I/O error" in text and _is_full(path)):
        return JournalFullError(str(path), _recorded(path))
    if _is_damage(text):
        way_out = "begin anew with --fresh" if _looks_like_ours(path) else "give another --journal"
        return JournalError(str(path), f"it is damaged ({text})", f"restore it from a copy, or {way_out}")
    if "locked" in text:
        return JournalError(str(path), "another program has locked it", "close that program and try again")
    if "readonly" in text or "unable to open" in text:
        return JournalError(str(path), f"no access ({text})", "give a --journal that you may read and write")
    hint = "check the disk and run the same command again: what was reported is recorded"
    return JournalError(str(path), text, hint)


def _is_damage(text: str) -> bool:
    return "malformed" in text or "no such" in text


def _looks_like_ours(path: Path) -> bool:
    """Tell whether a damaged file was a journal, by what is left of its header (SQLite's file format, section 1.3)."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
    except OSError:
        return False
    return header.startswith(b"SQLite format 3\0") and header[68:72] == APPLICATION_ID.to_bytes(4, "big")


def _is_full(path: Path) -> bool:
    """Tell whether a vague I/O error means that: SQLite has one for its shared memory on a full disk."""
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < _NO_SPACE


def _recorded(path: Path) -> int | None:
    """Return how many ends of jobs the journal holds, None where the full disk lets nobody see."""
    try:
        with closing(sqlite3.connect(f"file:{quote(os.fsencode(path))}?mode=ro", uri=True)) as connection:
            count = _first(connection, "SELECT count(*) FROM jobs WHERE status != 'running'")
    except sqlite3.Error:
        return None
    return int(str(count))


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a journal that may be in use, creating and blocking nothing.

    A closed journal is one plain file. Beside one in use, or left by a killed run, lies what SQLite has not
    copied into it yet, which is read along.

    Raises:
        JournalError: It cannot be read, or is none.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise JournalNotFoundError(str(path)) from None
    except OSError as exc:
        raise JournalError(str(path), f"it cannot be reached: {exc.strerror}", "give a file that you may read") from exc
    check_place(path)
    try:
        return _checked(connect(path, "ro"), path)
    except JournalError as exc:
        # Killed in the last moment of a clean end, the header asks for files that are gone; where SQLite may not
        # make them again, the file is complete without.
        if "unable to open" not in str(exc.__cause__) or path.with_name(f"{path.name}-wal").exists():
            raise
    return _checked(connect(path, "ro&immutable=1"), path)


def _checked(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    try:
        with translated(path):
            is_empty = check_format(connection, path)
        if is_empty:
            raise NotAJournalError(str(path), "it is empty")  # noqa: TRY301 - closed like after any other refusal
    except BaseException:
        connection.close()
        raise
    return connection


def close_journal(connection: sqlite3.Connection) -> None:
    """Leave one plain file: copy everything back and remove the files beside it, unless somebody reads just now.

    A journal that cannot be tidied up is as good as any: the next run does it.
    """
    with closing(connection), contextlib.suppress(sqlite3.Error):
        connection.execute(f"PRAGMA busy_timeout = {_TIDYING_TIMEOUT}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
