"""Sessions: the parent's objects that can log in, own the credentials and keep one token fresh."""

from __future__ import annotations

import ipaddress
import re
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from shpool.config import SHConfig
from shpool.endpoint import TokenEndpoint
from shpool.errors import SHUserWarning, TokenResponseError
from shpool.origins import host_of
from shpool.redaction import Secret
from shpool.renewal import LONGEST_WAIT, TokenRenewal
from shpool.retry import Backoff
from shpool.tokens import SYSTEM_CLOCK, Clock, Token, decode_claims, token_from_mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from typing_extensions import Self

    from shpool.endpoint import ClientAuth
    from shpool.retry import RetryAfterUnit

_HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")  # in lower case
_MILLISECOND_HOSTS = ("sentinel-hub.com", "sh.dataspace.copernicus.eu")  # what their Retry-After counts


class OAuthSession:
    """Log in at an OAuth2 provider with client credentials and keep the token fresh (RFC 6749, section 4.4).

    It logs in when a token is first asked for, not before. Threads may share it: they log in once between them.

    Args:
        token_url: The provider's token endpoint; https, or http on this machine.
        client_id: Public name of the client.
        client_secret: Its secret; never shown, logged or pickled.
        scope: Scopes to ask for, space-separated or as a sequence; None asks for the client's default.
        audience: The API the token is for, where a provider wants to be told.
        client_auth: Send the credentials in the body (``post``) or as HTTP Basic (``basic``).
        refresh_before_expiry: Refresh with this many seconds left, or at a quarter of the lifetime if that is less;
            None never refreshes.
        timeout: Seconds to connect, and seconds without a byte while reading; their sum bounds one attempt.
        max_attempts: Requests to the endpoint, at most, in one read of ``token``.
        retry_delay: Longest wait before the second attempt, seconds; doubles from there, with full jitter.
        retry_after_unit: What a number in the provider's ``Retry-After`` counts: ``s`` or ``ms``.
        allowed_hosts: Hosts that may be sent the token, as bare names or addresses: no scheme, no port, and
            international names in their ASCII form. Empty means the origin that each call names.
        verify: Whether to verify TLS certificates, or the path of a CA bundle.
        clock: Where the time comes from.

    Raises:
        ValueError: An argument is missing or out of range.
    """

    def __init__(  # noqa: PLR0913 - a session has this many independent settings; all but three are keyword-only
        self,
        token_url: str,
        client_id: str,
        client_secret: str | Secret,
        *,
        scope: str | Iterable[str] | None = None,
        audience: str | None = None,
        client_auth: ClientAuth = "post",
        refresh_before_expiry: float | None = 120.0,
        timeout: tuple[float, float] = (5.0, 10.0),
        max_attempts: int = 4,
        retry_delay: float = 5.0,
        retry_after_unit: RetryAfterUnit = "s",
        allowed_hosts: Iterable[str] = (),
        verify: bool | str = True,
        clock: Clock = SYSTEM_CLOCK,
        _token: Token | None = None,
    ) -> None:
        # First of all, so that no traceback of what follows has the bare secret among its local variables.
        client_secret = client_secret if isinstance(client_secret, Secret) else Secret(client_secret or "")
        endpoint = TokenEndpoint(
            token_url,
            client_id,
            client_secret,
            scope=scope if scope is None or isinstance(scope, str) else " ".join(scope),
            audience=audience,
            client_auth=client_auth,
            timeout=timeout,
            retry_after_unit=retry_after_unit,
            verify=verify,
        )
        if not 0 <= retry_delay < float("inf"):
            msg = f"retry_delay is seconds from 0, got {retry_delay!r}"
            raise ValueError(msg)
        renewal = TokenRenewal(
            endpoint,
            _token,
            clock,
            refresh_before_expiry=refresh_before_expiry,
            max_attempts=max_attempts,
            backoff=Backoff(base=retry_delay, cap=max(retry_delay, LONGEST_WAIT)),
        )
        self._set_up(endpoint, renewal, refresh_before_expiry, allowed_hosts)

    def _set_up(
        self,
        endpoint: TokenEndpoint | None,
        renewal: TokenRenewal,
        refresh_before_expiry: float | None,
        allowed_hosts: Iterable[str],
    ) -> None:
        if isinstance(allowed_hosts, str):
            msg = f"allowed_hosts is a sequence of host names, got the string {allowed_hosts!r}"
            raise TypeError(msg)
        self.refresh_before_expiry = refresh_before_expiry
        self._endpoint = endpoint
        self._renewal = renewal
        self._allowed_hosts = tuple(map(_bare_host, allowed_hosts))

    @classmethod
    def from_token(cls, token: Mapping[str, Any]) -> Self:
        """Make a session of a token obtained elsewhere; it never refreshes, and warns once the token has expired.

        Args:
            token: A mapping with ``access_token`` and ``expires_at`` (seconds since the epoch).

        Raises:
            ValueError: One of the two is missing.
        """
        session = cls.__new__(cls)
        session._set_up(None, _fixed(_given_token(token)), None, ())  # noqa: SLF001 - what __init__ would have called
        return session

    @property
    def token(self) -> dict[str, Any]:
        """The current token as OAuth libraries keep it, fresh at this moment.

        Logs in at the first read. A refresh that fails while the old token is valid is logged as a warning.

        Raises:
            LoginRefusedError: These credentials will never work.
            LoginError: No valid token, and none could be had within ``max_attempts``.
        """
        token = self._renewal.current
        if self.refreshes or token is None:
            return dict(self._renewal.fresh())
        if self._renewal.remaining(token) <= 0:
            warnings.warn("the session's token has expired and is not refreshed", SHUserWarning, stacklevel=2)
        return dict(token)

    @property
    def session_headers(self) -> dict[str, str]:
        """The bearer header for a request (RFC 6750, section 2.1)."""
        return {"Authorization": f"Bearer {self.token['access_token']}"}

    def info(self) -> dict[str, Any]:
        """Return the claims of the current token, unverified.

        Raises:
            OpaqueTokenError: The token is not a JSON Web Token.
        """
        return decode_claims(self.token["access_token"])

    @property
    def refreshes(self) -> bool:
        """Whether this session logs in again by itself."""
        return self.refresh_before_expiry is not None

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Hosts that may be sent the token; empty means the origin that each call names."""
        return self._allowed_hosts

    @property
    def client_id(self) -> str:
        """Public name of the client; empty when the session was made of a token."""
        return "" if self._endpoint is None else self._endpoint.client_id

    @property
    def token_url(self) -> str:
        """The token endpoint; empty when the session was made of a token."""
        return "" if self._endpoint is None else self._endpoint.url

    @property
    def retry_after_unit(self) -> RetryAfterUnit:
        """What a number in the provider's ``Retry-After`` counts."""
        return "s" if self._endpoint is None else self._endpoint.retry_after_unit

    def renew(self, after: Token | None = None) -> Token:
        """Return a token other than ``after``: the one at hand if it will do, else by one login attempt.

        Callers that saw the same token fail cause one login between them.

        Args:
            after: The token to replace, None when there was none.

        Returns:
            The token; its generation is one more than that of the token before it.

        Raises:
            LoginRefusedError: These credentials will never work.
            TokenResponseError: The endpoint answered, but not with a token.
            LoginError: No token this time.
        """
        return self._renewal.renew(after)

    def follow(self, read_shared: Callable[[], Token]) -> None:
        """Read the token elsewhere from now on and forget the secret; what a forked child of the parent does."""
        self._endpoint = None
        self._renewal.follow(read_shared)

    def is_secret(self, text: str) -> bool:
        """Tell whether a text is this session's client secret, without showing it."""
        return self._endpoint is not None and text == self._endpoint.client_secret.reveal()

    def __repr__(self) -> str:
        if not hasattr(self, "_renewal"):  # a traceback shows the local variables of a constructor that failed
            return f"<{type(self).__name__} not made yet>"
        token = self._renewal.current
        if token is None:
            state = "no token yet"
        else:
            left = self._renewal.remaining(token)
            state = f"generation {token.generation}, " + (f"{left:.0f} s left" if left > 0 else "expired")
        who = "made of a token" if self._endpoint is None else f"client {self.client_id!r} at {self.token_url}"
        return f"<{type(self).__name__} {who}: {state}>"

    def __reduce__(self) -> NoReturn:
        msg = "a session holds a client secret and stays in its process; workers call current_session() instead"
        raise TypeError(msg)


class SentinelHubSession(OAuthSession):
    """Log in at Sentinel Hub or the Copernicus Data Space with the settings of an ``SHConfig``.

    Args:
        config: Settings and credentials; None reads the user's file and environment.
        refresh_before_expiry: Refresh with this many seconds left, or at a quarter of the lifetime if that is less;
            None never refreshes.

    Raises:
        ValueError: ``sh_base_url`` names no host, or a credential is missing; none is needed with a token that is not
            to be refreshed.
    """

    def __init__(
        self,
        config: SHConfig | None = None,
        refresh_before_expiry: float | None = 120.0,
        *,
        _token: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config = SHConfig() if config is None else config
        given = None if _token is None else _given_token(_token)
        host = _base_host(config.sh_base_url)
        if given is not None and refresh_before_expiry is None:
            self._set_up(None, _fixed(given), None, [host])
            return
        _check_credentials(config)
        super().__init__(
            config.sh_token_url,
            config.sh_client_id,
            config.sh_client_secret,
            refresh_before_expiry=refresh_before_expiry,
            timeout=(5.0, min(10.0, config.download_timeout_seconds)),
            max_attempts=config.max_download_attempts,
            retry_delay=config.download_sleep_time,
            retry_after_unit="ms" if _counts_milliseconds(host) else "s",
            allowed_hosts=[host],
            _token=given,
        )

    @classmethod
    def from_token(cls, token: Mapping[str, Any]) -> Self:
        """Make a session of a token obtained elsewhere; it never refreshes, and warns once the token has expired.

        Args:
            token: A mapping with ``access_token`` and ``expires_at`` (seconds since the epoch).

        Raises:
            ValueError: One of the two is missing.
        """
        return cls(refresh_before_expiry=None, _token=token)


def _given_token(fields: Mapping[str, Any]) -> Token:
    for key in ("access_token", "expires_at"):
        if fields.get(key) is None:
            msg = f"a token is a mapping with access_token and expires_at, this one has no {key}"
            raise ValueError(msg)
    try:
        return token_from_mapping(fields, SYSTEM_CLOCK.now(), source="the given token")
    except TokenResponseError as exc:
        reason = exc.reason
    msg = f"the given token is not usable: {reason}"
    raise ValueError(msg)


def _fixed(token: Token) -> TokenRenewal:
    return TokenRenewal(None, token, SYSTEM_CLOCK, refresh_before_expiry=None)


def _bare_host(entry: str) -> str:
    """Return a host as ``host_of`` shows it for the URL of a prepared request, which is what it is compared with."""
    host = entry.lower().removesuffix(".") if isinstance(entry, str) else ""
    if _HOST_NAME.fullmatch(host) or _is_address(host):
        return host
    if host.isascii():
        msg = f"allowed_hosts holds {entry!r}; give the bare host name, such as 'api.example.com'"
    else:
        msg = f"allowed_hosts holds {entry!r}; give the host name in its ASCII form, which begins with 'xn--'"
    raise ValueError(msg)


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _base_host(url: str) -> str:
    if host := host_of(url):
        return host
    shown = url.rpartition("@")[2]  # without a password that may stand before it
    msg = (
        f"sh_base_url names no host that may be sent the token, got {shown!r}; give one like 'https://api.example.com'"
    )
    raise ValueError(msg)


def _check_credentials(config: SHConfig) -> None:
    variables = {"sh_client_id": "SH_CLIENT_ID", "sh_client_secret": "SH_CLIENT_SECRET"}
    missing = {name: variable for name, variable in variables.items() if not getattr(config, name)}
    if missing:
        msg = (
            f"no {' and no '.join(missing)}: set {' and '.join(missing.values())} in the environment, "
            f"pass them to SHConfig, or write them into {SHConfig.get_config_location()}"
        )
        raise ValueError(msg)


def _counts_milliseconds(host: str) -> bool:
    return any(host == known or host.endswith(f".{known}") for known in _MILLISECOND_HOSTS)
