"""Test tools for programs that use shpool: a clock that only moves when told, and a loopback server.

``LoopbackServer`` is an OAuth2 provider and a data service in one, on 127.0.0.1. It counts what it is
asked, and fails, hangs or revokes when told:

>>> import urllib.error, urllib.request
>>> with LoopbackServer() as server:
...     try:
...         urllib.request.urlopen(server.data_url(7))
...     except urllib.error.HTTPError as error:
...         error.close()
...         error.code, server.logins
(401, 0)
"""

from __future__ import annotations

from shpool.testing.clock import FakeClock
from shpool.testing.files import FileFault
from shpool.testing.server import LoopbackServer, tile_bytes

__all__ = ["FakeClock", "FileFault", "LoopbackServer", "tile_bytes"]
