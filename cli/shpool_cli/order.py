"""What the command line asks for, and the work it comes to once function and input are known to be good."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shpool.errors import InputError
from shpool_cli.journaling import is_begun_anew
from shpool_cli.keyfield import KeyField

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shpool.engines.base import EngineDescription
    from shpool.halting import HaltPolicy
    from shpool.jobs import Job
    from shpool.shell import ShellCall
    from shpool.targets import Target
    from shpool_cli.credentials import LoginOptions
    from shpool_cli.inputs import Call, Format, Input
    from shpool_cli.options import GateOptions


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    target: str | None
    shell: str | None
    source: str
    form: Format | None
    output: Path | None
    ordered: bool
    workers: int | None
    engine: str | EngineDescription
    retries: int
    timeout: float | None
    halt: HaltPolicy
    max_time: float | None
    limit: int | None
    shuffle: bool
    dry_run: bool
    journal: Path | None
    key: str | None
    only_failed: bool
    fresh: bool
    progress: bool | None
    login: LoginOptions
    gate: GateOptions


@dataclass(frozen=True)
class Work:
    """A function and an input, known to be good.

    Attributes:
        function: What workers call.
        source: The input.
        count: Its jobs.
        order: What the command line asks for.
    """

    function: Target | ShellCall
    source: Input
    count: int
    order: Order

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs in the order of the input."""
        from shpool.jobs import make_jobs

        return make_jobs(str(self.function), self.source.calls(), key_field=self.order.key)

    @property
    def is_begun_anew(self) -> bool:
        """Whether no former run matters: then an output that holds something cannot be of these jobs."""
        return is_begun_anew(self.order.journal, fresh=self.order.fresh)


def check_work(order: Order, source: Input, function: Target | ShellCall) -> Work:
    """Return the work, its whole input checked.

    Raises:
        InputError: A line cannot be read, its arguments do not fit the function, or it has no key
            of its own.
    """
    checks = [_fits(function)]
    if order.key is None:
        return Work(function, source, source.check(*checks), order)
    field = KeyField(order.key, source)
    return Work(function, source, source.check(*checks, field.check_shape, each=field.check), order)


def function_of(order: Order) -> Target | ShellCall:
    """Return the function to call.

    Raises:
        InputError: TARGET names none, or the command of --shell cannot be used.
    """
    if order.shell is None:
        from shpool.targets import load_target

        return load_target(order.target or "")
    from shpool.shell import ShellCall

    command = ShellCall(order.shell, timeout=order.timeout)
    command.check_syntax()
    return command


def _fits(function: Target | ShellCall) -> Callable[[Call], None]:
    """Return a check of a call's arguments."""
    from shpool.targets import Target

    if not isinstance(function, Target):
        return lambda call: function.check_fields(len(call[0]), call[1])
    try:
        signature = inspect.signature(function.function)
    except (TypeError, ValueError):  # some built-in functions have none
        return lambda _: None

    def fits(call: Call) -> None:
        try:
            signature.bind(*call[0], **call[1])
        except TypeError as exc:
            reason = f"the arguments do not fit the function: {exc}"
            raise InputError(function.name, reason, f"the function takes {signature}") from None

    return fits
