"""Which errors are transient, and a call that is made again after them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from nats.errors import ConnectionReconnectingError, NoRespondersError, OutboundBufferLimitError
from nats.js.errors import NoStreamResponseError, NotFoundError, ServerError, ServiceUnavailableError

from jobqueue.errors import describe_error

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0  # seconds to wait out transient errors before a script can begin
MIN_RETRY_DELAY = 0.1  # seconds; doubled after each attempt
MAX_RETRY_DELAY = 0.5  # seconds

# The server, the leader or the connection is away, and will be back.
TRANSIENT_ERRORS = (
    TimeoutError,
    NoRespondersError,
    NoStreamResponseError,
    ConnectionReconnectingError,
    OutboundBufferLimitError,
    ServiceUnavailableError,
    ServerError,
)

T = TypeVar("T")


async def retry(call: Callable[[], Awaitable[T]], what: str, give_up: Callable[[Exception], bool]) -> T:
    """Return what `call()` returns. Call it again after each transient error, and after a "not found".

    Args:
        call: makes the request.
        what: what it is for; the log line at the first error begins with it.
        give_up: says of an error whether to raise it instead.

    """
    delay = MIN_RETRY_DELAY
    while True:
        try:
            return await call()
        except (*TRANSIENT_ERRORS, NotFoundError) as error:  # a deleted stream may be created again
            if give_up(error):
                raise
            if delay == MIN_RETRY_DELAY:
                log.warning("%s: %s; trying again", what, describe_error(error))
        await asyncio.sleep(delay)
        delay = min(2 * delay, MAX_RETRY_DELAY)


def after_start_timeout(*, or_not_found: bool) -> Callable[[Exception], bool]:
    """Return a `give_up` for a script's start: once START_TIMEOUT is over, and perhaps at any "not found"."""
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT
    return lambda error: (
        (or_not_found and isinstance(error, NotFoundError)) or asyncio.get_running_loop().time() > deadline
    )
