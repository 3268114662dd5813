"""Shell commands as jobs, in a pool that has a token."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from test_command import assert_gone, pids_in

from shpool import AuthenticatedProcessPool, OAuthSession
from shpool.batch import run_batch
from shpool.errors import InputError, NoSessionError, ShellJobError, ShellTimeoutError, TaskTimeoutError
from shpool.jobs import make_jobs
from shpool.redaction import SECRET_VARIABLES
from shpool.retry import is_retryable
from shpool.shell import ShellCall, ShellResult
from shpool.testing import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOREVER = "echo $$ >{pids}; sleep 1000 & echo $! >>{pids}; sleep 1000"


@pytest.fixture(scope="module")
def session() -> Iterator[OAuthSession]:
    with LoopbackServer() as server:
        yield OAuthSession(server.token_url, server.client_id, server.client_secret)


@pytest.fixture(scope="module")
def inline(session: OAuthSession) -> Iterator[AuthenticatedProcessPool]:
    with AuthenticatedProcessPool(session, engine="inline") as pool:
        yield pool


def run(pool: AuthenticatedProcessPool, call: ShellCall, *args: Any, **kwargs: Any) -> ShellResult:
    return pool.submit(call, *args, **kwargs).result()


def test_a_job_gives_what_its_command_says(inline: AuthenticatedProcessPool) -> None:
    call = ShellCall("echo {name}.tif; echo {0} >&2")
    assert run(inline, call, "it's", name="a b") == ShellResult("a b.tif\n", "it's\n")


def test_the_token_is_in_the_environment_and_nowhere_else(
    inline: AuthenticatedProcessPool, session: OAuthSession, tmp_path: Path
) -> None:
    path = tmp_path / "seen"
    call = ShellCall('printf %s "$SHPOOL_TOKEN" >{0}; tr "\\0" " " </proc/$$/cmdline; cat /proc/$PPID/cmdline')
    said = run(inline, call, path)
    token = session.token["access_token"]
    assert path.read_text() == token
    assert token not in said.stdout


def test_secret_variables_are_not_inherited(inline: AuthenticatedProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRET_VARIABLES:
        monkeypatch.setenv(name, "invented-secret")
    assert "invented-secret" not in run(inline, ShellCall("env; tr '\\0' '\\n' </proc/$$/environ")).stdout


def test_a_failure_says_what_failed_and_how(inline: AuthenticatedProcessPool) -> None:
    with pytest.raises(ShellJobError) as caught:
        run(inline, ShellCall("echo one >&2; echo no such tile >&2; exit {0}"), 4)
    assert (caught.value.status, caught.value.stderr) == (4, "one\nno such tile\n")
    assert "exit '4'] ended with exit status 4: one | no such tile; " in str(caught.value)


def test_a_failure_keeps_what_was_said_within_the_limit(inline: AuthenticatedProcessPool) -> None:
    with pytest.raises(ShellJobError) as caught:
        run(inline, ShellCall("echo half done; yes | head -c 5000 >&2; kill -s SEGV $$", kept_output=1000))
    output = pickle.loads(pickle.dumps(caught.value)).output
    assert output["stdout"] == "half done\n"
    assert "[4000 bytes dropped]" in output["stderr"]
    assert (output["dropped"], output["exit_status"], output["signal"]) == (4000, None, "SIGSEGV")


def test_an_error_holds_no_token(inline: AuthenticatedProcessPool, session: OAuthSession) -> None:
    with pytest.raises(ShellJobError) as caught:
        run(inline, ShellCall("set -x; echo {0} $SHPOOL_TOKEN >&2; false"), session.token["access_token"])
    assert session.token["access_token"].encode() not in pickle.dumps(caught.value)


@pytest.mark.slow
def test_a_late_command_is_worth_another_try_and_an_error_is_not(inline: AuthenticatedProcessPool) -> None:
    with pytest.raises(ShellTimeoutError, match=r"ran longer than 0.3 s and was stopped: begun; raise") as late:
        run(inline, ShellCall("echo begun >&2; sleep 1000", timeout=0.3))
    assert is_retryable(late.value)
    assert not is_retryable(ShellJobError("false", 1))


def test_outside_of_a_session_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(NoSessionError):
        ShellCall("touch {0}")(tmp_path / "mark")
    assert not (tmp_path / "mark").exists()


def test_long_outputs_are_cut_and_the_result_says_so(inline: AuthenticatedProcessPool) -> None:
    said = run(inline, ShellCall("yes | head -c 5000; echo >&2", kept_output=1000))
    assert said.dropped == 4000
    assert "[4000 bytes dropped]" in said.stdout


@pytest.mark.parametrize("call", [ShellCall("echo {0}"), ShellCall("echo a", timeout=2.0, kept_output=7)])
def test_a_call_survives_a_pickle(call: ShellCall) -> None:
    arrived = pickle.loads(pickle.dumps(call))
    assert vars(arrived) == vars(call)
    assert str(arrived) == f"sh:{call.template}"


def test_a_command_too_long_for_the_system_is_refused() -> None:
    with pytest.raises(InputError, match="by way of a file"):
        ShellCall("echo {0}").command("x" * 140_000)


def test_an_environment_too_large_for_the_system_is_told(
    inline: AuthenticatedProcessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOO_LARGE", "x" * 140_000)
    with pytest.raises(InputError, match="make the environment smaller"):
        run(inline, ShellCall("true"))


def test_fields_are_checked_before_anything_runs() -> None:
    call = ShellCall("echo {url} {0}")
    call.check_fields(1, ["url", "more"])
    with pytest.raises(InputError, match=r"no field \{url\}; there are \{0\}, \{name\}"):
        call.check_fields(1, ["name"])


def test_the_shell_checks_the_syntax_without_running_it(tmp_path: Path) -> None:
    ShellCall(f"if true; then touch {tmp_path}/mark; fi; echo {{0}}").check_syntax()
    assert not (tmp_path / "mark").exists()
    with pytest.raises(InputError, match=r"the shell cannot read it: .*[Ss]yntax error"):
        ShellCall("if true; then echo {0}").check_syntax()


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": -1.0}, {"kept_output": -1}])
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        ShellCall("true", **options)


@pytest.mark.slow
def test_a_batch_of_commands_runs_in_workers(session: OAuthSession) -> None:
    jobs = list(make_jobs("sh", [((), {"name": f"tile {n}"}) for n in range(6)]))
    with AuthenticatedProcessPool(session, 2) as pool:
        results = sorted(run_batch(pool, ShellCall("echo {name}"), jobs), key=lambda result: result.index)
    assert [result.result.stdout for result in results] == [f"tile {n}\n" for n in range(6)]


@pytest.mark.slow
def test_the_pools_own_timeout_ends_all_a_command_has_started(session: OAuthSession, tmp_path: Path) -> None:
    with AuthenticatedProcessPool(session, 1) as pool:
        late = pool.options(timeout=1.0).submit(ShellCall(FOREVER.format(pids=tmp_path / "pids")))
        with pytest.raises(TaskTimeoutError):
            late.result()
        assert_gone(pids_in(tmp_path / "pids", 2))


@pytest.mark.slow
def test_a_terminated_pool_leaves_no_command(session: OAuthSession, tmp_path: Path) -> None:
    with AuthenticatedProcessPool(session, 1) as pool:
        pool.submit(ShellCall(FOREVER.format(pids=tmp_path / "pids")))
        pids = pids_in(tmp_path / "pids", 2)
        pool.terminate()
    assert_gone(pids)


def test_a_result_has_a_json_form() -> None:
    from shpool_cli.output.jsonform import to_json

    said = {"stdout": "a", "stderr": "b", "dropped": 0, "exit_status": 0, "signal": None}
    assert json.loads(to_json(ShellResult("a", "b"))) == said
