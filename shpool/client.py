"""A ``requests.Session`` with the shared token, for workers.

The rules, beside those of ``auth``:

 1. A redirect to another origin loses the token, and gets nothing of ``~/.netrc`` in its place.
 2. No proxy stands between this machine and itself: it would be sent the token in the clear.
 3. Answers and errors are handed out without the token.
 4. Each attempt goes through the gate (see ``transport``).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import requests

from shpool.auth import BearerAuth, forget_token
from shpool.origins import host_of, is_loopback_host
from shpool.transport import GatedAdapter

if TYPE_CHECKING:
    from shpool.bearer import TokenHolder
    from shpool.gate import AccountGate
    from shpool.retry import RetryAfterUnit

TIMEOUT = (10.0, 120.0)  # s to connect, and without a byte; the latter as sentinelhub-py's download_timeout_seconds


class HTTPClient(requests.Session):
    """A ``requests.Session`` with the token, retries and timeouts; one for each process.

    Args:
        holder: Whose token to send.
        retry_after_unit: What a number in ``Retry-After`` counts, ``s`` or ``ms``.
        gate: What each attempt waits for before it is sent; None for nothing.
    """

    def __init__(
        self, holder: TokenHolder, retry_after_unit: RetryAfterUnit = "s", gate: AccountGate | None = None
    ) -> None:
        super().__init__()
        self.auth = BearerAuth(holder)
        adapter = GatedAdapter(gate, retry_after_unit)
        self.mount("https://", adapter)
        self.mount("http://", adapter)
        weakref.finalize(self, adapter.close)

    def request(self, method: str | bytes, url: str | bytes, *args: Any, **kwargs: Any) -> requests.Response:  # noqa: ANN401 - as requests
        """Send a request; neither the answer nor an error holds the token afterwards."""
        try:
            response = super().request(method, url, *args, **kwargs)
        except requests.RequestException as exc:
            error = _without_token(exc)
        else:
            for answer in (response, *response.history):
                forget_token(answer.request)
            return response
        raise error

    def merge_environment_settings(self, url: Any, proxies: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as requests
        """Take proxies and certificates from the environment, but no proxy for this machine."""
        settings = super().merge_environment_settings(url, proxies, *args, **kwargs)
        return {**settings, "proxies": {}} if is_loopback_host(host_of(str(url))) else settings

    def rebuild_proxies(self, prepared_request: requests.PreparedRequest, proxies: Any) -> Any:  # noqa: ANN401 - as requests
        """Do so at a redirect too."""
        rebuilt = super().rebuild_proxies(prepared_request, proxies)  # type: ignore[no-untyped-call]  # types-requests leaves it out
        return {} if is_loopback_host(host_of(prepared_request.url or "")) else rebuilt

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:  # noqa: ANN401 - as requests
        """Send a request, with a timeout in any case."""
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = TIMEOUT
        return super().send(request, **kwargs)

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Drop the token on the way to another origin, and put nothing of ``~/.netrc`` in its place."""
        url, origin = prepared_request.url or "", response.request.url or ""
        if "Authorization" in prepared_request.headers and self.should_strip_auth(origin, url):  # type: ignore[no-untyped-call]  # types-requests leaves it out
            del prepared_request.headers["Authorization"]


def _without_token(error: requests.RequestException) -> requests.RequestException:
    """Take the token out of an error: out of its request, and with the frames of the libraries below, which hold it."""
    for request in (error.request, getattr(error.response, "request", None)):
        if request is not None:
            forget_token(request)
    text = str(error)
    error.args = (text,)  # instead of urllib3's error, which holds frames of its own
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
