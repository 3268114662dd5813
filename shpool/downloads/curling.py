"""Many transfers at once in one thread, on libcurl's multi interface; the only import of pycurl.

It knows HTTP and sockets, and nothing of files. libcurl follows no redirect here and keeps no password: each request
is made anew by the caller, who knows where the token may go.
"""

from __future__ import annotations

import functools
import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from shpool.downloads.transfer import Answer
from shpool.errors import MissingExtraError
from shpool.origins import host_of, is_loopback_host, origin_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_CONNECT_WITHIN = 30.0  # s for name, connection and TLS
# Among the fields of every request: pycurl takes an empty list for no change, and would send those of the request
# before it, the token among them.
_ACCEPT = "Accept: */*"
_LONGEST_SELECT = 0.25  # s
_BLIND_WAIT = 0.005  # s between two looks where there is no descriptor to wait for, as while a name is looked up
_IDLE = 64  # connections kept open beside those in use, at most; each holds a descriptor
_BUFFER = 128 * 1024  # bytes read from a socket at once
_NAMES = (
    "Content-Length",
    "Content-Type",
    "Content-Range",
    "Content-Disposition",
    "Content-MD5",
    "Digest",
    "Repr-Digest",
    "ETag",
    "Last-Modified",
    "Location",
    "Retry-After",
    "WWW-Authenticate",
    "X-ProcessingUnits-Spent",
)
_FIELDS = {
    form.encode(): name.lower() for name in _NAMES for form in (name, name.lower())
}  # as most servers write them
# What no other attempt will change, of libcurl's errors: UNSUPPORTED_PROTOCOL, URL_MALFORMAT, PEER_FAILED_VERIFICATION,
# SSL_CERTPROBLEM, SSL_CACERT_BADFILE.
_FINAL = frozenset({1, 3, 60, 58, 77})
_CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")  # as requests has them, then OpenSSL's own


@dataclass(frozen=True)
class CurlOptions:
    """What all transfers of a loop have in common.

    Attributes:
        connections: Most transfers at once.
        stall_timeout: Seconds without a byte after which a transfer is given up.
        ca_bundle: File of the authorities to trust; None for the environment's, else certifi's.
        user_agent: What to call ourselves.
    """

    connections: int = 8
    stall_timeout: float = 120.0
    ca_bundle: str | None = None
    user_agent: str = "shpool"


class Receiver(Protocol):
    """What takes an answer. Errors it raises end the transfer and are handed back by ``CurlLoop.poll``."""

    def take_head(self, answer: Answer) -> None:
        """Take status and fields; called before any byte of the body, and for every answer."""

    def take_body(self, chunk: bytes) -> bool:
        """Take some of the body; tell whether more is wanted."""


@dataclass(frozen=True)
class CurlTrouble:
    """Why libcurl ended a transfer early.

    Attributes:
        reason: In words.
        is_final: Another attempt will end the same way.
        is_late: It was at its deadline.
    """

    reason: str
    is_final: bool
    is_late: bool = False


Ended = tuple[Any, "CurlTrouble | Exception | None"]  # the receiver, and what went wrong


class CurlLoop:
    """Run up to ``connections`` transfers at once and keep connections open between them; for one thread.

    A class because connections, TLS sessions and idle handles outlive every single transfer.

    Raises:
        MissingExtraError: pycurl is not installed.
    """

    def __init__(self, options: CurlOptions) -> None:
        self._pycurl = pycurl = load_pycurl()
        self.options = options
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_MAXCONNECTS, min(2 * options.connections, options.connections + _IDLE))
        self._multi.setopt(pycurl.M_PIPELINING, pycurl.PIPE_MULTIPLEX)
        self._next_look = 0.0  # when to look for stalled transfers
        self._idle: list[_Slot] = []
        self._busy: dict[Any, _Slot] = {}

    @property
    def busy(self) -> int:
        """Transfers under way."""
        return len(self._busy)

    @property
    def has_room(self) -> bool:
        """Tell whether one more transfer may start."""
        return len(self._busy) < self.options.connections

    def start(self, url: str, fields: Sequence[str], receiver: Receiver, deadline: float = math.inf) -> None:
        """Begin to fetch a URL.

        Args:
            url: Its answer goes to ``receiver``, a redirect too.
            fields: Header fields to send.
            receiver: Takes the answer.
            deadline: When to end it unless it has ended, by ``time.monotonic``.
        """
        slot = self._idle.pop() if self._idle else _Slot(self._pycurl, self.options)
        slot.begin(url, fields, receiver)
        slot.deadline = deadline
        self._next_look = min(self._next_look, deadline)
        self._busy[slot.curl] = slot
        self._multi.add_handle(slot.curl)

    def poll(self, timeout: float) -> list[Ended]:
        """Carry on for so many seconds at most; return what has ended."""
        # perform() for all rather than an event for each socket: two callbacks a file less, for so few at once. It
        # comes before the waiting, as it sends what was started since, and reads what waits within libcurl.
        self._multi.perform()
        ended = [*self._take_ended(), *self._take_stalled()]
        if not ended and self._busy:
            self._wait(min(timeout, _LONGEST_SELECT))
        return ended

    def _wait(self, longest: float) -> None:
        """Wait until a socket is ready, or until libcurl has something to do without one."""
        due = self._multi.timeout()  # ms, negative for nothing
        if due >= 0:
            longest = min(longest, due / 1000)
        # It is select(), which overlooks descriptors from 1,024 on; these are looked at every few milliseconds.
        if longest > 0 and self._multi.select(longest) < 0:
            time.sleep(min(longest, _BLIND_WAIT))

    def cancel(self) -> list[Any]:
        """Stop all transfers; return their receivers."""
        receivers = [slot.receiver for slot in self._busy.values()]
        for curl in list(self._busy):
            self._release(curl)
        return receivers

    def close(self) -> None:
        """Stop all transfers and close all connections."""
        self.cancel()
        for slot in self._idle:
            slot.curl.close()
        self._idle.clear()
        self._multi.close()

    def _take_ended(self) -> list[Ended]:
        ended: list[Ended] = []
        while True:
            queued, good, bad = self._multi.info_read()
            ended.extend(self._end(curl, None) for curl in good)
            for curl, code, text in bad:
                trouble = CurlTrouble(text or f"libcurl error {code}", code in _FINAL)
                ended.append(self._end(curl, trouble))
            if not queued:
                return ended

    def _take_stalled(self) -> list[Ended]:
        """End the transfers that have brought nothing for too long, or are at their deadline.

        libcurl's own limit looks at the mean of some seconds, and notices the end of a fast transfer late.
        """
        now, patience = time.monotonic(), self.options.stall_timeout
        if now < self._next_look:
            return []
        stalled = CurlTrouble(f"no byte came for {patience:g} s", is_final=False)
        late = CurlTrouble("it took too long", is_final=False, is_late=True)
        troubles = {
            curl: late if now >= slot.deadline else stalled
            for curl, slot in self._busy.items()
            if now >= slot.deadline or now - slot.latest > patience
        }
        ended = [self._end(curl, trouble) for curl, trouble in troubles.items()]
        self._next_look = min([now + min(patience / 4, 1.0), *(slot.deadline for slot in self._busy.values())])
        return ended

    def _end(self, curl: Any, trouble: CurlTrouble | None) -> Ended:  # noqa: ANN401 - pycurl has no types
        slot = self._busy[curl]
        receiver = slot.receiver
        error = slot.finish()
        self._release(curl)
        if error is not None and not isinstance(error, Exception):
            raise error  # ^C, which arrived inside a callback
        return receiver, error or trouble

    def _release(self, curl: Any) -> None:  # noqa: ANN401 - as above
        self._multi.remove_handle(curl)
        slot = self._busy.pop(curl)
        slot.receiver = None
        self._idle.append(slot)


class _Slot:
    """One easy handle, used again and again: setting it up anew costs more than a small transfer."""

    def __init__(self, pycurl: Any, options: CurlOptions) -> None:  # noqa: ANN401 - pycurl has no types
        self._pycurl = pycurl
        self._is_direct = False
        self.receiver: Any = None
        self.latest = 0.0  # when the last byte came
        self.deadline = math.inf
        self._lines: list[bytes] = []
        self._is_headed = False
        self._error: BaseException | None = None
        curl = self.curl = pycurl.Curl()
        curl.setopt(pycurl.HEADERFUNCTION, self._lines.append)
        curl.setopt(pycurl.WRITEFUNCTION, self._take)
        curl.setopt(pycurl.HEADEROPT, pycurl.HEADER_SEPARATE)  # a proxy is never sent the token
        curl.setopt(pycurl.FOLLOWLOCATION, 0)
        curl.setopt(pycurl.UNRESTRICTED_AUTH, 0)
        curl.setopt(pycurl.NETRC, pycurl.NETRC_IGNORED)
        curl.setopt(pycurl.VERBOSE, 0)
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS)
        curl.setopt(pycurl.PIPEWAIT, 1)
        curl.setopt(pycurl.SSL_VERIFYPEER, 1)
        curl.setopt(pycurl.SSL_VERIFYHOST, 2)
        curl.setopt(pycurl.CAINFO, certificates(options.ca_bundle))
        curl.setopt(pycurl.USERAGENT, options.user_agent)
        curl.setopt(pycurl.BUFFERSIZE, _BUFFER)
        curl.setopt(pycurl.TCP_KEEPALIVE, 1)
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, int(_CONNECT_WITHIN * 1000))

    def begin(self, url: str, fields: Sequence[str], receiver: Receiver) -> None:
        self.receiver = receiver
        self.latest = time.monotonic()
        self._lines.clear()
        self._is_headed = False
        self._error = None
        self.curl.setopt(self._pycurl.URL, _encoded(url))
        self.curl.setopt(self._pycurl.HTTPHEADER, [_ACCEPT, *fields])
        is_direct = _is_loopback(origin_of(url))
        if is_direct != self._is_direct:
            self._is_direct = is_direct
            if is_direct:
                self.curl.setopt(self._pycurl.PROXY, "")  # none stands between this machine and itself
            else:
                self.curl.unsetopt(self._pycurl.PROXY)

    def finish(self) -> BaseException | None:
        """Hand over a head without a body; return what the receiver raised."""
        if not self._is_headed and self._error is None and self._lines:
            self._take_head()
        return self._error

    def _take(self, chunk: bytes) -> int | None:
        if not self._is_headed:
            self._take_head()
        if self._error is not None:
            return -1
        self.latest = time.monotonic()
        try:
            return None if self.receiver.take_body(chunk) else -1
        except BaseException as exc:  # noqa: BLE001 - border: pycurl would print it and go on
            self._error = exc
            return -1

    def _take_head(self) -> None:
        self._is_headed = True
        try:
            self.receiver.take_head(parse_head(self._lines))
        except BaseException as exc:  # noqa: BLE001 - border: as above
            self._error = exc


def parse_head(lines: Sequence[bytes]) -> Answer:
    r"""Return the last of the heads in these lines: interim answers stand before it.

    >>> parse_head([b"HTTP/1.1 100 Continue\r\n", b"\r\n", b"HTTP/2 200 \r\n", b'ETag: "a"\r\n', b"\r\n"])
    Answer(status=200, fields={'etag': '"a"'})
    """
    status = 0
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(b"HTTP/"):
            status, fields = int(line.split(None, 2)[1]), {}
            continue
        raw, _, value = line.partition(b":")
        name = _FIELDS.get(raw) or _FIELDS.get(raw.lower())
        if name is not None:
            fields[name] = _text(value.strip())
    return Answer(status, fields)


def _text(value: bytes) -> str:
    """Return a field's text: names in raw UTF-8 are more frequent than in Latin-1, and seldom both at once."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def load_pycurl() -> Any:  # noqa: ANN401 - it has no types
    """Return pycurl.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import pycurl
    except ImportError:
        package, extra = "pycurl", "download"
        raise MissingExtraError(package, extra) from None
    return pycurl


def certificates(ca_bundle: str | None) -> str:
    """Return the file of the authorities to trust: the one given, the environment's, or certifi's."""
    named = ca_bundle or next((os.environ[name] for name in _CERTIFICATES if os.environ.get(name)), None)
    if named is not None:
        return named
    import certifi

    return certifi.where()


@functools.lru_cache(maxsize=256)
def _is_loopback(origin: str) -> bool:
    return is_loopback_host(host_of(origin))


def _encoded(url: str) -> str:
    """Return a URL in ASCII, what is encoded already left as it is."""
    if url.isascii() and " " not in url:
        return url
    return quote(url, safe="%/:=&?~#+!$,;'@()*[]")
