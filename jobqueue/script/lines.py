"""Read the lines of a file, a pipe or a terminal as a stream: never the whole of it, and a shutdown ends the wait."""

import asyncio
import logging
import os
import select
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import suppress

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
    try:
        descriptor = 0 if file == "-" else os.open(file, os.O_RDONLY)
    except OSError as error:
        raise Failure(f"cannot read {printable(file)}: {error.strerror}") from None
    number, rest, is_cut, is_idle = 1, b"", False, True

    def check_shutdown() -> None:
        if shutdown.is_set():
            raise Failure(f"stopped: line {number} and what follows it are not published")

    try:
        while True:
            is_idle = False
            chunk = await _read(descriptor, shutdown)
            is_idle = bool(chunk) or not shutdown.is_set()
            if not chunk:
                break
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
    except OSError as error:
        raise Failure(f"cannot read {printable(file)}: {error.strerror}") from None
    finally:
        # After a shutdown or a cancellation a thread may still read it: its number must not become another file's.
        if descriptor and is_idle:
            os.close(descriptor)


async def _read(descriptor: int, shutdown: asyncio.Event) -> bytes:
    """Return what is there, waiting for it if need be; nothing at the end, or at the shutdown."""
    loop = asyncio.get_running_loop()
    reading: asyncio.Future[bytes] = loop.create_future()

    def finish(chunk: bytes, error: OSError | None) -> None:
        if not reading.done():
            reading.set_exception(error) if error else reading.set_result(chunk)

    def read() -> None:
        chunk, failure = b"", None
        try:
            try:
                chunk = os.read(descriptor, CHUNK)
            except BlockingIOError:  # another program, or uvloop, has made standard input non-blocking
                select.select([descriptor], [], [])
                chunk = os.read(descriptor, CHUNK)
        except OSError as error:
            failure = error
        with suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(finish, chunk, failure)

    # A thread that may be left behind: nothing else can end a read of a terminal.
    threading.Thread(target=read, daemon=True).start()
    waiting = asyncio.create_task(shutdown.wait())
    await asyncio.wait((reading, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if stat.S_ISREG(os.fstat(descriptor).st_mode):  # its next chunk, or its end, comes at once
        return await reading
    return reading.result() if reading.done() else b""
