"""One login, every process: a process pool whose workers share one OAuth2 token.

    with AuthenticatedProcessPool(session) as pool:
        results = list(pool.map(work, items))  # inside work(): current_session().session_headers

Names are imported when they are first used, so that ``import shpool`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shpool.version import __version__ as __version__

if TYPE_CHECKING:
    from shpool.config import SHConfig
    from shpool.downloads import DownloadItem, DownloadResult, download
    from shpool.engines.dask import DaskEngine
    from shpool.engines.ray import RayEngine
    from shpool.errors import ShpoolError, SHUserWarning
    from shpool.gate import Gate
    from shpool.pool import AuthenticatedProcessPool
    from shpool.session import OAuthSession, SentinelHubSession
    from shpool.shared import SharedSession, collect_shared_session, current_session
    from shpool.sharing import SessionSharing, SessionSharingThread

__all__ = [
    "AuthenticatedProcessPool",
    "DaskEngine",
    "DownloadItem",
    "DownloadResult",
    "Gate",
    "OAuthSession",
    "RayEngine",
    "SHConfig",
    "SHUserWarning",
    "SentinelHubSession",
    "SessionSharing",
    "SessionSharingThread",
    "SharedSession",
    "ShpoolError",
    "collect_shared_session",
    "current_session",
    "download",
]

_HOMES = {
    "AuthenticatedProcessPool": "shpool.pool",
    "DaskEngine": "shpool.engines.dask",
    "DownloadItem": "shpool.downloads",
    "DownloadResult": "shpool.downloads",
    "Gate": "shpool.gate",
    "OAuthSession": "shpool.session",
    "RayEngine": "shpool.engines.ray",
    "SHConfig": "shpool.config",
    "SHUserWarning": "shpool.errors",
    "SentinelHubSession": "shpool.session",
    "SessionSharing": "shpool.sharing",
    "SessionSharingThread": "shpool.sharing",
    "SharedSession": "shpool.shared",
    "ShpoolError": "shpool.errors",
    "collect_shared_session": "shpool.shared",
    "current_session": "shpool.shared",
    "download": "shpool.downloads",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
