"""Read the lines of a file, a pipe or a terminal as a stream: never the whole of it, and a shutdown ends the wait."""

import asyncio
import logging
import os
import select
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobqueue.errors import Failure, printable

log = logging.getLogger(__name__)

CHUNK = 64 * 1024  # bytes


async def read_lines(file: str, max_length: int, shutdown: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield the lines of a file without their newline; empty ones are logged and skipped.

    A pipe or a terminal that has nothing at the moment is waited for until the shutdown.

    Args:
        file: the file's path; `-` is standard input.
        max_length: bytes of a line. Of a longer one it is only the first `max_length` bytes and one more that come.
        shutdown: the event that ends the reading.

    Raises:
        Failure: the file cannot be read, or the shutdown came before its end.

    Example:
        async for line in read_lines("orders.txt", nc.max_payload, shutdown):
            print(line)
    """
    number, rest = 1, b""

    def check_shutdown() -> None:
        if shutdown.is_set():
            raise Failure(f"stopped: line {number} and what follows it are not published")

    try:
        async for chunk in _read_chunks(file, shutdown):
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[: max_length + 1]
            for line in lines:
                check_shutdown()
                if line:
                    yield line[: max_length + 1]
                else:
                    log.warning("line %d is empty: skipped", number)
                number += 1
    except (OSError, ValueError) as error:
        raise Failure(f"cannot read {printable(file)}: {getattr(error, 'strerror', error)}") from None
    if rest:
        check_shutdown()
        yield rest


async def _read_chunks(file: str, shutdown: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield what there is to read, until the end or the shutdown; what has come until then is still read."""
    chunks, waiting = _read_file(file, shutdown), asyncio.create_task(shutdown.wait())
    try:
        while chunk := await _read_next(chunks, None if shutdown.is_set() or _is_regular(file) else waiting):
            yield chunk
    finally:
        waiting.cancel()


async def _read_next(chunks: Iterator[bytes], waiting: asyncio.Task[Any] | None) -> bytes:
    """Return the next chunk; an empty one at the end, or when what we are waiting for beside it comes first."""
    loop = asyncio.get_running_loop()
    reading: asyncio.Future[bytes] = loop.create_future()

    def read() -> None:
        with suppress(RuntimeError):  # the event loop has ended
            try:
                loop.call_soon_threadsafe(reading.set_result, next(chunks))
            except (OSError, ValueError) as error:
                loop.call_soon_threadsafe(reading.set_exception, error)

    # A thread that may be left behind: nothing else can end the wait for a pipe's writer, or for a terminal.
    threading.Thread(target=read, daemon=True).start()
    await asyncio.wait((reading, waiting) if waiting else (reading,), return_when=asyncio.FIRST_COMPLETED)
    return await reading if reading.done() else b""


def _read_file(file: str, shutdown: asyncio.Event) -> Iterator[bytes]:
    """Yield a file's chunks, and an empty one at its end, or when nothing has come at the shutdown."""
    descriptor, chunk = 0 if file == "-" else os.open(file, os.O_RDONLY), b"-"
    try:
        while chunk:
            try:
                is_over = shutdown.is_set() and not select.select([descriptor], [], [], 0)[0]
                chunk = b"" if is_over else os.read(descriptor, CHUNK)
            except BlockingIOError:  # another program, or uvloop, has made standard input non-blocking
                select.select([descriptor], [], [])
                continue
            yield chunk
    finally:
        if descriptor:
            os.close(descriptor)


def _is_regular(file: str) -> bool:
    return stat.S_ISREG((os.fstat(0) if file == "-" else Path(file).stat()).st_mode)
