"""Which addresses may be sent a secret: https, or http that stays on this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


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
