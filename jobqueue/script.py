"""Running a script: its log, its signals, and its exit status."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from jobqueue.errors import Failure, describe_error

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop


def start(run: Coroutine[None, None, int], log: logging.Logger) -> int:
    """Run a script's coroutine and return the exit status: its own, or 1 after one line that says why.

    It runs on uvloop where that is installed (the extra `fast`).

    Args:
        run: the script's coroutine, which returns the exit status.
        log: the script's logger. Its lines and those of jobqueue go to standard error in the article's format.
    """
    _open_standard_files()
    _set_up_logging(log)
    # Before shutdown_on_signal() nothing is in flight: exit at once, without KeyboardInterrupt's traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    async def run_until_failure() -> int:
        try:
            return await run
        except Failure as failure:  # logged here, since a thread that still runs delays the end of the event loop
            log.error("%s", failure)
            return 1

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(run_until_failure())
    except BaseException as error:  # a user's own task may end the event loop, by SystemExit say
        log.error("%s", describe_error(error))
    return 1


@contextmanager
def shutdown_on_signal(shutdown: asyncio.Event, describe_work: Callable[[], str]) -> Iterator[None]:
    """Set an event at the first SIGINT or SIGTERM of the block. A second one ends the process at once.

    Args:
        shutdown: the event.
        describe_work: returns what is still to be finished, for the log line of the first signal.
    """
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def begin_shutdown() -> None:
        restore_defaults()
        logging.getLogger(__name__).info("shutting down: finishing %s (signal again to exit now)", describe_work())
        shutdown.set()

    def restore_defaults() -> None:
        for signum in signals:
            loop.remove_signal_handler(signum)
            signal.signal(signum, signal.SIG_DFL)

    for signum in signals:
        loop.add_signal_handler(signum, begin_shutdown)
    try:
        yield
    finally:
        restore_defaults()


class _Formatter(logging.Formatter):
    """Formats lines like `2026/11/23 20:24:25 received order-1`, and each second only once."""

    _second = 0
    _formatted = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        if self._second != (second := int(record.created)):
            self._second, self._formatted = second, time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(second))
        return self._formatted

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info or record.stack_info:
            return super().format(record)
        return f"{self.formatTime(record)} {record.getMessage()}"


class _Record(logging.LogRecord):
    """A log record without the line of code, thread and process: looking these up is half of its cost."""

    _UNKNOWN: ClassVar = {**vars(logging.LogRecord("", 0, "", 0, "", None, None)), "process": None, "thread": None}

    def __init__(
        self,
        name: str,
        level: int,
        fn: str,
        lno: int,
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,
        extra: dict[str, Any] | None = None,
        sinfo: str | None = None,
    ) -> None:
        self.__dict__ = self._UNKNOWN | (extra or {})
        self.name, self.levelno, self.levelname = name, level, logging.getLevelName(level)
        self.msg, self.args, self.exc_info, self.stack_info = msg, args, exc_info, sinfo
        self.created = time.time()


def _set_up_logging(log: logging.Logger) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)
    names = [name for name in log.manager.loggerDict if name.partition(".")[0] == "jobqueue"]
    for own in (log, *map(logging.getLogger, names)):
        own.setLevel(logging.INFO)
        own.findCaller = lambda *_: ("", 0, "", None)  # type: ignore[method-assign]
        own.makeRecord = _Record  # type: ignore[method-assign, assignment]
    # nats-py and asyncio log tracebacks; what matters of them comes through callbacks.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _open_standard_files() -> None:
    """Open what is closed of standard input, output and error: the event loop's own files would get their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
