"""What every engine offers, and what it is given. Engines know tasks, never jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from shpool.retry import RetryPolicy

if TYPE_CHECKING:
    from concurrent.futures import Future

    from shpool.channels import TokenChannel
    from shpool.engines.setup import WorkerSetup
    from shpool.errors import WorkerLostError
    from shpool.gate import Gate

NO_RETRIES = RetryPolicy()


@dataclass(slots=True)  # not frozen: that costs two microseconds a task
class Task:
    """One call in a worker, or one batch of calls.

    Attributes:
        fn: What ``Engine.prepare`` made of the function.
        args: Positional arguments; for a batch, one item for each call.
        kwargs: Keyword arguments; none for a batch.
        label: What to call the task in messages.
        policy: How many more attempts which errors are worth, and when.
        timeout: Seconds one attempt may take, None for no limit.
        batch: The future's result is a ``BatchResult``; each item is one call's argument.
        star: Each item of a batch is a tuple of arguments.
        brief: A batch whose like were measured to be over in a moment: another one may wait behind it at a worker.
        history: A line for each attempt that was made already, as part of a batch.
        delay: Seconds until the next one.
        hear: Called with what the task tells before it ends, in a thread of the engine's, and again what a further
            attempt tells; must not wait. Engines without the means for that never call it.
    """

    fn: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    label: str = "task"
    policy: RetryPolicy = NO_RETRIES
    timeout: float | None = None
    batch: bool = False
    star: bool = False
    brief: bool = False
    history: tuple[str, ...] = ()
    delay: float = 0.0
    hear: Callable[[Any], object] | None = None

    @property
    def retries(self) -> int:
        """How many more attempts the task may have."""
        return self.policy.retries

    @property
    def calls(self) -> int:
        """How many calls it makes."""
        return len(self.args) if self.batch else 1


@dataclass(frozen=True)
class BatchResult:
    """How a batch ended.

    Attributes:
        results: Results of the first calls, None where one raised; shorter than the batch if its worker died.
        errors: What the calls at these indices raised.
        seconds: Time the calls took in the worker.
        size: Bytes that the arguments and the results were when they travelled.
        lost: Why the calls beyond ``results`` were not made, or not heard of.
    """

    results: list[Any]
    errors: dict[int, BaseException]
    seconds: float
    size: int = 0
    lost: WorkerLostError | None = None


@dataclass
class Tally:
    """What an engine has counted so far."""

    done: int = 0
    failed: int = 0
    retried: int = 0
    workers_lost: int = 0


class EngineDescription(Protocol):
    """Says where tasks are to run; cheap to make, and no engine yet."""

    @property
    def name(self) -> str:
        """What the pool's ``repr`` calls it."""

    def build(
        self, workers: int | None, setup: WorkerSetup, blanked: Callable[[], Sequence[str]], gate: Gate | None
    ) -> Engine:
        """Return the engine.

        Args:
            workers: Most tasks to run at once; None for as many as there is room for.
            setup: How each worker begins.
            blanked: Returns the environment variables that worker processes started here must not inherit.
            gate: What all requests go through; None for a gate without limits.
        """


class Engine(Protocol):
    """Runs tasks.

    Attributes:
        on_refused: Called with each generation a worker reports as refused; set before ``start()``.
        on_end: Called once after the last worker has ended; set before ``start()``.
    """

    on_refused: Callable[[int], None]
    on_end: Callable[[], None]

    @property
    def tally(self) -> Tally:
        """What it has counted."""

    @property
    def channel(self) -> TokenChannel:
        """Where the workers' token is published; there before ``start()``."""

    @property
    def workers(self) -> int:
        """How many tasks can run at once."""

    @property
    def largest_batch(self) -> int | None:
        """Most calls a batch may hold; None for as many as one likes."""

    @property
    def singles(self) -> int:
        """How many calls a worker should have under way where each is a message, before it proves to be too few."""

    @property
    def hears(self) -> bool:
        """Whether running tasks tell their parent something on the way, and are asked for what they have not begun."""

    @property
    def has_ended(self) -> bool:
        """Tell whether it is shut down and nothing of it is left."""

    @property
    def backlog(self) -> int:
        """How many tasks are not settled yet."""

    @property
    def failure(self) -> Exception | None:
        """Why no task can run any more, whatever is done; None while they can."""

    def start(self) -> None:
        """Launch the workers; returns without waiting for them."""

    def prepare(self, fn: Callable[..., Any], *, serves_many: bool = False) -> Any:  # noqa: ANN401 - the engine's own form of a function
        """Return what stands for a function in tasks; pickled once where that is needed.

        Args:
            fn: The function.
            serves_many: One object in each worker may serve all the tasks it is prepared for, whatever state it has.
        """

    def submit(self, task: Task, future: Future[Any] | None = None) -> Future[Any]:
        """Run a task; errors of pickling are the future's too.

        Args:
            task: The task.
            future: What gets its end; None makes one.

        Raises:
            RuntimeError: The engine is shut down.
            InitializerError: The workers cannot be initialised.
        """

    def terminate(self, future: Future[Any]) -> bool:
        """Stop one task: it is cancelled, or ends with ``TaskTerminatedError``. False if it has ended already.

        Raises:
            ValueError: The future is not of this engine.
        """

    def recall(self, future: Future[Any]) -> None:
        """Ask a running task for what it has not begun of its work; one that does not look for that goes on."""

    def drop_abandoned(self) -> None:
        """Drop what nobody wants any more (see ``Slot.abandon``) and does not run. Returns at once; from any thread."""

    def shutdown(self, *, cancel: bool = False, kill: bool = False) -> None:
        """Take no more tasks; end once those there are done. Returns at once.

        Args:
            cancel: Cancel the tasks that have not begun.
            kill: Stop the running ones too.
        """

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end that ``shutdown`` asked for; tell whether it came."""
