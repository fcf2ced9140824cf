"""A call that is made again after transient errors."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from nats.js.errors import NotFoundError

from jobqueue.errors import PERMANENT_CODES, TRANSIENT_ERRORS, describe_error

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0  # seconds to retry transient errors at a script's start
MIN_RETRY_DELAY = 0.1  # seconds; doubled after each attempt
MAX_RETRY_DELAY = 0.5  # seconds

T = TypeVar("T")


async def retry(call: Callable[[], Awaitable[T]], what: str, should_raise: Callable[[Exception], bool]) -> T:
    """Return what `call()` returns; call it again after each transient error, and after a "not found".

    An error with one of PERMANENT_CODES is raised, and one of which `should_raise` says so. The log line at the first
    error begins with `what`.
    """
    delay = MIN_RETRY_DELAY
    while True:
        try:
            return await call()
        except (*TRANSIENT_ERRORS, NotFoundError) as error:  # a deleted stream may be created again
            if getattr(error, "err_code", None) in PERMANENT_CODES or should_raise(error):
                raise
            if delay == MIN_RETRY_DELAY:
                log.warning("%s: %s; trying again", what, describe_error(error))
        await asyncio.sleep(delay)
        delay = min(2 * delay, MAX_RETRY_DELAY)


async def retry_at_start(
    call: Callable[[], Awaitable[T]], what: str, should_raise: Callable[[Exception], bool] = lambda _: False
) -> T:
    """Return what `call()` returns, as `retry` does, but for START_TIMEOUT at most, and not after a "not found"."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_TIMEOUT
    return await retry(
        call, what, lambda error: isinstance(error, NotFoundError) or loop.time() > deadline or should_raise(error)
    )
