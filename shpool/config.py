"""Settings: the file, profiles and environment variables that users of sentinelhub-py already have.

The names, defaults and location are theirs; so a file written by either package is read by both.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shpool.configfile import read_profiles, warn_if_open, write_profile
from shpool.errors import ConfigError, SHUserWarning
from shpool.redaction import MASK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

DEFAULT_PROFILE = "default-profile"

PRESETS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "sentinelhub": {
            "sh_base_url": "https://services.sentinel-hub.com",
            "sh_token_url": "https://services.sentinel-hub.com/auth/realms/main/protocol/openid-connect/token",
        },
        "cdse": {  # the Copernicus Data Space Ecosystem
            "sh_base_url": "https://sh.dataspace.copernicus.eu",
            "sh_token_url": ("https://identity.dataspace.copernicus.eu/auth/realms/CDSE/protocol/openid-connect/token"),
        },
    }
)

_VARIABLES = {"sh_client_id": "SH_CLIENT_ID", "sh_client_secret": "SH_CLIENT_SECRET"}
_SECRETS = ("sh_client_secret", "aws_secret_access_key", "aws_session_token")
_NAMES = ("instance_id", "sh_client_id", "aws_access_key_id")  # credentials too, yet their end may be shown
_SHOWN = 4  # characters of such a name that stay readable


@dataclass(init=False, repr=False)
class SHConfig:
    """Settings of Sentinel Hub, of the Copernicus Data Space, and of downloads.

    What is passed wins over the environment (``SH_CLIENT_ID``, ``SH_CLIENT_SECRET``), which wins over the profile in
    the file, which wins over the defaults. Reading never creates the file.

    Args:
        profile: Table of the file to read; None takes ``SH_PROFILE`` of the environment, else ``default-profile``.
        use_defaults: Read neither file nor environment.
        **fields: Values for any of the fields.

    Raises:
        TypeError: A field does not exist, or its value is of another type.
        ConfigError: The file cannot be read, or has no such profile.

    >>> SHConfig(use_defaults=True).max_download_attempts
    4
    """

    instance_id: str = ""
    sh_client_id: str = ""
    sh_client_secret: str = ""
    sh_base_url: str = PRESETS["sentinelhub"]["sh_base_url"]
    sh_auth_base_url: str | None = None
    sh_token_url: str = PRESETS["sentinelhub"]["sh_token_url"]
    geopedia_wms_url: str = "https://service.geopedia.world"
    geopedia_rest_url: str = "https://www.geopedia.world/rest"
    aws_access_key_id: str = ""
    aws_secret_access_key: str = ""
    aws_session_token: str = ""
    aws_metadata_url: str = "https://roda.sentinel-hub.com"
    aws_s3_l1c_bucket: str = "sentinel-s2-l1c"
    aws_s3_l2a_bucket: str = "sentinel-s2-l2a"
    opensearch_url: str = "http://opensearch.sentinel-hub.com/resto/api/collections/Sentinel2"
    max_wfs_records_per_query: int = 100
    max_opensearch_records_per_query: int = 500
    max_download_attempts: int = 4
    download_sleep_time: float = 5.0  # s, before the second attempt
    download_timeout_seconds: float = 120.0  # s
    number_of_download_processes: int = 1
    max_retries: int | None = None

    def __init__(self, profile: str | None = None, *, use_defaults: bool = False, **fields: Any) -> None:  # noqa: ANN401 - each field has its own type, checked below
        for name, value in fields.items():
            _check_field(name, value)
        known = {} if use_defaults else {**_read_profile(profile), **_environment()}
        for name, value in {**_DEFAULTS, **known, **fields}.items():
            setattr(self, name, value)
        if self.sh_auth_base_url is not None:  # what sh_token_url was called before sentinelhub-py 3.10
            self.sh_token_url = f"{self.sh_auth_base_url}/oauth/token"
            self.sh_auth_base_url = None
            msg = f"sh_auth_base_url is outdated; set sh_token_url = {self.sh_token_url!r} instead"
            warnings.warn(msg, SHUserWarning, stacklevel=2)

    @classmethod
    def preset(cls, name: str, **fields: Any) -> Self:  # noqa: ANN401 - as in __init__
        """Return the settings of a provider, with credentials of the environment; the file is not read.

        Args:
            name: ``sentinelhub`` or ``cdse``.
            **fields: Values for any other fields.

        Raises:
            ValueError: No preset has that name.
        """
        if name not in PRESETS:
            msg = f"no preset {name!r}; there are {', '.join(PRESETS)}"
            raise ValueError(msg)
        return cls(use_defaults=True, **{**PRESETS[name], **_environment(), **fields})

    @classmethod
    def load(cls, profile: str | None = None) -> Self:
        """Return the settings of a profile as the file has them, the environment's credentials left out.

        Raises:
            ConfigError: The file cannot be read, or has no such profile.
        """
        return cls(use_defaults=True, **_read_profile(profile))

    def save(self, profile: str | None = None) -> None:
        """Write what differs from the defaults into a profile of the file; the rest of the file stays as it is.

        The file is replaced in one step and readable by its owner only.

        Args:
            profile: Table of the file; None as for the constructor.

        Raises:
            ConfigError: The present file cannot be read.
        """
        values = {key: value for key, value in self._values().items() if value != _DEFAULTS[key]}
        write_profile(Path(self.get_config_location()), _profile_name(profile), values, known=frozenset(_DEFAULTS))

    @classmethod
    def get_config_location(cls) -> str:
        """Return the path of the user's configuration file, whether it exists or not."""
        folder = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
        return str(Path(folder, "sentinelhub", "config.toml"))

    def copy(self) -> Self:
        """Return an independent copy."""
        return type(self)(use_defaults=True, **self._values())

    def to_dict(self, mask_credentials: bool = True) -> dict[str, Any]:  # noqa: FBT001, FBT002 - the signature of sentinelhub-py
        """Return the settings as a dictionary.

        Args:
            mask_credentials: Hide secrets, and all but the end of identifiers.
        """
        values = self._values()
        if mask_credentials:
            values |= {name: MASK for name in _SECRETS if values[name]}
            values |= {name: _mask_name(values[name]) for name in _NAMES}
        return values

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _DEFAULTS}

    def __str__(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __repr__(self) -> str:
        changed = {name: value for name, value in self.to_dict().items() if value != _DEFAULTS[name]}
        return f"SHConfig({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self.copy()

    def __reduce__(self) -> tuple[object, ...]:
        if any(getattr(self, name) for name in _SECRETS):
            msg = "a configuration with a secret does not leave its process; workers call current_session() instead"
            raise TypeError(msg)
        return _unpickled, (self._values(),)


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in dataclasses.fields(SHConfig)}


def _unpickled(values: dict[str, Any]) -> SHConfig:
    return SHConfig(use_defaults=True, **values)


def _check_field(name: str, value: object) -> None:
    if name not in _DEFAULTS:
        close = difflib.get_close_matches(name, _DEFAULTS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_DEFAULTS)}"
        msg = f"SHConfig has no field {name!r}; {hint}"
        raise TypeError(msg)
    default = _DEFAULTS[name]
    kinds: dict[type, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float)}
    optional = {"sh_auth_base_url": (str, type(None)), "max_retries": (int, type(None))}
    wanted = optional.get(name) or kinds[type(default)]
    if not isinstance(value, wanted) or isinstance(value, bool):
        shown = "" if name in _SECRETS else f" {value!r}"
        kinds_wanted = " or ".join(kind.__name__ for kind in wanted)
        msg = f"field {name} of SHConfig is {kinds_wanted}, got {type(value).__name__}{shown}"
        raise TypeError(msg)


def _mask_name(value: str) -> str:
    return MASK + value[-_SHOWN:] if len(value) > 2 * _SHOWN else MASK * bool(value)


def _environment() -> dict[str, str]:
    return {name: os.environ[variable] for name, variable in _VARIABLES.items() if variable in os.environ}


def _profile_name(profile: str | None) -> str:
    return profile if profile is not None else os.environ.get("SH_PROFILE") or DEFAULT_PROFILE


def _read_profile(profile: str | None) -> dict[str, Any]:
    path = Path(SHConfig.get_config_location())
    outcome = _find_profile(path, _profile_name(profile))
    if isinstance(outcome, ConfigError):
        raise outcome
    if any(outcome.get(name) for name in _SECRETS):
        warn_if_open(path)
    return outcome


def _find_profile(path: Path, name: str) -> dict[str, Any] | ConfigError:
    """Return the profile, or what is wrong: raised from here, a traceback's frame would hold the secrets."""
    profiles = read_profiles(path)
    if name not in profiles:
        if name == DEFAULT_PROFILE and not profiles:
            return {}
        there = ", ".join(profiles) or "none"
        return ConfigError(str(path), f"no profile {name!r}; there are: {there}; choose one with SH_PROFILE")
    try:
        for key, value in profiles[name].items():
            _check_field(key, value)
    except TypeError as exc:
        return ConfigError(f"{path} [{name}]", str(exc))
    return profiles[name]
