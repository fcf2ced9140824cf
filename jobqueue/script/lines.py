"""Read the lines of a file, a pipe or a terminal as a stream: never the whole of it, and a shutdown ends the wait."""

import asyncio
import logging
import os
import select
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from jobqueue.errors import Failure, printable

log = logging.getLogger(__name__)

CHUNK = 64 * 1024  # bytes


@contextmanager
def opened(file: str) -> Iterator[int]:
    """Yield the file descriptor of a file; `-` is standard input.

    Raises:
        Failure: it cannot be read.
    """
    if file == "-":
        yield 0
        return
    try:
        descriptor = os.open(file, os.O_RDONLY)
        os.read(descriptor, 0)  # a directory can be opened
    except OSError as error:
        raise Failure(f"cannot read {printable(file)}: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def read_lines(descriptor: int, max_length: int, shutdown: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield the lines of a file without their newline; empty ones are logged and skipped.

    A pipe or a terminal that has nothing at the moment is waited for until the shutdown.

    Args:
        descriptor: the file.
        max_length: bytes of a line. Of a longer one it is only the first `max_length` bytes and one more that come.
        shutdown: the event that ends the reading.

    Raises:
        Failure: the file cannot be read any more, or the shutdown came before its end.
    """
    number, rest, is_cut = 1, b"", False

    def check_shutdown() -> None:
        if shutdown.is_set():
            raise Failure(f"stopped: line {number} and what follows it are not published")

    while chunk := await _read(descriptor, shutdown):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            check_shutdown()
            if is_cut:
                is_cut = False
            elif line:
                yield line[: max_length + 1]
            else:
                log.warning("line %d is empty: skipped", number)
            number += 1
        if is_cut:
            rest = b""
        elif len(rest) > max_length:
            yield rest[: max_length + 1]
            rest, is_cut = b"", True
    if rest:
        check_shutdown()
        yield rest


async def _read(descriptor: int, shutdown: asyncio.Event) -> bytes:
    """Return what is there, waiting for it if need be; nothing at the end, or of a pipe at the shutdown."""
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or os.isatty(descriptor):
        while not (shutdown.is_set() or select.select([descriptor], [], [], 0)[0]):
            await _ready(descriptor, shutdown)
        if shutdown.is_set():
            return b""
    else:
        await asyncio.sleep(0)  # a regular file is always there; the others have their turn
    try:
        return os.read(descriptor, CHUNK)
    except OSError as error:
        raise Failure(f"cannot read the orders: {error.strerror}") from None


async def _ready(descriptor: int, shutdown: asyncio.Event) -> None:
    """Wait until a pipe or a terminal has something, or for the shutdown."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    blocking = os.get_blocking(descriptor)
    loop.add_reader(descriptor, ready.set)
    os.set_blocking(descriptor, blocking)  # uvloop takes that away, and from a terminal's standard error too
    waiting = [asyncio.create_task(event.wait()) for event in (ready, shutdown)]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(descriptor)
        for task in waiting:
            task.cancel()
