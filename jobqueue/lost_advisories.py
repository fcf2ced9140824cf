"""Dead letters without an advisory: the server's was lost, or its own deliveries are exhausted."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from nats.aio.client import Client
from nats.errors import Error
from nats.js import JetStreamContext
from nats.js.api import ConsumerInfo, RetentionPolicy
from nats.js.errors import NotFoundError

from jobqueue.dead_letters import ADVISORY, REMOVE_TIMEOUT, DeadLetter
from jobqueue.errors import describe_error
from jobqueue.in_flight import ACK

log = logging.getLogger(__name__)

TYPE = "io.nats.jetstream.advisory.v1.max_deliver"
SEARCH_INTERVAL = 5.0  # seconds between two searches


async def keep_publishing(nc: Client, dlq_stream: str, stream: str, settling_time: float) -> None:
    """Find the dead letters that have no advisory, and publish one for each, again and again.

    A message is a dead letter when its durable has nothing left to deliver or to wait for, and the stream still has
    it. Any number of processes may search at the same time: within the duplicate window they publish one advisory.

    Args:
        nc: the connection.
        dlq_stream: the stream of the advisories.
        stream: the stream of the messages.
        settling_time: seconds for which that must have been so; on replicas acks and advisories arrive late.
    """
    complaint = ""
    while True:
        try:
            await _publish_lost(nc, dlq_stream, stream, settling_time)
            complaint = ""
        except Exception as error:  # whatever it is, the next search comes
            if complaint != describe_error(error):
                complaint = describe_error(error)
                log.warning("cannot look for dead letters without an advisory: %s; trying again", complaint)
        await asyncio.sleep(SEARCH_INTERVAL)


async def _publish_lost(nc: Client, dlq_stream: str, stream: str, settling_time: float) -> None:
    js = nc.jetstream()
    if (await js.stream_info(stream)).config.retention != RetentionPolicy.WORK_QUEUE:
        raise Error(f"{stream} is no work queue, and keeps what is done")
    before = await _idle_durables(js, stream, dlq_stream)
    await asyncio.sleep(settling_time)
    durables = [before[key] for key in await _idle_durables(js, stream, dlq_stream) if key in before]
    exhausted = [durable for durable in durables if durable.stream_name == dlq_stream]
    if not exhausted:
        return  # advisories are being delivered
    for durable in exhausted:
        async for advisory in _undelivered(js, durable):
            await nc.request(advisory.ack_subject, ACK, timeout=REMOVE_TIMEOUT)
    for durable in durables:
        if durable.stream_name == stream:
            async for dead_letter in _undelivered(js, durable):
                await _publish_advisory(js, dead_letter)


async def _idle_durables(js: JetStreamContext, *streams: str) -> dict[tuple[str, str, datetime], ConsumerInfo]:
    """Return the durables that have nothing to deliver and nothing to wait for."""
    return {
        (stream, durable.name, durable.created): durable
        for stream in streams
        for durable in await js.consumers_info(stream)
        if durable.num_pending == 0 and durable.num_ack_pending == 0
    }


async def _undelivered(js: JetStreamContext, durable: ConsumerInfo) -> AsyncIterator[DeadLetter]:
    """Yield what the stream still has of all that an idle durable has delivered."""
    stream, config = durable.stream_name, durable.config
    last = durable.delivered.stream_seq if durable.delivered else 0
    for subject in config.filter_subjects or [config.filter_subject or ">"]:
        sequence = 0
        while sequence < last:
            try:
                message = await js.get_msg(stream, sequence + 1, subject, next=True)
            except NotFoundError:
                break
            sequence = message.seq or last
            if sequence <= last:
                yield DeadLetter(stream, durable.name, max(config.max_deliver or 1, 1), sequence)


async def _publish_advisory(js: JetStreamContext, dead_letter: DeadLetter) -> None:
    """Publish an advisory like the server's own."""
    message_id = f"{dead_letter.stream}.{dead_letter.consumer}.{dead_letter.sequence}"
    advisory = {
        "type": TYPE,
        "id": message_id,
        "timestamp": datetime.now(UTC).isoformat(),
        "stream": dead_letter.stream,
        "consumer": dead_letter.consumer,
        "stream_seq": dead_letter.sequence,
        "deliveries": dead_letter.deliveries,
    }
    subject = f"{ADVISORY}.{dead_letter.stream}.{dead_letter.consumer}"
    stored = await js.publish(subject, json.dumps(advisory).encode(), headers={"Nats-Msg-Id": message_id})
    if not stored.duplicate:
        log.info("dead letter # %d in %s had no advisory left: published one", dead_letter.sequence, dead_letter.stream)
