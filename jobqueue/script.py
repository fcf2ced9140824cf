"""Running a script: its signals and its exit status."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobqueue.errors import Failure, describe_error, printable
from jobqueue.logs import set_up_logging

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

log = logging.getLogger(__name__)

SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOUCH_INTERVAL = 5.0  # seconds
PROGRESS_INTERVAL = 10.0  # seconds between two lines about what holds up the exit


def start(run: Coroutine[None, None, int], script_log: logging.Logger) -> int:
    """Run a script's coroutine and return the exit status: its own, or 1 after one line that says why.

    It runs on uvloop where that is installed (the extra `fast`).

    Args:
        run: the script's coroutine, which returns the exit status.
        script_log: the script's logger. Its lines and those of jobqueue go to standard error in the article's format.
    """
    _open_standard_files()
    set_up_logging(script_log)

    async def run_until_failure() -> int:
        touching = asyncio.create_task(_touch_liveness_file())
        try:
            return await run
        except Failure as failure:  # logged here, since a thread that still runs delays the end of the event loop
            log.error("%s", failure)
            return 1
        finally:
            await _join_threads()
            touching.cancel()

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(run_until_failure())
    except BaseException as error:  # a user's own task may end the event loop, by SystemExit say
        log.error("%s", describe_error(error))
    return 1


@contextmanager
def shutdown_on_signal(shutdown: asyncio.Event, describe_work: Callable[[], str]) -> Iterator[None]:
    """Set an event at the first SIGINT, SIGTERM or SIGHUP of the block. A second one ends the process at once.

    Args:
        shutdown: the event.
        describe_work: returns what is still to be finished, for the log line of the first signal.
    """
    loop = asyncio.get_running_loop()
    # A process that was started by nohup goes on when its terminal is closed.
    signals = [signum for signum in SHUTDOWN_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]

    is_requested = False
    timer: asyncio.TimerHandle | None = None

    def shut_down() -> None:
        nonlocal timer
        still = "still " if shutdown.is_set() else ""
        shutdown.set()
        log.info("%sshutting down: finishing %s (signal again to exit now)", still, describe_work())
        timer = loop.call_later(PROGRESS_INTERVAL, shut_down)

    # The event loop's own handlers would have to wait where it is blocked, as by a log whose reader has stalled.
    def on_signal(_signum: int, _frame: Any) -> None:
        nonlocal is_requested
        restore_defaults()
        if not is_requested:  # two signals at the same time are one
            is_requested = True
            loop.call_soon_threadsafe(shut_down)

    def restore_defaults() -> None:
        for signum in signals:
            signal.signal(signum, signal.SIG_DFL)

    for signum in signals:
        signal.signal(signum, on_signal)
    try:
        yield
    finally:
        restore_defaults()
        if timer:
            timer.cancel()


async def _touch_liveness_file() -> None:
    """Touch the file again and again, so that a probe sees when the event loop is blocked."""
    while name := os.environ.get("LIVENESS_FILE"):
        try:
            Path(name).touch()  # noqa: ASYNC240  quick
        except OSError as error:
            log.error("cannot touch the liveness file %s: %s", printable(name), error.strerror)
        await asyncio.sleep(TOUCH_INTERVAL)


async def _join_threads() -> None:
    """Wait for the threads of a user's work that was cancelled, and go on saying so."""
    joining = asyncio.create_task(asyncio.get_running_loop().shutdown_default_executor())
    while not (await asyncio.wait((joining,), timeout=PROGRESS_INTERVAL))[0]:
        log.warning("waiting for a thread of the work (signal to exit now)")


def _open_standard_files() -> None:
    """Open what is closed of standard input, output and error: the event loop's own files would get their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
