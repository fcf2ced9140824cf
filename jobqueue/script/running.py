"""Running a program: its log, its signals, its threads and its exit status."""

import asyncio
import atexit
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobqueue.errors import Failure, describe_error, list_errors, printable
from jobqueue.script.logs import set_up_logging
from jobqueue.worker.shutdown import (
    PROGRESS_INTERVAL,
    end_while_starting,
    handled_signals,
    ignore_repeated_hangup,
    reset_signals_when_forked,
)

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

log = logging.getLogger(__name__)

TOUCH_INTERVAL = 5.0  # seconds
MAX_THREADS = 1000  # of work in asyncio.to_thread(); each is started when it is needed


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a program's coroutine; end the process with exit status 1, after one line that says why, if it fails.

    The log goes to standard error in the article's format, unless the root logger has a handler already. It has the
    lines of `__main__` and of jobqueue from level INFO on, and those of other loggers from WARNING on.

    A signal ends the process with a line; `consume` and `consume_dead_letters` shut down gracefully instead. The
    environment's LIVENESS_FILE is a file that is touched every five seconds. uvloop is used where it is installed (the
    extra `fast`).

    Args:
        main: the program's coroutine.

    Raises:
        SystemExit: it has failed.
        TypeError: `main` is no coroutine.

    Example:
        run(consume("orders_stream", "orders.*", process))
    """
    if not asyncio.iscoroutine(main):
        raise TypeError(f"run takes a coroutine, such as main(), and not {main!r}")
    _open_standard_files()
    set_up_logging()
    for signum in handled_signals():
        signal.signal(signum, end_while_starting)
    atexit.register(ignore_repeated_hangup)
    reset_signals_when_forked()
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            status = runner.run(_run_until_failure(main))
    except BaseException as error:  # a user's own task may end the event loop, by SystemExit say
        if not isinstance(error, SystemExit):
            log.error("%s", describe_error(error), exc_info=error if isinstance(error, Exception) else None)
        status = error.code if isinstance(error, SystemExit) else 1
    if status:
        sys.exit(status)


async def _run_until_failure(main: Coroutine[Any, Any, None]) -> Any:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MAX_THREADS))
    liveness_file = os.environ.get("LIVENESS_FILE")
    touching = asyncio.create_task(_touch_liveness_file(liveness_file)) if liveness_file else None
    status: Any = 0
    try:
        await main
    except* Failure as group:  # logged here, since a thread that still runs delays the end of the event loop
        status = 1
        for failure in list_errors(group):
            log.error("%s", failure)
    except* SystemExit as exits:
        status = getattr(list_errors(exits)[0], "code", 1)
    finally:
        await _join_threads()
        if touching:
            touching.cancel()
    return status


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
