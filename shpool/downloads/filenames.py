"""Names for downloaded files: from a URL, from ``Content-Disposition``, or given; none leaves the folder.

The rules:

 1. A name that a server chose is one component: no separator, no control character, no leading dot, nothing that
    Windows reserves. What is not allowed is replaced, so that every URL has a name.
 2. A path that the user gave is taken as it is or refused: relative, without ``..``, without control characters.
 3. No component is longer than 240 bytes, which leaves room for the suffixes of an unfinished file; none ends with
    these suffixes.
 4. A symbolic link on the way must not lead out of the folder.
 5. What the run itself reads or writes is not replaced, whoever chose the name.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import unicodedata
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import unquote, urlsplit

from shpool.errors import TargetPathError
from shpool.origins import shown_url

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

PART_SUFFIX = ".part"
NOTE_SUFFIX = ".part.json"
_LONGEST_NAME = 240  # bytes: 255, as most file systems have it, less the suffixes above
_LONGEST_PATH = 3_900  # bytes: PATH_MAX is 4,096 on Linux
_HALF = 2**32 - 1
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,@-]*")
_PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.-]+(?::\d{1,5})?/(?:[A-Za-z0-9_.+=,@/-]*/)?([A-Za-z0-9_.-]*)")
_FORBIDDEN = re.compile(r'[/\\:*?"<>|]')  # in a name somebody else chose: what Windows reserves
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_DATA_SUFFIX = re.compile(r"\.*[^.].*\.[A-Za-z][A-Za-z0-9]{0,7}", re.DOTALL)  # dots at the start begin no suffix
_PARAMETER = re.compile(r""";\s*(filename\*?)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)""", re.IGNORECASE)


def is_plain_url(url: str) -> bool:
    """Tell whether a URL is of the usual kind, which needs no closer look: most of a million are."""
    return _PLAIN_URL.fullmatch(url) is not None


def name_from_url(url: str) -> str:
    """Return the name a URL's path ends with, made safe; empty where it ends with none.

    >>> name_from_url("https://example.com/tiles/T32%20a.tif?x=1"), name_from_url("https://example.com/")
    ('T32 a.tif', '')
    """
    if (plain := _PLAIN_URL.fullmatch(url)) is not None:
        return safe_name(plain[1])
    path = urlsplit(url).path
    return safe_name(unquote(path.rpartition("/")[2], errors="replace"))


def name_from_disposition(header: str) -> str:
    """Return the file name of a ``Content-Disposition`` header (RFC 6266), made safe; empty where it has none.

    >>> name_from_disposition('attachment; filename="../../etc/passwd"')
    'passwd'
    >>> name_from_disposition("attachment; filename=plain.tif; filename*=UTF-8''h%C3%B6he.tif")
    'höhe.tif'
    """
    found = {key.lower(): value for key, value in _PARAMETER.findall(";" + header.partition(";")[2])}
    if "filename*" in found:
        charset, _, encoded = found["filename*"].strip('"').partition("'")
        text = unquote(encoded.partition("'")[2], encoding=_known(charset), errors="replace")
    else:
        text = found.get("filename", "")
        if text.startswith('"'):
            text = re.sub(r"\\(.)", r"\1", text[1:-1])
    return safe_name(re.split(r"[/\\]", text)[-1])


def _known(charset: str) -> str:
    return "latin-1" if charset.lower() in ("iso-8859-1", "latin-1") else "utf-8"


def safe_name(text: str) -> str:
    r"""Return a name that is one component of a path and can do no harm; empty only for one without any substance.

    >>> safe_name(".bashrc"), safe_name("a/../b"), safe_name("nul.tif"), safe_name("..")
    ('_.bashrc', 'a_.._b', '_nul.tif', '')
    """
    if _PLAIN.fullmatch(text) is None:
        text = unicodedata.normalize("NFC", text)
        text = "".join("_" if unicodedata.category(char)[0] == "C" else char for char in text)
        text = _FORBIDDEN.sub("_", text).strip(" ")
    text = text.rstrip(". ")
    if not text.strip("."):
        return ""
    if text[0] == "." or _DEVICE.fullmatch(text):
        text = "_" + text
    if text.endswith((PART_SUFFIX, NOTE_SUFFIX)):
        text += "_"
    return _shortened(text)


def _shortened(name: str) -> str:
    """Cut a name that is too long; its suffix stays, and a digest keeps it apart from others of the same start."""
    encoded = name.encode()
    if len(encoded) <= _LONGEST_NAME:
        return name
    suffix = PurePosixPath(name).suffix
    end = "-" + hashlib.sha256(encoded).hexdigest()[:8] + (suffix if len(suffix.encode()) < _LONGEST_NAME // 4 else "")
    return encoded[: _LONGEST_NAME - len(end.encode())].decode(errors="ignore") + end


def has_data_suffix(name: str) -> bool:
    """Tell whether a name ends like a file's.

    >>> has_data_suffix("tile.tif"), has_data_suffix("$value"), has_data_suffix("v1.0")
    (True, False, False)
    """
    return _DATA_SUFFIX.fullmatch(name) is not None


def checked_path(path: str) -> str:
    """Return a path the user gave, normalised; it is relative and stays below the folder.

    Raises:
        TargetPathError: It would leave the folder, or is no possible path.

    >>> checked_path("2024//tile.tif")
    '2024/tile.tif'
    """
    if not path or "\0" in path or any(unicodedata.category(char) == "Cc" for char in path):
        _refuse(path, "it is empty or has control characters; give a printable name")
    separators = re.compile(r"[/\\]") if sys.platform == "win32" else re.compile("/")
    if os.path.isabs(path) or path.startswith("/") or os.path.splitdrive(path)[0]:
        _refuse(path, "it is absolute; give a path relative to the folder of the downloads")
    parts = [part for part in separators.split(path) if part not in ("", ".")]
    if ".." in parts or not parts or path.endswith("/"):
        _refuse(path, "it leaves the folder of the downloads or names no file; give a path below it")
    for part in parts:
        _check_part(path, part)
    joined = "/".join(parts)
    if len(os.fsencode(joined)) > _LONGEST_PATH:
        _refuse(path[:80] + "…", f"it is longer than {_LONGEST_PATH} bytes; give a shorter one")
    return joined


def _check_part(path: str, part: str) -> None:
    try:
        length = len(part.encode())
    except UnicodeEncodeError:
        _refuse(repr(path), "it is not text that a file name can be made of; give a printable name")
    if length > _LONGEST_NAME:
        _refuse(path[:80] + "…", f"one of its names is longer than {_LONGEST_NAME} bytes; give a shorter one")
    if part.endswith((PART_SUFFIX, NOTE_SUFFIX)):
        _refuse(path, f"names that end with {PART_SUFFIX} are kept for unfinished files; give another")
    if sys.platform == "win32" and (_FORBIDDEN.search(part) or _DEVICE.fullmatch(part) or part[-1] in ". "):
        _refuse(path, "Windows reserves this name; give another")


def planned_path(url: str, path: str | None) -> str | None:
    """Return where below the folder a file goes, or None while only the server's answer can tell.

    Args:
        url: Where it comes from; its name counts where it ends like a file's.
        path: The path that was given with it, if any.

    Raises:
        TargetPathError: The given path is not usable.
    """
    if path is not None:
        return checked_path(path)
    name = name_from_url(url)
    return name if name and has_data_suffix(name) else None


def late_name(url: str, disposition: str) -> str:
    """Return the name of a file whose URL has none of its own, now that the server has answered."""
    return (
        (name_from_disposition(disposition) if disposition else "") or name_from_url(url) or f"file-{url_digest(url)}"
    )


def url_digest(url: str) -> str:
    """Return 16 hex digits that stand for a URL, which may hold secrets."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


class Folder:
    """The folder of a run's downloads; makes what is missing below it, and lets no link lead out.

    Args:
        root: Its path.
        reserved: Files that no download may replace, absolute and without links on the way to their folders.
    """

    def __init__(self, root: str, reserved: Iterable[str] = ()) -> None:
        os.makedirs(root, exist_ok=True)
        # One called NAME.part is where NAME would be written to.
        self._reserved = {path.removesuffix(end) for path in reserved for end in ("", PART_SUFFIX, NOTE_SUFFIX)}
        self._reserved_names = {os.path.basename(path) for path in self._reserved}
        self.root = os.path.realpath(root)
        self._known = {self.root}  # folders below that were looked at
        self.made: set[str] = set()  # folders that hold new folders, to be written to disk

    def locate(self, relative: str) -> str:
        """Return the absolute path of a file below the folder, in a folder that exists.

        Raises:
            TargetPathError: A symbolic link leads out of the folder, something is in the way, or the file is reserved.
        """
        path = f"{self.root}/{relative}"
        parent, _, name = path.rpartition("/")
        if parent not in self._known:
            self._admit(parent, relative)
        if name in self._reserved_names and f"{os.path.realpath(parent).rstrip('/')}/{name}" in self._reserved:
            _refuse(relative, "the run itself reads or writes this file; give the download another path or folder")
        return path

    def _admit(self, parent: str, relative: str) -> None:
        real = os.path.realpath(parent)
        if real != self.root and not real.startswith(self.root.rstrip("/") + "/"):
            _refuse(relative, "a symbolic link on the way leads out of the folder of the downloads; remove it")
        above = parent
        while not os.path.isdir(above):
            above = os.path.dirname(above)
            self.made.add(above)
        try:
            os.makedirs(parent, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            _refuse(relative, "a file stands where a folder should be made; remove it or give another path")
        self._known.add(parent)


class SeenPaths:
    """Remember which paths are taken, and by what: 32 to 64 bytes each, so that a million of them cost little.

    An open-addressing table of 64-bit digests: two of a million paths are mistaken for each other once in 10^7 runs.
    Beside each stand 32 bits of its owner's hash: of 4 * 10^9 pairs of different owners of one path, one seems equal.
    """

    def __init__(self) -> None:
        from array import array

        self._array = array
        self._slots = array("Q", bytes(8 * 1024))
        self._owners = array("Q", bytes(8 * 1024))  # hash and number
        self._count = 0

    def take(self, path: str, owner: Hashable, number: int) -> int | None:
        """Take a path.

        Args:
            path: The path.
            owner: What is to have it.
            number: Of the owner, below 2**32.

        Returns:
            The number of the owner that has it: this one, or an equal one that came before; None for one that differs.
        """
        folded = path.casefold() if sys.platform in ("darwin", "win32") else path  # their file systems do
        digest = hashlib.blake2b(os.fsencode(folded), digest_size=8).digest()
        if 2 * self._count >= len(self._slots):
            self._grow()
        entry = (hash(owner) & _HALF) << 32 | number
        found = self._put(int.from_bytes(digest, "little") or 1, entry)  # 0 is an empty slot
        if found == entry:
            self._count += 1
        return found & _HALF if found >> 32 == entry >> 32 else None

    def _put(self, key: int, entry: int) -> int:
        """Return what has the key: this entry, or a former one."""
        slots, mask = self._slots, len(self._slots) - 1
        place = key & mask
        while slots[place]:
            if slots[place] == key:
                return self._owners[place]
            place = (place + 1) & mask
        slots[place], self._owners[place] = key, entry
        return entry

    def _grow(self) -> None:
        former, owners = self._slots, self._owners
        self._slots = self._array("Q", bytes(8 * 2 * len(former)))
        self._owners = self._array("Q", bytes(8 * 2 * len(former)))
        for key, entry in zip(former, owners, strict=True):
            if key:
                self._put(key, entry)


def _refuse(path: str, reason: str) -> NoReturn:
    raise TargetPathError(path if path.isprintable() else repr(path), reason)


def refuse_duplicate(url: str, path: str) -> TargetPathError:
    """Return the error of a file whose path another one of the same run has."""
    return TargetPathError(path, f"another file of this run has this path; give {shown_url(url)} a path of its own")
