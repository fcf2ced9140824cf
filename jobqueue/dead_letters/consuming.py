"""Consuming dead letters: a process's share of the work on the advisories of a stream."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from nats.aio.msg import Msg

from jobqueue.connection.client import Client
from jobqueue.connection.connecting import connect, run_until_refused
from jobqueue.dead_letters.advisories import require_streams
from jobqueue.dead_letters.processing import Processing
from jobqueue.dead_letters.searching import search
from jobqueue.dead_letters.verifying import Verifier
from jobqueue.errors import Failure
from jobqueue.jetstream.reasons import Reasons
from jobqueue.worker.options import MAX_ACK_PENDING, check_work, make_config
from jobqueue.worker.shutdown import shutdown_by
from jobqueue.worker.time_limit import TimeLimit
from jobqueue.worker.worker import Worker

log = logging.getLogger(__name__)


async def consume_dead_letters(
    dlq_stream: str,
    stream: str,
    reprocess: Callable[[Msg], Awaitable[None]],
    *,
    durable: str = "unprocessed_order_handler",
    description: str = "",
    backoff: Sequence[float] = (5.0,),
    max_ack_pending: int = MAX_ACK_PENDING,
    concurrency: int = 1,
    time_limit: float = 600.0,
    shutdown: asyncio.Event | None = None,
) -> None:
    """Process the dead letters of a work queue until SIGINT or SIGTERM; any number of processes share the work.

    It also finds the dead letters that have no advisory.

    Args:
        dlq_stream: the stream that keeps the advisories.
        stream: the work queue.
        reprocess: your own work on one dead letter, which is removed when it returns. When it raises an exception, it
            is called again 5, 10, 20 ... 120 seconds later, or after the delay of `Retry`. `Dead` discards the dead
            letter; the log then has all that was known of it.
        durable: the name of the durable on `dlq_stream`; `python -m jobqueue.manage` must know it.
        description: the durable's description.
        backoff: seconds until an advisory is redelivered whose process was killed.
        max_ack_pending: advisories in flight or waiting for a retry, in all processes.
        concurrency: dead letters that are processed at a time.
        time_limit: seconds for `reprocess`; then it is cancelled, and has failed.
        shutdown: an event of your own that begins the graceful shutdown. Signals are yours then, too.

    Raises:
        Failure: as `consume` does.
        TypeError, ValueError: an argument is malformed.

    Example:
        async def reprocess(order):
            print("give up:", order.data)

        run(consume_dead_letters("orders_unprocessed", "orders_stream", reprocess))
    """
    check_work(reprocess, concurrency, time_limit, dlq_stream, stream, durable)
    # Without a limit of deliveries: what fails is tried again until it succeeds.
    config = make_config(durable, description, backoff, -1, max_ack_pending)

    async def work(nc: Client) -> None:
        await require_streams(nc, dlq_stream, stream)
        verifier, limit, reasons = Verifier(nc, stream), TimeLimit(time_limit), await Reasons.find(nc, stream)
        await verifier.pending.start(stream, dlq_stream)
        with shutdown_by(shutdown, lambda: f"{len(worker.in_flight)} dead letters in flight") as event:
            processing = Processing(nc, verifier, reprocess, limit, event, reasons)
            worker = Worker(nc, dlq_stream, config, processing.handle, concurrency, limit)
            searching = asyncio.create_task(search(nc, dlq_stream, verifier))
            try:
                await worker.run(event)
            finally:
                searching.cancel()
        log.info(
            "stopped: %d dead letters done, %d attempts failed, %d advisories deleted",
            *(processing.tally[outcome] for outcome in ("done", "failed", "deleted")),
        )
        if unconfirmed := processing.tally["unconfirmed"]:
            raise Failure(f"{unconfirmed} dead letters may be reprocessed again: their removal is not confirmed")
        worker.require_confirmed()

    async with connect(f"dlq_{stream}", no_echo=True) as nc:
        await run_until_refused(nc, work(nc))
