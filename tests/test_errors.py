"""Errors travel between processes and say what to do."""

from __future__ import annotations

import copy
import pickle

import cloudpickle
import pytest

from shpool import errors
from shpool.errors import (
    BoardError,
    BoardInUseError,
    BoardLayoutError,
    BoardNotFoundError,
    ClusterError,
    ClusterUnreachableError,
    ConfigError,
    ContentError,
    DownloadError,
    DownloadTimeoutError,
    ForeignBoardError,
    GateInUseError,
    GateUnreachableError,
    GateUnusableError,
    InitializerError,
    InputError,
    InsecureUrlError,
    JournalError,
    JournalFullError,
    JournalInUseError,
    JournalMismatchError,
    JournalNotFoundError,
    LoginError,
    LoginRefusedError,
    MissingExtraError,
    NoSessionError,
    NotAJournalError,
    OpaqueTokenError,
    PartInUseError,
    ShellJobError,
    ShellTimeoutError,
    ShpoolError,
    StorageFullError,
    TargetPathError,
    TaskError,
    TaskTerminatedError,
    TaskTimeoutError,
    TokenResponseError,
    TokenTooLargeError,
    TokenUnavailableError,
    TooManyOpenFilesError,
    TornBoardError,
    TransferError,
    UnpicklableError,
    WorkerLostError,
    WorkerStartError,
)

_URL = "https://idp.example/token"

# One sample of each class, and a piece of its text that tells the reader what to do or where to look.
SAMPLES = [
    (ShpoolError("something broke"), "something broke"),
    (LoginError(_URL, "Service Unavailable", 503, 2.5), "try later"),
    (TokenResponseError(_URL, "access_token is missing"), "check that the URL is a token endpoint"),
    (LoginRefusedError(_URL, "abc", "invalid_client", "no such client", 401), "SH_CLIENT_SECRET"),
    (LoginRefusedError(_URL, "abc", "unauthorized_client"), "client credentials grant"),
    (LoginRefusedError(_URL, "abc", "invalid_scope"), "scopes"),
    (LoginRefusedError(_URL, "abc", "something_new"), "registration"),
    (TokenUnavailableError("it has expired", "HTTP 503"), "HTTP 503"),
    (TokenUnavailableError("sharing has ended"), "sharing has ended"),
    (TokenTooLargeError(70_000, 65_000), "fewer scopes or claims"),
    (OpaqueTokenError("it is opaque"), "introspection"),
    (InsecureUrlError("api.example"), "use https"),
    (NoSessionError(), "collect_shared_session"),
    (BoardError("sh-session-token", "it is full"), "it is full"),
    (BoardNotFoundError("sh-session-token"), "start SessionSharing"),
    (BoardInUseError("sh-session-token", 4711), "choose another name"),
    (ForeignBoardError("sh-session-token", "mode 0666"), "choose another memory_name"),
    (BoardLayoutError("sh-session-token", "version 9"), "same shpool version"),
    (GateUnreachableError("the pool has ended"), "the pool has ended"),
    (GateInUseError("shared", "5 requests/s", "6 requests/s"), "choose another name"),
    (TornBoardError("sh-session-token", "no consistent record"), "no consistent record"),
    (GateUnusableError("account", "8 bytes"), "gate 'account' cannot be used: 8 bytes; choose another name"),
    (TaskError("it was lost"), "it was lost"),
    (WorkerLostError("load('a.tif')", 4711, -9, 2_000_000_000, 2), "fewer workers"),
    (WorkerLostError("load('a.tif')", 4711, 3), "more retries"),
    (TaskTimeoutError("load('a.tif')", 2.0), "raise timeout="),
    (TaskTerminatedError("load('a.tif')"), "submit it again"),
    (UnpicklableError("result", "<lock>", "cannot pickle"), "cannot pickle"),
    (ShellJobError("cp a b", 1, "cp: cannot stat 'a'\n"), "cp: cannot stat 'a'; run it by hand"),
    (ShellJobError("cp a\ncp b", -9), "signal 9 (SIGKILL)"),
    (DownloadTimeoutError("https://a.example/a.tif", 2.0), "it took longer than 2 s; raise the timeout"),
    (ShellTimeoutError("cp a b", 2.0, "at 7 %\nat 8 %"), "was stopped: at 7 % | at 8 %; raise the timeout"),
    (InitializerError("ValueError: no"), "initializer failed"),
    (WorkerStartError("exit code 9"), "workers do not start: exit code 9"),
    (ClusterError("dask", "it is closed"), "dask cannot be used: it is closed"),
    (ClusterUnreachableError("tcp://10.0.0.1:8786", "no answer"), "check its address"),
    (ConfigError("/home/a/config.toml", "no profile 'x'; there are: y"), "there are: y"),
    (InputError("jobs.jsonl:3", "not JSON", "write one JSON value a line"), "one JSON value a line"),
    (MissingExtraError("pycurl", "download"), "pip install 'shpool[download]'"),
    (DownloadError("https://api.example/a.tif", "permission denied"), "permission denied"),
    (TransferError("https://api.example/a.tif", "HTTP 503", 503, 2.5), "try later"),
    (TransferError("https://api.example/a.tif", "HTTP 404", 404, None, False), "check the URL"),
    (ContentError("https://api.example/a.tif", "it is 9 bytes, not 10"), "9 bytes, not 10"),
    (TargetPathError("../a.tif", "it leaves the folder; name a path inside"), "name a path inside"),
    (PartInUseError("/tiles/a.tif.part"), "wait for it"),
    (StorageFullError("/tiles/a.tif.part"), "free some space"),
    (TooManyOpenFilesError("/tiles/a.tif.part"), "ulimit -n"),
    (JournalError("run.db", "it is damaged", "restore it"), "restore it"),
    (JournalNotFoundError("run.db"), "--journal"),
    (NotAJournalError("notes.txt", "it is text"), "give another --journal"),
    (JournalMismatchError("run.db", "target", "a:f", "a:g"), "--fresh"),
    (JournalMismatchError("run.db", "jobs named", "by b", "by c", "leave out --key"), "; leave out --key"),
    (JournalInUseError("run.db", 4711), "4711"),
    (JournalInUseError("run.db", 0), "wait for that run"),
    (JournalFullError("run.db", 12), "12 jobs are recorded"),
    (JournalFullError("run.db"), "free some"),
]


def _name(error: object) -> str:
    return type(error).__name__ if isinstance(error, Exception) else ""


def test_every_class_of_the_tree_has_a_sample() -> None:
    def family(cls: type[Exception]) -> set[type[Exception]]:
        return {cls}.union(*(family(child) for child in cls.__subclasses__()))

    here = {cls for cls in family(ShpoolError) if cls.__module__ == errors.__name__}
    assert here == {type(error) for error, _ in SAMPLES}


@pytest.mark.parametrize(("error", "_remedy"), SAMPLES, ids=_name)
@pytest.mark.parametrize("travel", [pickle, cloudpickle], ids=lambda module: str(module.__name__))
def test_error_survives_a_pickle(error: ShpoolError, _remedy: str, travel: object) -> None:
    """One error that cannot be unpickled breaks a whole pool of the standard library."""
    arrived = pickle.loads(travel.dumps(error))  # type: ignore[attr-defined]  # both modules have dumps
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert vars(arrived) == vars(error)


@pytest.mark.parametrize(("error", "_remedy"), SAMPLES, ids=_name)
def test_error_survives_a_copy(error: ShpoolError, _remedy: str) -> None:
    for clone in (copy.copy(error), copy.deepcopy(error)):
        assert type(clone) is type(error)
        assert str(clone) == str(error)


@pytest.mark.parametrize(("error", "remedy"), SAMPLES, ids=_name)
def test_text_holds_the_remedy_in_one_plain_line(error: ShpoolError, remedy: str) -> None:
    text = str(error)
    assert remedy in text
    assert "\n" not in text
    assert not text.endswith(".")


def test_notes_travel_with_the_error() -> None:
    """Notes of Python 3.11 and later are attributes, which the replayed fields alone would lose."""
    error = TaskTimeoutError("load", 1.0)
    error.__notes__ = ["while reading a.tif"]
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["while reading a.tif"]


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (BoardNotFoundError("n"), FileNotFoundError),
        (BoardInUseError("n", 1), FileExistsError),
        (ForeignBoardError("n"), PermissionError),
        (TaskTimeoutError("t", 1.0), TimeoutError),
        (ShellTimeoutError("cp a b", 2.0), TimeoutError),
        (DownloadTimeoutError("https://a.example/a.tif", 2.0), TimeoutError),
        (OpaqueTokenError("r"), ValueError),
        (ConfigError("p", "r"), ValueError),
        (InputError("w", "r"), ValueError),
        (JournalNotFoundError("p"), FileNotFoundError),
        (NoSessionError(), RuntimeError),
        (MissingExtraError("p", "e"), ImportError),
        (TargetPathError("p", "r"), ValueError),
        (PartInUseError("p"), FileExistsError),
        (StorageFullError("p"), OSError),
        (TooManyOpenFilesError("p"), OSError),
    ],
    ids=_name,
)
def test_error_is_also_what_the_standard_library_would_raise(error: ShpoolError, base: type[Exception]) -> None:
    assert isinstance(error, base)


@pytest.mark.parametrize(
    ("status", "name", "is_temporary"),
    [
        (1, "", False),
        (75, "", True),
        (-9, "SIGKILL", True),
        (137, "SIGKILL", True),
        (-11, "SIGSEGV", False),
        (255, "", False),
    ],
)
def test_a_command_is_worth_another_run_only_where_its_end_says_so(
    status: int, name: str, *, is_temporary: bool
) -> None:
    error = ShellJobError("cp a b", status)
    assert (error.signal_name, error.is_temporary) == (name, is_temporary)
