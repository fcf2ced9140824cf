"""Running a script: its signals and its exit status."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobqueue.errors import Failure, describe_error, printable
from jobqueue.script.logs import set_up_logging

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

log = logging.getLogger(__name__)

SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SIGNAL_TIME = 0.2  # seconds in which a repeated signal counts as the same one
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
    for signum in _handled_signals():
        signal.signal(signum, _end_while_starting)
    _reset_signals_when_forked()

    async def run_until_failure() -> int:
        liveness_file = os.environ.get("LIVENESS_FILE")
        touching = asyncio.create_task(_touch_liveness_file(liveness_file)) if liveness_file else None
        try:
            return await run
        except Failure as failure:  # logged here, since a thread that still runs delays the end of the event loop
            log.error("%s", failure)
            return 1
        finally:
            await _join_threads()
            if touching:
                touching.cancel()

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(run_until_failure())
    except BaseException as error:  # a user's own task may end the event loop, by SystemExit say
        log.error("%s", describe_error(error))
    return 1


@contextmanager
def shutdown_on_signal(shutdown: asyncio.Event, describe_work: Callable[[], str]) -> Iterator[None]:
    """Within the block, set an event at the first SIGINT, SIGTERM or SIGHUP. A second signal ends the process at once.

    Args:
        shutdown: the event.
        describe_work: returns what is still to be finished, for the log.
    """
    loop = asyncio.get_running_loop()
    signals = _handled_signals()
    first_at: float | None = None
    timer: asyncio.TimerHandle | None = None
    is_over = False

    def begin_shutdown() -> None:
        if not is_over:
            shutdown.set()
            log_progress("shutting down")

    def log_progress(what: str) -> None:
        nonlocal timer
        log.info("%s: finishing %s (signal again to exit now)", what, describe_work())
        timer = loop.call_later(PROGRESS_INTERVAL, log_progress, "still shutting down")

    # The event loop's own handlers cannot run while it is blocked, for example by a stalled log.
    def on_signal(signum: int, _frame: Any) -> None:
        nonlocal first_at
        now = time.monotonic()
        if first_at is None:
            first_at = now
            loop.call_soon_threadsafe(begin_shutdown)
        # A closed terminal sends SIGHUP more than once; `timeout` and supervisors signal a process and its group.
        elif signum != signal.SIGHUP and now > first_at + SAME_SIGNAL_TIME:
            _end(signum)

    for signum in signals:
        signal.signal(signum, on_signal)
    try:
        yield
    finally:
        is_over = True
        for signum in signals:
            is_hangup = signum == signal.SIGHUP and first_at is not None
            signal.signal(signum, signal.SIG_IGN if is_hangup else _end)
        if timer:
            timer.cancel()


def _handled_signals() -> list[signal.Signals]:
    # nohup has SIGHUP ignored: leave it ignored.
    return [signum for signum in SHUTDOWN_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]


def _end(signum: int, _frame: Any = None) -> None:
    """End the process as the signal does by default."""
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)
    os._exit(128 + signum)  # Linux ignores the default for process 1, as in a container


def _end_while_starting(signum: int, _frame: Any) -> None:
    signal.signal(signum, _end)  # the log may be stalled
    log.info("stopped by %s", signal.Signals(signum).name)
    _end(signum)


def _reset_signals_when_forked() -> None:
    """Let signals end a forked process, as they do by default; else a user's `multiprocessing` can't end its processes.

    Python drops a signal that comes to the new process before its handlers are reset, so it is blocked until then.
    """
    mask: set[int] = set()

    def reset() -> None:
        for signum in SHUTDOWN_SIGNALS:
            if getattr(signal.getsignal(signum), "__module__", "") == __name__:
                signal.signal(signum, signal.SIG_DFL)
        unblock()

    def block() -> None:
        nonlocal mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SHUTDOWN_SIGNALS)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)


async def _touch_liveness_file(name: str) -> None:
    """Touch the file again and again, so that a probe sees when the event loop is blocked."""
    reported = ""
    while True:
        try:
            Path(name).touch()  # noqa: ASYNC240  quick
        except OSError as error:
            reason = str(error.strerror)
            if reason != reported:
                log.error("cannot touch the liveness file %s: %s", printable(name), reason)
            reported = reason
        await asyncio.sleep(TOUCH_INTERVAL)


async def _join_threads() -> None:
    """Wait for the threads of work that was cancelled, and log it every PROGRESS_INTERVAL."""
    joining = asyncio.create_task(asyncio.get_running_loop().shutdown_default_executor())
    while not (await asyncio.wait((joining,), timeout=PROGRESS_INTERVAL))[0]:
        log.warning("shutting down: waiting for a thread of a cancelled order (signal to exit now)")


def _open_standard_files() -> None:
    """Open what is closed of standard input, output and error: the event loop's own files would get their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
