"""The unfinished file beside its target: locked, continued, and made durable before it takes its name.

The rules:

 1. What arrives goes to ``NAME.part``. It is locked (``flock``) while a process writes it, so two never mix.
 2. What proves a part to be of the same file later (see ``transfer``) stands in ``NAME.part.json``, written before the
    first byte of the part. Both are gone once the file has its name.
 3. A part from before the machine's last start is trusted only where a checksum will tell: after a power failure
    its end may be zeros.
"""

from __future__ import annotations

import errno
import fcntl
import filecmp
import functools
import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from shpool.downloads.filenames import NOTE_SUFFIX, PART_SUFFIX
from shpool.downloads.transfer import Standing
from shpool.errors import DownloadError, PartInUseError, StorageFullError, TargetPathError, TooManyOpenFilesError

if TYPE_CHECKING:
    from collections.abc import Sequence

_FORMAT = 1
_LONGEST_NOTE = 4096  # bytes
_MOST_PIECES = 512  # buffers for one writev; IOV_MAX is 1,024
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TOO_MANY = frozenset({errno.EMFILE, errno.ENFILE})  # of this process, of the system
_IN_THE_WAY = "something that is no file stands where the unfinished file goes; remove it"
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK})  # FAT, exFAT, some FUSE and CIFS
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})  # Lustre mounted without flock, some NFS


class PartFile:
    """The open, locked part of one file.

    Args:
        stem: Path of the target, or what stands for it while its name is not known.
        descriptor: The open file.
        size: Its bytes.
    """

    def __init__(self, stem: str, descriptor: int, size: int) -> None:
        self.path = stem + PART_SUFFIX
        self.descriptor = descriptor
        self.size = size
        self._note_path = stem + NOTE_SUFFIX
        self._has_note = False
        self.noted_name = ""  # what the note calls the file

    @classmethod
    def open(cls, stem: str, *, create: bool) -> PartFile | None:
        """Open and lock the part of a file; None where there is none and none is to be made.

        Raises:
            PartInUseError: Another process writes it.
            TargetPathError: Something that is no file stands under its name.
            StorageFullError: There is no space for another file.
            TooManyOpenFilesError: There are too many open ones, here or in the system.
        """
        path = stem + PART_SUFFIX
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        while True:
            try:
                descriptor = os.open(path, flags, 0o666)
            except FileNotFoundError:
                if create:
                    raise
                return None
            except OSError as exc:
                raise translated(exc, path) from exc
            found = _lock(descriptor, path)
            if found is not None:
                return cls(stem, descriptor, found.st_size)
            os.close(descriptor)  # it took its name while we waited: the path means another file now

    def standing(self, source: str, *, is_provable: bool) -> Standing:
        """Return what the part is worth: its size, and the validator noted for it.

        Args:
            source: Digest of the file's URL.
            is_provable: A checksum will tell whether the part was right.
        """
        if self.size == 0:
            return Standing()
        note = self._read_note()
        is_ours = note.get("source") == source and note.get("boot") == _boot_id()
        validator = note.get("validator")
        self.noted_name = str(note.get("name", "")) if is_ours else ""
        if is_ours and isinstance(validator, str) and validator.isascii() and validator.isprintable():
            return Standing(self.size, validator)
        return Standing(self.size) if is_provable else Standing()

    def note(self, source: str, validator: str, name: str) -> None:
        """Write down what a later run needs to go on: see ``standing``, and the name the file is to have."""
        fields = {"format": _FORMAT, "source": source, "validator": validator, "name": name, "boot": _boot_id()}
        content = json.dumps(fields)
        try:
            descriptor = os.open(self._note_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            try:
                os.write(descriptor, content.encode())
            finally:
                os.close(descriptor)
        except OSError as exc:
            raise translated(exc, self._note_path) from exc
        self._has_note = True

    def _read_note(self) -> dict[str, object]:
        try:
            with open(self._note_path, "rb") as file:
                self._has_note = True
                content = json.loads(file.read(_LONGEST_NOTE))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and content.get("format") == _FORMAT else {}

    def append(self, chunks: Sequence[bytes]) -> None:
        """Write at the end.

        Raises:
            StorageFullError: There is no space left; what fitted is kept.
        """
        try:
            for start in range(0, len(chunks), _MOST_PIECES):
                pieces = chunks[start : start + _MOST_PIECES]
                left = sum(map(len, pieces))
                written = os.pwritev(self.descriptor, pieces, self.size)
                self.size += written
                if written < left:
                    self._append_rest(b"".join(pieces)[written:])
        except OSError as exc:
            raise translated(exc, self.path) from exc

    def _append_rest(self, rest: bytes) -> None:
        while rest:
            written = os.pwrite(self.descriptor, rest, self.size)
            self.size += written
            rest = rest[written:]

    def restart(self) -> None:
        """Throw away what there is; the lock stays."""
        os.ftruncate(self.descriptor, 0)
        self.size = 0
        self._drop_note()

    def close(self) -> None:
        """Keep what there is for later; nothing of an empty part."""
        if self.descriptor >= 0:
            if self.size == 0:
                self.discard()
            else:
                self._close()

    def discard(self) -> None:
        """Remove it."""
        if self.descriptor >= 0:
            self._drop_note()
            with suppress(OSError):
                os.unlink(self.path)
            self._close()

    def publish(self, target: str, *, replace: bool) -> None:
        """Give the file its name.

        Args:
            target: Its path.
            replace: Take the place of a file that has the name; else that is an error.

        Raises:
            TargetPathError: The name is taken, by a folder or where ``replace`` is false.
        """
        try:
            self._drop_note(always=False)
            if replace:
                os.rename(self.path, target)
            else:
                self._link(target)
        except OSError as exc:
            raise translated(exc, target) from exc
        finally:
            self._close()

    def _link(self, target: str) -> None:
        """Take a name that must be free, or is that of an equal file."""
        try:
            self._take_name(target)
        except FileExistsError:
            is_same = os.path.isfile(target) and filecmp.cmp(self.path, target, shallow=False)
            os.unlink(self.path)
            if not is_same:
                raise

    def _take_name(self, target: str) -> None:
        try:
            os.link(self.path, target)  # unlike rename(), it never takes the name from another file
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # holds the name until the file has it
            os.rename(self.path, target)
        else:
            os.unlink(self.path)

    def _drop_note(self, *, always: bool = True) -> None:
        if self._has_note or always:
            with suppress(OSError):
                os.unlink(self._note_path)
            self._has_note = False

    def _close(self) -> None:
        os.close(self.descriptor)
        self.descriptor = -1


def _lock(descriptor: int, path: str) -> os.stat_result | None:
    """Lock a part; return what it is, or None when its path means another file by now."""
    try:
        _flock(descriptor, path)
        found = _look_at(descriptor, path)  # its size counts only from now on
    except BaseException:
        os.close(descriptor)
        raise
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found if named.st_ino == found.st_ino else None


def _look_at(descriptor: int, path: str) -> os.stat_result:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise TargetPathError(path, _IN_THE_WAY)
    return found


def _flock(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PartInUseError(path) from None
    except OSError as exc:
        if exc.errno not in _NO_LOCKS:
            raise translated(exc, path) from exc


@functools.cache
def _boot_id() -> str:
    """Return what tells one start of the machine from the next; empty where nothing does."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def translated(error: OSError, path: str) -> DownloadError:
    """Return our error for the operating system's."""
    if error.errno in _FULL:
        return StorageFullError(path, error.strerror or "No space left on device")
    if error.errno in _TOO_MANY:
        return TooManyOpenFilesError(path, error.strerror or "Too many open files")
    if error.errno in (errno.ELOOP, errno.EISDIR, errno.EEXIST, errno.ENOTDIR):
        reason = {
            errno.ELOOP: "a symbolic link stands where the unfinished file goes; remove it",
            errno.EISDIR: "a folder has this name; remove it or give another path",
            errno.EEXIST: "another file has this name already; remove it or give this one a path",
            errno.ENOTDIR: "a file stands where a folder should be; remove it or give another path",
        }[error.errno]
        return TargetPathError(path, reason)
    return DownloadError(path, f"{error.strerror or error}; check the folder and its permissions")


def file_size(path: str) -> int | None:
    """Return the size of a regular file; None for anything else."""
    size, _ = size_and_date(path)
    return size


def size_and_date(path: str) -> tuple[int | None, float]:
    """Return the size of a regular file and when it was written, in seconds since the epoch; None for anything else."""
    try:
        found = os.lstat(path)
    except OSError:
        return None, 0.0
    return (found.st_size if stat.S_ISREG(found.st_mode) else None), found.st_mtime
