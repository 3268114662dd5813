"""`shpool token`, `shpool config`, and what every command has in common."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from cli_shell import PATIENCE, Shell, assert_told
from patience import NEVER

from shpool.testing import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

SECRET = "invented-secret-for-tests"


@pytest.fixture
def shell(tmp_path: Path, child_env: dict[str, str]) -> Shell:
    return Shell(tmp_path, child_env)


@pytest.fixture
def opaque_server() -> Iterator[LoopbackServer]:
    with LoopbackServer(jwt=False) as server:
        yield server


def config_file(shell: Shell) -> Path:
    return Path(shell.env["XDG_CONFIG_HOME"], "sentinelhub", "config.toml")


def test_token_shows_claims_but_not_the_token(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run("token", *shell.log_in_at(server))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert lines["scope"].strip() == "not told"
    assert list(lines) == ["issuer", "client", "scope", "expires", "claims"]
    assert json.loads(lines["claims"])["iss"] == lines["issuer"].strip()
    assert lines["client"].strip() == server.client_id
    assert "UTC, in 3" in lines["expires"]
    assert "eyJ" not in done.stdout + done.stderr


def test_token_shows_itself_when_asked(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run("token", "--show", *shell.log_in_at(server))
    assert done.stdout.splitlines()[-1].startswith("token:   eyJ")


def test_an_opaque_token_has_no_claims(shell: Shell, opaque_server: LoopbackServer) -> None:
    done = shell.run("token", *shell.log_in_at(opaque_server))
    assert done.returncode == 0
    assert "claims:  none: the token is opaque" in done.stdout


def test_token_without_credentials_exits_3(shell: Shell) -> None:
    assert_told(shell.run("token"), 3, "no client id")


def test_token_with_wrong_credentials_exits_3(shell: Shell, server: LoopbackServer) -> None:
    options = shell.log_in_at(server)
    shell.env["SH_CLIENT_SECRET"] = SECRET
    done = shell.run("token", *options)
    assert_told(done, 3, "invalid_client")
    assert SECRET not in done.stderr


def test_token_from_a_silent_endpoint_exits_3(shell: Shell, server: LoopbackServer) -> None:
    options = shell.log_in_at(server)
    server.hang()
    endpoint, connections = server._endpoints["token"], []
    add = endpoint.add

    def note(connection: Any) -> None:
        connections.append(connection)
        add(connection)

    endpoint.add = note  # type: ignore[method-assign]  # requests without an answer are counted nowhere else
    assert_told(shell.run("token", *options), 3, server.token_url)
    assert len(connections) == 1, "no second attempt after one that took so long"


def test_a_token_url_without_tls_is_bad_usage(shell: Shell, server: LoopbackServer) -> None:
    shell.log_in_at(server)
    assert_told(shell.run("token", "--token-url", "http://example.org/token"), 2, "https")


def test_an_empty_client_id_is_not_replaced_by_another(shell: Shell) -> None:
    shell.env["SH_CLIENT_ID"] = "invented"
    assert_told(shell.run("token", "--client-id", ""), 2, "--client-id is empty")


def test_a_profile_where_there_are_none_is_not_to_be_chosen(shell: Shell) -> None:
    for command in (["config", "show"], ["token"]):
        done = shell.run(*command, "--profile", "nope")
        assert_told(done, 2, "no profile 'nope'", "shpool config set NAME VALUE --profile nope")
        assert "SH_PROFILE" not in done.stderr


@pytest.mark.parametrize(
    "command", [["token"], ["config", "show"], ["config", "set", "max_retries", "3"]], ids=" ".join
)
def test_an_empty_profile_is_not_replaced_by_another(shell: Shell, command: list[str]) -> None:
    assert_told(shell.run(*command, "--profile", ""), 2, "--profile is empty", "leave --profile out")
    assert not config_file(shell).exists()


def test_a_profile_in_a_hint_is_quoted_for_the_shell(shell: Shell) -> None:
    assert_told(shell.run("token", "--profile", "a b"), 2, "shpool config set NAME VALUE --profile 'a b'")


def test_a_profile_that_is_not_there_is_answered_with_those_that_are(shell: Shell) -> None:
    for name in ("mine", "theirs"):
        assert shell.run("config", "set", "max_retries", "3", "--profile", name).returncode == 0
    done = shell.run("token", "--profile", "nope")
    assert_told(
        done, 2, "no profile 'nope'", "hint: choose one of mine, theirs with --profile or SH_PROFILE, or make it"
    )


def test_scope_needs_a_token_url(shell: Shell) -> None:
    assert_told(shell.run("token", "--scope", "read"), 2, "--token-url")


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), (b"", "holds no secret"), (b"caf\xe9", "not UTF-8")]
)
def test_a_secret_file_that_will_not_do_is_named(shell: Shell, content: bytes | None, words: str) -> None:
    if content is not None:
        (shell.folder / "secret").write_bytes(content)
    done = shell.run("token", "--client-id", "invented", "--client-secret-file", "secret")
    assert_told(done, 2, "secret", words)


def test_settings_are_written_read_and_used(shell: Shell, server: LoopbackServer) -> None:
    shell.write("secret", f"{server.client_secret}\n")
    assert shell.run("config", "set", "sh_client_id", server.client_id).returncode == 0
    assert shell.run("config", "set", "sh_token_url", server.token_url).returncode == 0
    assert shell.run("config", "set", "sh_client_secret", "--from-file", "secret").returncode == 0
    path = config_file(shell)
    assert shell.run("config", "path").stdout == f"{path}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    shown = shell.run("config", "show").stdout
    assert f'sh_token_url = "{server.token_url}"' in shown
    assert 'sh_client_secret = "***"' in shown
    assert server.client_secret not in shown
    assert shell.run("token").returncode == 0


def test_a_new_profile_can_be_written_and_chosen(shell: Shell) -> None:
    assert shell.run("config", "set", "max_download_attempts", "7", "--profile", "mine").returncode == 0
    assert "max_download_attempts = 7" in shell.run("config", "show", "--profile", "mine").stdout
    assert_told(shell.run("config", "show", "--profile", "other"), 2, "no profile 'other'", "mine")


def test_the_environment_is_not_written_to_the_file(shell: Shell) -> None:
    shell.env["SH_CLIENT_SECRET"] = SECRET
    assert shell.run("config", "set", "max_retries", "3").returncode == 0
    assert SECRET not in config_file(shell).read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sh_client_secret", SECRET], "is a secret"),
        (["sh_client_secret"], "no value for sh_client_secret"),
        (["sh_client_id"], "no value for sh_client_id"),
        (["sh_client_idd", "x"], "there is no setting sh_client_idd"),
        (["max_download_attempts", "many"], "is a number, got 'many'"),
        (["sh_client_id", "x", "--from-file", "y"], "exclude each other"),
    ],
)
def test_a_setting_that_will_not_do_is_named(shell: Shell, args: list[str], words: str) -> None:
    done = shell.run("config", "set", *args)
    assert_told(done, 2, words)
    assert SECRET not in done.stderr
    assert not config_file(shell).exists()


def test_a_broken_file_is_named_with_its_line(shell: Shell) -> None:
    config_file(shell).parent.mkdir(parents=True)
    config_file(shell).write_text("[default-profile]\nsh_client_id = oops\n")
    for args in (["config", "show"], ["config", "set", "sh_client_id", "x"], ["token"]):
        done = shell.run(*args)
        assert done.returncode == 2
        assert "line 2" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_version_is_printed(shell: Shell) -> None:
    assert shell.run("--version").stdout.startswith("shpool ")


@pytest.mark.parametrize("command", [[], ["run"], ["token"], ["config"], ["config", "set"], ["demo"]])
def test_help_tells_exit_codes_or_options(shell: Shell, command: list[str]) -> None:
    done = shell.run(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: {' '.join(['shpool', *command])} ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "--nonsense"], "--nonsense"),
        (["run"], "TARGET"),
        (["nonsense"], "nonsense"),
        (["run", "a:b", "c", "--workers", "many"], "'--workers' / '-w': 'many' is not a whole number of at least 1"),
        (["demo", "--tiles", "some"], "'some' is not a whole number"),
        (["run", "a:b", "c", "--format", "xml"], "--format"),
    ],
)
def test_bad_usage_is_one_error_and_a_hint(shell: Shell, args: list[str], words: str) -> None:
    assert_told(shell.run(*args), 2, words, "--help")


@pytest.mark.parametrize("command", [["run"], ["config", "show"]], ids=" ".join)
def test_the_hint_names_the_command_that_was_meant(shell: Shell, command: list[str]) -> None:
    for wrong in ("--help=yes", "--profile", "--nonsense"):
        assert_told(shell.run(*command, wrong), 2, f"hint: shpool {' '.join(command)} --help lists")


def test_no_command_is_bad_usage(shell: Shell) -> None:
    done = shell.run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "run" in done.stderr


def test_a_bug_is_reported_without_message_and_locals(shell: Shell) -> None:
    """Whatever a future mistake raises may hold a secret."""
    code = (
        "import shpool_cli.app, shpool_cli.commands\n"
        "@shpool_cli.commands.app.command()\n"
        f"def crash():\n    secret = {SECRET!r}\n    raise KeyError(secret)\n"
        "shpool_cli.app.main(['crash'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=shell.env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert_told(done, 1, "unexpected KeyError", "in crash", "report")
    assert SECRET not in done.stderr


def test_what_a_server_says_cannot_steer_the_terminal(shell: Shell, server: LoopbackServer) -> None:
    options = shell.log_in_at(server)
    server.answer_always(400, body={"error": "invalid_scope", "error_description": "\x1b[2Jgone\nhint: run rm -rf"})
    done = shell.run("token", *options)
    assert_told(done, 3, "invalid_scope")
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_during_the_login_ends_at_once(
    shell: Shell, server: LoopbackServer, number: signal.Signals, code: int
) -> None:
    options = shell.log_in_at(server)
    shell.wait_for_logins(NEVER)
    server.hang()
    with shell.start("token", *options) as process:
        deadline = time.monotonic() + PATIENCE
        while not psutil.Process(process.pid).net_connections("tcp"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert stdout == ""
    assert len(stderr.splitlines()) == (1 if number == signal.SIGINT else 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize(
    "body",
    [
        "class Field:\n    def __set_name__(self, *_):\n        strike()\nclass Owner:\n    field = Field()\n",
        "class Gone:\n    def __del__(self):\n        strike()\nGone()\n",
        "import time\nstrike()\ntime.sleep(NEVER)\n",
    ],
    ids=["descriptor", "finalizer", "long"],
)
def test_a_signal_in_an_import_is_heard_as_one(
    shell: Shell, server: LoopbackServer, body: str, number: signal.Signals, code: int
) -> None:
    """There an exception may be printed and forgotten, or become another one."""
    head = f"import signal\nNEVER = {NEVER}\ndef strike():\n    signal.raise_signal({int(number)})\n"
    shell.write("jobs.py", f"{head}{body}def one(n):\n    return n\n")
    shell.write("in.jsonl", "1\n")
    done = shell.run("run", "jobs.py:one", "in.jsonl", *shell.log_in_at(server))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == ("interrupted\n" if number == signal.SIGINT else "")


def test_help_imports_neither_engines_nor_the_http_stack() -> None:
    code = (
        "import sys\n"
        "import shpool_cli.commands\n"
        "heavy = {'requests', 'requests_oauthlib', 'oauthlib', 'loky', 'tqdm', 'rich', 'numpy', 'shpool.pool'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "[]\n"


def test_signals_find_their_handling_before_the_heavy_imports() -> None:
    code = "import sys, shpool_cli.app; print(sorted({'typer', 'shpool', 'json', 'inspect'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "[]\n"


def test_an_interruption_while_the_commands_are_imported_is_one_line(shell: Shell) -> None:
    (shell.folder / "bin" / "typer.py").write_text("raise KeyboardInterrupt\n")
    done = shell.run("--help")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("args", [["config", "show"], ["--help"], ["token"]])
def test_a_reader_that_has_gone_is_no_trouble(shell: Shell, server: LoopbackServer, args: list[str]) -> None:
    """As in ``shpool config show | head -1``."""
    options = shell.log_in_at(server) if args == ["token"] else []
    # The reader is gone before the command begins; the last command of the pipe line gives its exit code on.
    done = shell.sh('{ sleep 0.2; "$@"; echo $? >code; } | true', *args, *options)
    deadline = time.monotonic() + PATIENCE
    while not (shell.folder / "code").exists() or not (shell.folder / "code").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (shell.folder / "code").read_text() == "0\n"
    assert done.stderr == ""


@pytest.mark.parametrize("args", [["config", "show"], ["--help"], ["--version"], ["token"]])
def test_a_full_disk_is_told_once(shell: Shell, server: LoopbackServer, args: list[str]) -> None:
    options = shell.log_in_at(server) if args == ["token"] else []
    done = shell.sh('"$@" >/dev/full', *args, *options)
    assert_told(done, 1, "standard output cannot be written: No space left on device")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_no_trouble(shell: Shell, server: LoopbackServer, closed: str) -> None:
    done = shell.sh(f'"$@" {closed}', "token", *shell.log_in_at(server))
    assert (done.returncode, done.stderr) == (0, "")
    assert server.logins == 1


def test_a_configuration_that_cannot_be_written_is_named(shell: Shell) -> None:
    shell.env["XDG_CONFIG_HOME"] = "/proc/nowhere"
    done = shell.run("config", "set", "instance_id", "x")
    assert_told(done, 2, "/proc/nowhere/sentinelhub/config.toml: cannot be written: ")


def answer(shell: Shell, keys: bytes, *args: str) -> tuple[int, str]:
    """Run a command on a terminal, press the keys when it asks, and return its exit code and what it said."""
    ours, theirs = pty.openpty()
    said = b""
    with subprocess.Popen(
        shell.command(*args), env=shell.env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        try:
            has_answered = False
            while select.select([ours], [], [], PATIENCE)[0]:
                try:
                    said += os.read(ours, 4096)
                except OSError:  # the other end is closed
                    break
                if b": " in said and not has_answered:
                    os.write(ours, keys)
                    has_answered = True
        finally:
            process.kill()
            os.close(ours)
    return process.returncode, said.decode()


@pytest.mark.parametrize("keys", [b"\x04", b"\n"])
def test_no_answer_for_a_secret_leaves_the_stored_one(shell: Shell, keys: bytes) -> None:
    config_file(shell).parent.mkdir(parents=True)
    config_file(shell).write_text(f'[default-profile]\nsh_client_secret = "{SECRET}"\n')
    config_file(shell).chmod(0o600)
    code, said = answer(shell, keys, "config", "set", "sh_client_secret")
    assert code == 2
    assert "error: no sh_client_secret was given" in said
    assert "hint: " in said
    assert SECRET in config_file(shell).read_text()


@pytest.mark.parametrize("keys", [b"\x04", b"\n"])
def test_no_answer_for_a_secret_is_no_login(shell: Shell, keys: bytes) -> None:
    code, said = answer(shell, keys, "token", "--client-id", "invented")
    assert code == 3
    assert "error: there is no client secret for invented" in said
