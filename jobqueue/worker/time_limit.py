"""A limit on the time that a user's own work may take."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from nats.aio.msg import Msg

from jobqueue.errors import Dead, Retry, list_errors

IGNORED_AFTER = 1.0  # seconds


class TimeLimit:
    """Runs a user's work in the current task, and cancels what takes longer than some seconds.

    The owner of the tasks calls `enforce` regularly: a timer and a task for each message would cost a fifth of the CPU.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._deadlines: dict[asyncio.Task[Any], float] = {}  # of what runs, the earliest first
        self._cancelled_at: dict[asyncio.Task[Any], float] = {}  # of what still runs after its deadline
        self._is_closed = False

    async def run(self, work: Callable[[Msg], Awaitable[None]], message: Msg) -> BaseException | None:
        """Do the work on a message and return what it raised, even a SystemExit or a CancelledError of its own.

        A group of `Retry` and `Dead` counts as the first of them: a task group in the work may have raised it.
        """
        task = asyncio.current_task(self._loop)
        assert task
        self._deadlines[task] = self._loop.time() + self._seconds
        error: BaseException | None = None
        try:
            await work(message)
        except BaseException as raised:
            if self._is_closed:
                raise
            error = raised
        self._deadlines.pop(task, None)
        if self._cancelled_at.pop(task, None) and error:
            error = TimeoutError(f"not done within the time limit of {self._seconds:g} s")
        if task.cancelling():  # that was meant for the work, and may still be due
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            while task.cancelling():
                task.uncancel()
        if isinstance(error, BaseExceptionGroup) and not error.split((Retry, Dead))[1]:
            error = list_errors(error)[0]
        return error

    def enforce(self) -> list[asyncio.Task[Any]]:
        """Cancel what has taken too long, and return the tasks whose work has ignored that for a second."""
        now = self._loop.time()
        for task in [task for task, deadline in self._deadlines.items() if now > deadline]:
            del self._deadlines[task]
            self._cancelled_at[task] = now
            task.cancel()
        ignoring = [task for task, cancelled_at in self._cancelled_at.items() if now > cancelled_at + IGNORED_AFTER]
        for task in ignoring:
            del self._cancelled_at[task]
        return ignoring

    def close(self) -> None:
        """Let what is cancelled from now on end its task, and not count as failed work."""
        self._is_closed = True
