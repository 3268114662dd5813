"""Where the command line gets its client id and secret from, and the session it makes of them."""

from __future__ import annotations

import getpass
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from shpool.errors import LoginError
from shpool_cli.console import CommandError, ExitCode, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.config import SHConfig
    from shpool.session import OAuthSession

# A person waits for the first login: no new attempt begins after this. Later logins are the sharing thread's, which
# tries for as long as the pool lives.
_PATIENCE = 5.0  # s
_TIMEOUT = (4.0, 10.0)  # s to connect and to read; a token endpoint answers in well under one

_T = TypeVar("_T")


def _named(profile: str | None) -> str | None:
    if profile == "":
        msg = "--profile is empty"
        raise CommandError(msg, "name a profile, or leave --profile out")
    return profile


ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        callback=_named,
        help="Profile of the configuration file.",
        show_default="SH_PROFILE, else default-profile",
    ),
]
TokenUrlOption = Annotated[
    str | None, typer.Option("--token-url", help="Token endpoint of any OAuth2 provider, instead of the profile's.")
]
ClientIdOption = Annotated[
    str | None, typer.Option("--client-id", help="Client id, instead of SH_CLIENT_ID or the profile's.")
]
SecretFileOption = Annotated[
    Path | None,
    typer.Option(
        "--client-secret-file",
        help="File that holds the client secret. Without it: SH_CLIENT_SECRET, the profile, or a prompt.",
    ),
]
ScopeOption = Annotated[
    str | None, typer.Option("--scope", help="Space-separated scopes to ask for; goes with --token-url.")
]


@dataclass(frozen=True)
class LoginOptions:
    """What the command line says about the login; the secret is never part of it."""

    profile: str | None = None
    token_url: str | None = None
    client_id: str | None = None
    client_secret_file: Path | None = None
    scope: str | None = None


def make_session(options: LoginOptions, *, may_prompt: bool = True) -> OAuthSession:
    """Make the session the options and the configuration describe; it has not logged in yet.

    Args:
        options: Of the command line.
        may_prompt: Ask for a missing secret where there is a terminal.

    Raises:
        CommandError: Credentials are missing, or the secret's file cannot be read, or there are no profiles.
        ConfigError: The configuration cannot be used.
    """
    if options.client_id == "":
        msg = "--client-id is empty"
        raise CommandError(msg, "give the id, or leave --client-id out")
    if options.scope is not None and not options.scope.strip():
        msg = "--scope is empty"
        raise CommandError(msg, "name the scopes, or leave --scope out")
    if options.scope is not None and options.token_url is None:
        msg = "--scope goes with --token-url"
        raise CommandError(msg, "add --token-url, or leave --scope out")
    config = read_config(options.profile)
    client_id = options.client_id or config.sh_client_id
    if not client_id:
        hint = "set SH_CLIENT_ID, give --client-id, or run: shpool config set sh_client_id ID"
        msg = "there is no client id"
        raise CommandError(msg, hint, ExitCode.LOGIN)
    secret = _secret(options.client_secret_file, config, client_id, may_prompt=may_prompt)
    try:
        return _session(options, config, client_id, secret)
    except ValueError as exc:
        raise CommandError(str(exc), "check --token-url or sh_token_url") from None


def check_login(options: LoginOptions) -> None:
    """Check what options and configuration say about the login; of what is missing warn only, and ask for nothing.

    Raises:
        CommandError: Something is wrong with it.
        ConfigError: The configuration cannot be used.
    """
    try:
        make_session(options, may_prompt=False)
    except CommandError as exc:
        if exc.code is not ExitCode.LOGIN:
            raise
        say(f"warning: {exc.error}, which a run needs; {exc.hint}")


def read_config(profile: str | None) -> SHConfig:
    """Return the settings in effect.

    Raises:
        CommandError: There is no profile of that name.
        ConfigError: The configuration cannot be used.
    """
    from shpool.config import DEFAULT_PROFILE, SHConfig
    from shpool.configfile import read_profiles

    path = SHConfig.get_config_location()
    name = profile or os.environ.get("SH_PROFILE") or DEFAULT_PROFILE
    profiles = read_profiles(Path(path))
    if name not in profiles and (profiles or name != DEFAULT_PROFILE):
        there = f"choose one of {', '.join(profiles)} with --profile or SH_PROFILE, or " if profiles else ""
        msg = f"{path}: no profile {name!r}" + ("" if profiles else "; there are none")
        raise CommandError(msg, f"{there}make it with: shpool config set NAME VALUE --profile {shlex.quote(name)}")
    return SHConfig(profile)


def _session(options: LoginOptions, config: SHConfig, client_id: str, secret: str) -> OAuthSession:
    from shpool.session import OAuthSession, SentinelHubSession

    if options.token_url is not None:
        return OAuthSession(
            options.token_url,
            client_id,
            secret,
            scope=options.scope,
            timeout=_TIMEOUT,
        )
    config.sh_client_id, config.sh_client_secret = client_id, secret
    config.download_timeout_seconds = min(config.download_timeout_seconds, _TIMEOUT[1])
    return SentinelHubSession(config)


def log_in_patiently(session: OAuthSession, attempt: Callable[[], _T]) -> _T:
    """Make the first login, and again after a short wait where that may help.

    Args:
        session: What logs in. After a failure it is asked alone first: workers are not started in vain.
        attempt: Does what needs the login, by one request of the session at most.

    Raises:
        LoginError: The last attempt's; within about 15 s, however the endpoint behaves.
    """
    from shpool.retry import Backoff, is_retryable

    give_up = time.monotonic() + _PATIENCE
    delays = Backoff(base=1.0, cap=2.0).delays()
    has_failed = False
    while True:
        try:
            if has_failed:
                session.renew()
            return attempt()
        except LoginError as error:
            has_failed = True
            wait = max(error.retry_after or 0.0, next(delays))
            if not is_retryable(error) or time.monotonic() + wait > give_up:
                raise
        time.sleep(wait)


def _secret(path: Path | None, config: SHConfig, client_id: str, *, may_prompt: bool) -> str:
    if path is not None:
        return read_secret(path)
    if config.sh_client_secret:
        return config.sh_client_secret
    if may_prompt and is_interactive():
        secret = ask_secret(f"Client secret of {client_id}: ")
        if secret:
            return secret
    hint = "set SH_CLIENT_SECRET, give --client-secret-file, or run: shpool config set sh_client_secret"
    msg = f"there is no client secret for {client_id}"
    raise CommandError(msg, hint, ExitCode.LOGIN)


def ask_secret(prompt: str) -> str:
    """Ask for a secret without showing it; nothing, or ^D, is empty text."""
    try:
        return getpass.getpass(prompt, stream=sys.stderr)
    except EOFError:
        say("")  # ends the prompt's line
        return ""


def read_secret(path: Path) -> str:
    """Return the text of a file without the line end that editors add.

    Raises:
        CommandError: It cannot be read, or is empty.
    """
    try:
        secret = path.read_text(encoding="utf-8").strip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8"
        msg = f"cannot read the secret from {path}: {reason}"
        raise CommandError(msg, "give a file that holds it") from None
    if not secret:
        msg = f"{path} holds no secret"
        raise CommandError(msg, "write the client secret into it, on one line")
    return secret


def is_interactive() -> bool:
    """Tell whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
