"""A limit on the time that a user's own work may take."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

IGNORED_AFTER = 1.0  # seconds


class TimeLimit:
    """Runs a user's work in the current task, and cancels what takes too long.

    One object serves all tasks, and who owns them calls `enforce` now and then: a timer and a task for each message
    would be a fifth of the worker's CPU.

    Args:
        seconds: after which work is cancelled, and has failed.

    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadlines: dict[asyncio.Task[Any], float] = {}  # of what runs, the earliest first
        self._expired: dict[asyncio.Task[Any], float] = {}  # when work was cancelled that still runs
        self._is_closed = False

    async def run(self, work: Coroutine[Any, Any, None]) -> BaseException | None:
        """Await the work and return what it raised, even a SystemExit or a CancelledError of its own, or None."""
        task = asyncio.current_task()
        assert task
        self._deadlines[task] = asyncio.get_running_loop().time() + self._seconds
        error: BaseException | None = None
        try:
            await work
        except BaseException as raised:
            if self._is_closed:
                raise
            error = raised
        finally:
            self._deadlines.pop(task, None)
            is_expired = self._expired.pop(task, None) is not None
        if task.cancelling():
            await _forget_cancellation(task)
        if error and is_expired:
            return TimeoutError(f"not done within the time limit of {self._seconds:g} s")
        return error

    def enforce(self, now: float) -> list[asyncio.Task[Any]]:
        """Cancel what has taken too long, and return the tasks whose work has ignored that for a second."""
        for task, deadline in list(self._deadlines.items()):
            if deadline > now:
                break
            del self._deadlines[task]
            self._expired[task] = now
            task.cancel()
        ignoring = [task for task, cancelled_at in self._expired.items() if now > cancelled_at + IGNORED_AFTER]
        for task in ignoring:
            del self._expired[task]
        return ignoring

    def close(self) -> None:
        """Let what still runs be cancelled from now on without counting as failed work."""
        self._is_closed = True


async def _forget_cancellation(task: asyncio.Task[Any]) -> None:
    """Take back cancellations that were meant for work that has ended, one that is still due included."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    while task.cancelling():
        task.uncancel()
