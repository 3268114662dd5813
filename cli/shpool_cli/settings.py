"""`shpool config`: where the configuration is, what it says, and how to change it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shpool_cli.console import CommandError, say
from shpool_cli.credentials import ProfileOption, ask_secret, is_interactive, read_config, read_secret

if TYPE_CHECKING:
    from shpool.config import SHConfig

app = typer.Typer(help="Show or change the configuration.")

# Their values stand in no command line: other users can read it, and the shell remembers it.
_SECRETS = frozenset({"sh_client_secret", "aws_secret_access_key", "aws_session_token"})

SecretSource = Annotated[
    Path | None, typer.Option("--from-file", help="File that holds the value; the way for secrets without a terminal.")
]


@app.command()
def path() -> None:
    """Print the path of the configuration file, whether it exists or not."""
    from shpool.config import SHConfig

    typer.echo(SHConfig.get_config_location())


@app.command()
def show(profile: ProfileOption = None) -> None:
    """Print the settings in effect, those of the environment included; secrets are masked."""
    for name, value in read_config(profile).to_dict(mask_credentials=True).items():
        typer.echo(f"{name} = {json.dumps(value)}")


@app.command("set")
def set_(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A setting, as `shpool config show` lists them.")],
    value: Annotated[
        str | None, typer.Argument(metavar="VALUE", help="Its value; a secret is asked for instead.")
    ] = None,
    *,
    profile: ProfileOption = None,
    from_file: SecretSource = None,
) -> None:
    """Write one setting into the configuration file; the rest of the file stays as it is."""
    from shpool.config import SHConfig

    if name not in SHConfig(use_defaults=True).to_dict():
        msg = f"there is no setting {name}"
        raise CommandError(msg, "shpool config show lists them")
    text = _value(name, value, from_file)
    config = _saved(profile)
    setattr(config, name, _typed(name, text, config))
    config.save(profile)
    say(f"wrote {name} to {SHConfig.get_config_location()}")


def _value(name: str, value: str | None, from_file: Path | None) -> str:
    if value is not None and name in _SECRETS:
        msg = f"{name} is a secret, and other users can read a command line"
        raise CommandError(msg, f"run: shpool config set {name}, which asks for it; or add --from-file FILE")
    if value is not None and from_file is not None:
        msg = "VALUE and --from-file exclude each other"
        raise CommandError(msg, "give one of them")
    if value is not None:
        return value
    if from_file is not None:
        return read_secret(from_file)
    if name in _SECRETS and is_interactive():
        secret = ask_secret(f"{name}: ")
        if secret:
            return secret
        msg = f"no {name} was given, so nothing was changed"
        raise CommandError(msg, "give it when asked; to remove the stored one, edit the file shpool config path names")
    msg = f"there is no value for {name}"
    raise CommandError(msg, "add it on a terminal, or with --from-file FILE" if name in _SECRETS else "add VALUE")


def _saved(profile: str | None) -> SHConfig:
    """Return a profile as the file has it, or the defaults for a new one; never what the environment says."""
    from shpool.config import DEFAULT_PROFILE, SHConfig
    from shpool.configfile import read_profiles

    name = profile or os.environ.get("SH_PROFILE") or DEFAULT_PROFILE
    is_there = name in read_profiles(Path(SHConfig.get_config_location()))
    return SHConfig.load(name) if is_there else SHConfig(use_defaults=True)


def _typed(name: str, text: str, config: SHConfig) -> str | int | float:
    """Read the value as what the setting holds."""
    kind = int if name == "max_retries" else type(getattr(config, name))
    if kind not in {int, float}:
        return text
    try:
        number: int | float = kind(text)
    except ValueError:
        msg = f"{name} is a number, got {text!r}"
        raise CommandError(msg, "give digits") from None
    return number
