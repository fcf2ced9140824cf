"""Signals: the first one begins a graceful shutdown, a second one ends the process at once."""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

log = logging.getLogger(__name__)

# Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME_SIGNAL_TIME = 0.2  # seconds in which a repeated signal counts as the same one
PROGRESS_INTERVAL = 10.0  # seconds between two lines about what holds up the exit


@contextmanager
def shutdown_on_signal(describe_work: Callable[[], str]) -> Iterator[asyncio.Event]:
    """Within the block, let the first SIGINT, SIGTERM or SIGHUP set an event, and a second one end the process at once.

    Several blocks may be open at a time: a signal is for all of them. Signals are left alone in another thread than the
    main one.

    Args:
        describe_work: returns what is still to be finished, for the log.

    Yields:
        The event.

    Example:
        with shutdown_on_signal(lambda: "the report") as shutdown:
            while not shutdown.is_set():
                await write_next_line()
    """
    shutdown = asyncio.Event()
    _blocks.open(shutdown, describe_work)
    try:
        yield shutdown
    finally:
        _blocks.close(shutdown)


@contextmanager
def shutdown_by(shutdown: asyncio.Event | None, describe_work: Callable[[], str]) -> Iterator[asyncio.Event]:
    """Yield the caller's own event; without one shut down on signals."""
    if shutdown:
        yield shutdown
        return
    with shutdown_on_signal(describe_work) as shutdown:
        yield shutdown


class _Blocks:
    """The blocks of `shutdown_on_signal` that are open, and what a signal does to them."""

    def __init__(self) -> None:
        self._open: dict[asyncio.Event, Callable[[], str]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._first_at: float | None = None  # when the first signal came
        self._previous: dict[int, Any] = {}  # the signals' handlers outside of all blocks

    def open(self, shutdown: asyncio.Event, describe_work: Callable[[], str]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._loop is not (loop := asyncio.get_running_loop()):  # a signal shuts down just one program
            self._loop, self._first_at = loop, None
        if not self._open:
            # The event loop's own handlers cannot run while it is blocked, for example by a stalled log.
            self._previous = {signum: signal.signal(signum, self._on_signal) for signum in handled_signals()}
        self._open[shutdown] = describe_work
        if self._first_at is not None:
            shutdown.set()

    def close(self, shutdown: asyncio.Event) -> None:
        if self._open.pop(shutdown, None) and not self._open:
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, _frame: Any) -> None:
        if self._first_at is None and self._loop:
            self._first_at = time.monotonic()
            self._loop.call_soon_threadsafe(self._begin)
        elif not self.is_repeated(signum):
            end_process(signum)

    def is_repeated(self, signum: int) -> bool:
        """Return whether a signal is the first one again.

        A closed terminal sends SIGHUP more than once; `timeout` and supervisors signal a process and its group.
        """
        is_hangup = signum == getattr(signal, "SIGHUP", None)
        return self._first_at is not None and (is_hangup or time.monotonic() <= self._first_at + SAME_SIGNAL_TIME)

    def _begin(self) -> None:
        for shutdown in self._open:
            shutdown.set()
        self._log_progress("shutting down")

    def _log_progress(self, what: str) -> None:
        if self._loop and self._open:
            works = ", ".join(describe_work() for describe_work in self._open.values())
            log.info("%s: finishing %s (signal again to exit now)", what, works)
            self._loop.call_later(PROGRESS_INTERVAL, self._log_progress, "still shutting down")


_blocks = _Blocks()


def handled_signals() -> list[int]:
    """Return the signals that shut down. `nohup` has SIGHUP ignored: leave it ignored."""
    return [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]


def end_process(signum: int, _frame: Any = None) -> None:
    """End the process as the signal does by default."""
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)
    os._exit(128 + signum)  # Linux ignores the default for process 1, as in a container


def end_while_starting(signum: int, _frame: Any) -> None:
    """End the process by a signal, and say so on standard error: the signal may have interrupted the log itself."""
    if _blocks.is_repeated(signum):
        return
    signal.signal(signum, end_process)  # standard error may be stalled
    with suppress(OSError):
        os.write(2, f"{time.strftime('%Y/%m/%d %H:%M:%S')} stopped by {signal.Signals(signum).name}\n".encode())
    end_process(signum)


def ignore_repeated_hangup() -> None:
    """Let a closed terminal not change the exit status: at the end of a process Python resets its handlers."""
    if hasattr(signal, "SIGHUP") and _blocks.is_repeated(signal.SIGHUP):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def reset_signals_when_forked() -> None:
    """Let signals end a forked process, as they do by default; else a user's `multiprocessing` can't end its processes.

    Python drops a signal that comes to the new process before its handlers are reset, so it is blocked until then.
    """
    mask: set[int] = set()

    def reset() -> None:
        for signum in SIGNALS:
            handler = signal.getsignal(signum)
            if handler in (end_process, end_while_starting, _blocks._on_signal):
                signal.signal(signum, signal.SIG_DFL)
        unblock()

    def block() -> None:
        nonlocal mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)
