"""Settings: where they come from, what the file looks like afterwards, and that secrets stay in."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import stat
import traceback
from pathlib import Path

import cloudpickle
import pytest

from shpool.config import DEFAULT_PROFILE, PRESETS, SHConfig
from shpool.errors import ConfigError, SHUserWarning

_CANARY = "canary-secret-2209"

# The fields and defaults of sentinelhub-py 3.12.0, whose users already have a file with them.
_ORIGINAL = {
    "instance_id": "",
    "sh_client_id": "",
    "sh_client_secret": "",
    "sh_base_url": "https://services.sentinel-hub.com",
    "sh_auth_base_url": None,
    "sh_token_url": "https://services.sentinel-hub.com/auth/realms/main/protocol/openid-connect/token",
    "geopedia_wms_url": "https://service.geopedia.world",
    "geopedia_rest_url": "https://www.geopedia.world/rest",
    "aws_access_key_id": "",
    "aws_secret_access_key": "",
    "aws_session_token": "",
    "aws_metadata_url": "https://roda.sentinel-hub.com",
    "aws_s3_l1c_bucket": "sentinel-s2-l1c",
    "aws_s3_l2a_bucket": "sentinel-s2-l2a",
    "opensearch_url": "http://opensearch.sentinel-hub.com/resto/api/collections/Sentinel2",
    "max_wfs_records_per_query": 100,
    "max_opensearch_records_per_query": 500,
    "max_download_attempts": 4,
    "download_sleep_time": 5.0,
    "download_timeout_seconds": 120.0,
    "number_of_download_processes": 1,
    "max_retries": None,
}


@pytest.fixture
def file() -> Path:
    """Return where the configuration file of this test is to be."""
    return Path(SHConfig.get_config_location())


def write(file: Path, text: str, mode: int = 0o600) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)


def test_fields_and_defaults_are_those_of_sentinelhub() -> None:
    assert SHConfig(use_defaults=True).to_dict(mask_credentials=False) == _ORIGINAL


def test_location_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert SHConfig.get_config_location() == str(tmp_path / "sentinelhub" / "config.toml")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SHConfig.get_config_location() == str(tmp_path / ".config" / "sentinelhub" / "config.toml")


def test_reading_creates_no_file(file: Path) -> None:
    assert SHConfig() == SHConfig(use_defaults=True)
    assert not file.exists()


def test_file_of_sentinelhub_is_read(file: Path) -> None:
    write(file, f'[{DEFAULT_PROFILE}]\nsh_client_id = "me"\ndownload_sleep_time = 2\n[cdse]\nsh_client_id = "you"\n')
    assert SHConfig().sh_client_id == "me"
    assert SHConfig().download_sleep_time == 2
    assert SHConfig("cdse").sh_client_id == "you"


def test_profile_of_the_environment_is_taken_unless_one_is_passed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, '[a]\nsh_client_id = "one"\n[b]\nsh_client_id = "two"\n')
    monkeypatch.setenv("SH_PROFILE", "a")
    assert SHConfig().sh_client_id == "one"
    assert SHConfig("b").sh_client_id == "two"


def test_argument_beats_environment_beats_file_beats_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, f'[{DEFAULT_PROFILE}]\nsh_client_id = "file"\nsh_client_secret = "file"\ninstance_id = "file"\n')
    monkeypatch.setenv("SH_CLIENT_ID", "environment")
    monkeypatch.setenv("SH_CLIENT_SECRET", "environment")
    config = SHConfig(sh_client_secret="argument")
    assert (config.sh_client_secret, config.sh_client_id, config.instance_id) == ("argument", "environment", "file")
    assert SHConfig(use_defaults=True).sh_client_id == ""
    assert SHConfig.load().sh_client_id == "file"


def test_unknown_field_names_the_close_match() -> None:
    with pytest.raises(TypeError, match="did you mean sh_client_id"):
        SHConfig(use_defaults=True, sh_clent_id="me")


def test_value_of_another_type_is_refused_and_a_secret_not_shown() -> None:
    with pytest.raises(TypeError, match="max_download_attempts of SHConfig is int, got str 'four'"):
        SHConfig(use_defaults=True, max_download_attempts="four")
    with pytest.raises(TypeError) as caught:
        SHConfig(use_defaults=True, sh_client_secret=[_CANARY])
    assert _CANARY not in str(caught.value)


def test_unknown_field_in_the_file_names_file_and_profile(file: Path) -> None:
    write(file, f'[{DEFAULT_PROFILE}]\nsh_clent_id = "me"\n')
    with pytest.raises(ConfigError, match="did you mean sh_client_id") as caught:
        SHConfig()
    assert str(file) in str(caught.value)
    assert DEFAULT_PROFILE in str(caught.value)


def test_unknown_profile_lists_what_there_is(file: Path) -> None:
    write(file, '[a]\nsh_client_id = "one"\n[b]\n')
    with pytest.raises(ConfigError, match="no profile 'c'; there are: a, b"):
        SHConfig("c")
    with pytest.raises(ConfigError, match=f"no profile '{DEFAULT_PROFILE}'"):
        SHConfig()


def test_named_profile_without_a_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match="there are: none"):
        SHConfig("cdse")


@pytest.mark.parametrize(
    ("text", "words"),
    [("[a]\nx = = 1\n", "line 2"), ("[a\n", "line 1"), ('sh_client_id = "me"\n', "outside of any")],
)
def test_broken_file_is_an_error_that_says_where(file: Path, text: str, words: str) -> None:
    write(file, text)
    for touch in (SHConfig, SHConfig(use_defaults=True).save):
        with pytest.raises(ConfigError, match=words):
            touch()
    assert file.read_text() == text


def test_bytes_that_are_not_utf8_are_an_error(file: Path) -> None:
    write(file, "")
    file.write_bytes(b"[a]\nx = '\xff'\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        SHConfig()


def test_folder_in_place_of_the_file_is_an_error(file: Path) -> None:
    file.mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        SHConfig()


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_save_makes_a_private_file_whatever_the_umask(file: Path) -> None:
    before = os.umask(0)
    try:
        SHConfig(use_defaults=True, sh_client_secret="invented").save()
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in file.parent.iterdir()] == ["config.toml"]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_save_tightens_a_wider_mode(file: Path) -> None:
    write(file, "[a]\n", mode=0o644)
    SHConfig(use_defaults=True, sh_client_secret="invented").save("a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_saved_profile_is_read_back(file: Path) -> None:
    config = SHConfig(use_defaults=True, sh_client_id="me", sh_client_secret='tricky "\\ é', max_retries=3)
    config.save("mine")
    assert SHConfig("mine") == config
    assert "max_download_attempts" not in file.read_text()


def test_save_keeps_comments_and_other_profiles(file: Path) -> None:
    write(file, '# mine\n[a]\n# why\nsh_client_id = "old"\ninstance_id = "gone"\n\n[b]\nsh_client_id = "b"  # stays\n')
    SHConfig(use_defaults=True, sh_client_id="new").save("a")
    assert file.read_text() == '# mine\n[a]\n# why\nsh_client_id = "new"\n\n[b]\nsh_client_id = "b"  # stays\n'


def test_save_follows_a_link(file: Path, tmp_path: Path) -> None:
    """Dotfiles kept elsewhere stay linked."""
    target = tmp_path / "dotfiles.toml"
    target.write_text("[a]\n")
    file.parent.mkdir(parents=True)
    file.symlink_to(target)
    SHConfig(use_defaults=True, sh_client_id="me").save("a")
    assert file.is_symlink()
    assert "me" in target.read_text()


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_open_file_with_a_secret_is_warned_of(file: Path) -> None:
    write(file, f'[{DEFAULT_PROFILE}]\nsh_client_secret = "invented"\n', mode=0o644)
    with pytest.warns(SHUserWarning, match="chmod 600") as caught:
        SHConfig()
    assert len(caught) == 1


def test_open_file_without_a_secret_is_nobodys_business(file: Path) -> None:
    write(file, f'[{DEFAULT_PROFILE}]\nsh_client_id = "me"\n', mode=0o644)
    assert SHConfig().sh_client_id == "me"


@pytest.mark.parametrize("name", ["sentinelhub", "cdse"])
def test_preset_sets_both_addresses_and_takes_credentials_of_the_environment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SH_CLIENT_ID", "environment")
    config = SHConfig.preset(name, sh_client_secret="argument")
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]
    assert (config.sh_client_id, config.sh_client_secret) == ("environment", "argument")


def test_unknown_preset_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match="there are sentinelhub, cdse"):
        SHConfig.preset("creodias")


def test_outdated_field_is_translated() -> None:
    with pytest.warns(SHUserWarning, match="set sh_token_url"):
        config = SHConfig(use_defaults=True, sh_auth_base_url="https://idp.example")
    assert config.sh_token_url == "https://idp.example/oauth/token"
    assert config.sh_auth_base_url is None


def test_credentials_are_masked_everywhere() -> None:
    config = SHConfig(
        use_defaults=True,
        sh_client_id="11112222-canary-id",
        sh_client_secret=_CANARY,
        aws_secret_access_key=_CANARY,
        aws_session_token=_CANARY,
    )
    for shown in (repr(config), str(config), f"{config}", str(config.to_dict())):
        assert _CANARY not in shown
        assert "11112222" not in shown
    assert config.to_dict()["sh_client_secret"] == "***"
    assert config.to_dict()["sh_client_id"] == "***y-id"
    assert config.to_dict(mask_credentials=False)["sh_client_secret"] == _CANARY


def test_short_identifier_is_masked_whole() -> None:
    assert SHConfig(use_defaults=True, sh_client_id="12345678").to_dict()["sh_client_id"] == "***"
    assert SHConfig(use_defaults=True).to_dict()["sh_client_id"] == ""


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_configuration_with_a_secret_refuses_to_travel(dumps: object) -> None:
    with pytest.raises(TypeError, match="current_session"):
        dumps(SHConfig(use_defaults=True, sh_client_secret=_CANARY))  # type: ignore[operator]  # both take an object


def test_configuration_without_a_secret_travels() -> None:
    config = SHConfig(use_defaults=True, sh_client_id="me")
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("make", [SHConfig.copy, copy.copy, copy.deepcopy, dataclasses.replace])
def test_copies_are_independent_and_whole(make: object) -> None:
    config = SHConfig(use_defaults=True, sh_client_secret="invented")
    clone = make(config)  # type: ignore[operator]  # every one of them takes a configuration
    clone.sh_client_id = "other"
    assert clone.sh_client_secret == "invented"
    assert config.sh_client_id == ""


@pytest.mark.parametrize(
    "text", [f'[a]\nsh_client_secret = "{_CANARY}"\nx = = 1\n', f'[a]\nsh_client_secret = "{_CANARY}"\nwhat = 1\n']
)
def test_errors_about_the_file_do_not_show_its_secrets(file: Path, text: str) -> None:
    """Crash reporters record the local variables of every frame of a traceback."""
    write(file, text)
    for profile in ("a", "missing"):
        with pytest.raises(ConfigError) as caught:
            SHConfig(profile)
        assert caught.tb is not None
        shown = traceback.TracebackException(
            type(caught.value),
            caught.value,
            caught.tb.tb_next,
            capture_locals=True,  # without the frame of this test
        )
        assert _CANARY not in "".join(shown.format())
