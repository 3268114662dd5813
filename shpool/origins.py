"""Which addresses may be sent a secret: https, or http that stays on this machine."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

_HARMLESS = re.compile(r"https?://[A-Za-z0-9.:-]+/[A-Za-z0-9._~+=,/-]*")  # most of a million: nothing to hide
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")


def is_loopback_host(host: str) -> bool:
    """Tell whether a host name or address is this machine.

    >>> is_loopback_host("127.0.0.1"), is_loopback_host("localhost"), is_loopback_host("example.com")
    (True, True, False)
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(url: str) -> str:
    """Return the host a URL names, in lower case; empty where it names none.

    >>> host_of("https://Example.com:8443/path")
    'example.com'
    """
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_secure_url(url: str) -> bool:
    """Tell whether a secret may travel to a URL.

    >>> is_secure_url("https://example.com/token"), is_secure_url("http://example.com/token")
    (True, False)
    >>> is_secure_url("http://127.0.0.1:8000/token")
    True
    """
    host, scheme = host_of(url), url.partition(":")[0].lower()
    return bool(host) and (scheme == "https" or (scheme == "http" and is_loopback_host(host)))


def shown_url(url: str) -> str:
    """Return a URL fit for an error or a log: signed ones carry their secrets in the query or before the host.

    >>> shown_url("https://someone:secret@example.com/a.tif?signature=secret#page")
    'https://example.com/a.tif?…'
    """
    if _HARMLESS.fullmatch(url) is not None:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a URL that cannot be read"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" + ("?…" if parts.query else "")


def origin_of(url: str) -> str:
    """Return the part of a URL that says who is asked: scheme, host and port, as they are written.

    >>> origin_of("https://Example.com:8443/path?x=1")
    'https://Example.com:8443'
    """
    found = _ORIGIN.match(url)
    return "" if found is None else found[0]
