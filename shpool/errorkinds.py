"""Which errors are of one kind, whatever URL, path, number or id stands in each: for reports of many."""

from __future__ import annotations

import re

MOST_KINDS = 500  # that are told apart in one report; more are no kinds, and would fill the memory
OTHERS = "all others"  # the text of those beyond

_LONGEST_TEXT = 1000  # characters of a text that are looked at
_LONGEST_KIND = 200  # characters of a text that tell kinds apart

_COMMAND = re.compile(r"\Acommand \[.*\](?= (?:ended|ran) )")  # of a shell job, arguments and all
_QUOTED_PATH = re.compile(r"(?<!\w)(['\"])[^'\"]*[/\\.][^'\"]*\1")
_TELLS_APART = re.compile(r"[0-9/]")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{1,15}://[^'\"<>|]*[^'\"<>|:;,.!?)\]}]")
_MEDIA_TYPE = re.compile(r"\b(?:application|audio|image|multipart|text|video)/[\w.+-]+")
_PATH = re.compile(r"[^'\"()\[\]{}<>,;:=|]*/[^'\"()\[\]{}<>,;:=|]*[^'\"()\[\]{}<>,;:=|.!?]|/")
_ID = re.compile(r"[\w-]*[0-9][\w-]*(?:\.[\w-]+)*")
# What has digits and says more than a number: statuses, after a word that announces one, and names.
_STATUS = re.compile(r"\W*-?[0-9]{1,3}\W*")
_ANNOUNCES = re.compile(r"\W*(?:\w*(?:code|status)|HTTP|Errno|errno|signal|gave|got|returned|answered|with)[:=]?")
_BELONGS_TO_STATUS = frozenset({"Client", "Server"})  # "404 Client Error", as requests says it
_NAME = re.compile(r"\W*(?:sha-?[0-9]+|md5|utf-?[0-9]+|u?int[0-9]+|float[0-9]+|HTTP/[0-9.]+)\W*", re.IGNORECASE)
_NAMED_STATUS = re.compile(r"\W*(?:\w*(?:code|status)|errno|signal)[=:]-?[0-9]{1,3}\W*", re.IGNORECASE)


def kind_of_error(text: str) -> str:
    """Return the first line of an error's text without what differs between like errors.

    Word by word, as most words tell nothing apart: one expression for all took three times as long (run: 39 and 13
    microseconds a text), which counts where a hundred thousand jobs have failed.

    >>> kind_of_error("tile 33UWP took 61.5 s (request 3fa85f64-5717-4562-b3fc-2c963f66afa6)")
    'tile # took # s (request #)'
    >>> kind_of_error("https://api.example/tiles/33UWP.tif: HTTP 404; check the URL")
    '<url>: HTTP 404; check the URL'
    """
    line = text[:_LONGEST_TEXT].strip().partition("\n")[0]
    if line.startswith("command ["):
        line = _COMMAND.sub("command [...]", line)
    if "'" in line or '"' in line:
        line = _QUOTED_PATH.sub("<path>", line)
    words = line.split(" ")
    before = ""
    for place, word in enumerate(words):
        if not word.isalpha() and _TELLS_APART.search(word):
            words[place] = _shape(word, before, "".join(words[place + 1 : place + 2]))
        before = word
    return " ".join(words)[:_LONGEST_KIND]


def _shape(word: str, before: str, after: str) -> str:
    """Return what a word with a digit or a slash has in common with its like."""
    if "://" in word:
        return _URL.sub("<url>", word)
    is_status = _STATUS.fullmatch(word) and (_ANNOUNCES.fullmatch(before) or after in _BELONGS_TO_STATUS)
    if is_status or _NAME.fullmatch(word) or _NAMED_STATUS.fullmatch(word):
        return word
    if "/" in word and not _MEDIA_TYPE.search(word):
        return _ID.sub("#", _PATH.sub("<path>", word))
    return _ID.sub("#", word)
