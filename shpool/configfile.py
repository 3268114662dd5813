"""The TOML file of settings: one table per profile, secrets in some, hence readable by its owner only."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shpool.errors import ConfigError, SHUserWarning

if TYPE_CHECKING:
    from collections.abc import Mapping

_OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read_profiles(path: Path) -> dict[str, dict[str, Any]]:
    """Return the file's tables by name; empty where there is no file.

    Raises:
        ConfigError: The file cannot be read, or is not TOML made of tables.
    """
    outcome = _parse(_read_text(path))
    if isinstance(outcome, str):
        raise ConfigError(str(path), f"not a valid configuration: {outcome}; mend the file or remove it")
    return outcome


def _parse(text: str) -> dict[str, dict[str, Any]] | str:
    """Return the tables, or what is wrong: raised from here, a traceback's frame would hold the secrets."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        return str(exc)
    stray = [name for name, table in document.items() if not isinstance(table, dict)]
    return f"{stray[0]!r} stands outside of any [profile]" if stray else document


def write_profile(path: Path, name: str, values: Mapping[str, Any], *, known: frozenset[str]) -> None:
    """Put a profile into the file in one step; other profiles, comments and order stay.

    Args:
        path: The file; it and its folder are made where they are missing.
        name: The profile.
        values: What the profile shall hold.
        known: Keys that are removed from the profile unless ``values`` has them.

    Raises:
        ConfigError: The present file cannot be read, or the new one not written.
    """
    import tomlkit

    read_profiles(path)  # words what is wrong with a broken file
    document = tomlkit.parse(_read_text(path))
    if name not in document:
        document[name] = tomlkit.table()
    table: Any = document[name]  # tomlkit's own types do not tell a table from a value
    for key in known - values.keys():
        table.pop(key, None)
    table.update(values)
    problem = _replace(path, tomlkit.dumps(document))
    if problem:
        raise ConfigError(str(path), f"cannot be written: {problem}; mend its folder or set XDG_CONFIG_HOME")


def warn_if_open(path: Path) -> None:
    """Warn where others than the owner may read or write the file."""
    if os.name != "posix":
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OPEN_TO_OTHERS:
        msg = f"{path} holds a secret and is open to others (mode {mode:04o}); run: chmod 600 {path}"
        warnings.warn(msg, SHUserWarning, stacklevel=2)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except OSError as exc:
        problem = exc.strerror or type(exc).__name__
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    raise ConfigError(str(path), f"cannot be read: {problem}; mend the file or set XDG_CONFIG_HOME")


def _replace(path: Path, text: str) -> str:
    """Write the file, and return what went wrong: raised from here, a traceback's frame would hold the secrets."""
    try:
        _write_in_one_step(path.resolve(), text)  # resolved: a link stays a link
    except OSError as exc:
        return exc.strerror or type(exc).__name__
    return ""


def _write_in_one_step(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(prefix=".config-", suffix=".toml", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(draft).unlink()
        raise
