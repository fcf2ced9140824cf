"""A script's log: on standard error, in the article's format, at little cost for each line."""

import errno
import logging
import os
import signal
import sys
import time
from typing import Any, ClassVar

NOBODY_READS = (errno.EPIPE, errno.EIO)  # a pipe whose reader has ended; a terminal that was closed


def set_up_logging() -> None:
    """Send the script's and jobqueue's lines to standard error, unless the root logger has a handler."""
    if logging.getLogger().handlers:
        return
    handler = _Handler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "jobqueue"]
    for own in map(logging.getLogger, ["__main__", *names]):
        own.setLevel(logging.INFO)
        own.findCaller = lambda *_: ("", 0, "", None)  # type: ignore[method-assign]
        own.makeRecord = _Record  # type: ignore[method-assign, assignment]
    # nats-py and asyncio log tracebacks; their errors are reported through nats-py's callbacks.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class _Handler(logging.StreamHandler[Any]):
    """Begins the shutdown when nobody reads the log any more, so that no process runs unobserved."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exception()
        if not isinstance(error, OSError) or error.errno not in NOBODY_READS:
            super().handleError(record)
            return
        on_signal = signal.getsignal(signal.SIGTERM)
        if callable(on_signal):  # `shutdown_on_signal` or `run` has set it
            on_signal(getattr(signal, "SIGHUP", signal.SIGTERM), None)  # SIGHUP never counts as a second signal
            # Python ends with exit status 120 when it can't flush this file at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


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
