"""What the caller of a consume function may choose, checked before there is a connection."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue.jetstream.streams import is_name

MAX_ACK_PENDING = 100_000  # messages in flight or waiting for a retry; while there are more, no new ones are delivered
MAX_CONCURRENCY = 500  # messages at a time
MIN_BACKOFF = 0.1  # seconds; heartbeats have to come in time


def check_work(work: Callable[..., Any], concurrency: int, time_limit: float, *names: str) -> None:
    """Raise TypeError or ValueError for what would fail with each message."""
    function = inspect.unwrap(work.func if isinstance(work, partial) else work)
    if not any(is_one(function) for is_one in (inspect.isroutine, inspect.isclass, inspect.iscoroutinefunction)):
        function = getattr(function, "__call__", None)  # noqa: B004  of an object
    name = getattr(function, "__name__", repr(work))
    if not inspect.iscoroutinefunction(function) and name != "<lambda>":
        raise TypeError(f"{name} must be a coroutine function: async def {name}(...)")
    if not _takes_one_argument(work):
        raise TypeError(f"{name} must take one argument, the message")
    if not isinstance(concurrency, int) or not 1 <= concurrency <= MAX_CONCURRENCY:
        raise ValueError(f"concurrency is from 1 to {MAX_CONCURRENCY}, not {concurrency!r}")
    if not time_limit > 0:
        raise ValueError(f"a time limit is above 0 seconds, not {time_limit!r}")
    for name in names:
        if not is_name(name):
            raise ValueError(f"{name!r} can't be the name of a stream or a durable")


def _takes_one_argument(work: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(work)
    except (TypeError, ValueError):  # it has none that can be read
        return True
    try:
        signature.bind(None)
    except TypeError:
        return False
    return True


def make_config(
    durable: str, description: str, backoff: Sequence[float], max_deliver: int, max_ack_pending: int
) -> ConsumerConfig:
    """Return a durable's configuration; raise ValueError for what the server would refuse or change."""
    if not backoff or not all(MIN_BACKOFF <= seconds < math.inf for seconds in backoff):
        raise ValueError(f"there must be a back-off, and each is at least {MIN_BACKOFF} seconds, not {backoff!r}")
    for name, limit in (("max_deliver", max_deliver), ("max_ack_pending", max_ack_pending)):
        if not isinstance(limit, int) or (limit < 1 and limit != -1):
            raise ValueError(f"{name} is a whole number from 1, or -1 for no limit, not {limit!r}")
    if len(backoff) > max_deliver > 0:
        raise ValueError(f"there are {len(backoff)} back-offs, more than the {max_deliver} of max_deliver")
    return ConsumerConfig(
        name=durable,
        durable_name=durable,
        description=description or None,
        backoff=list(backoff),
        max_deliver=max_deliver,
        max_ack_pending=max_ack_pending,
        ack_policy=AckPolicy.EXPLICIT,
    )
