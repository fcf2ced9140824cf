"""Durable consumers: how they are created, and what the server says of them."""

import asyncio
import logging
import math
from contextlib import suppress
from typing import Any

from nats.errors import Error
from nats.js.api import ConsumerConfig
from nats.js.errors import APIError, NotFoundError

from jobqueue.connection.client import Client
from jobqueue.errors import Failure, describe_error, printable
from jobqueue.jetstream.streams import api_request, subjects_overlap

log = logging.getLogger(__name__)

CONSUMER_NOT_FOUND, CONSUMER_EXISTS, MAX_ACK_PENDING_TOO_HIGH = 10014, 10148, 10121  # JetStream's error codes
UNUSABLE_FIELDS = ("deliver_subject", "priority_groups", "headers_only")  # of a durable
DURABLE_VALID_FOR = 0.5  # seconds
DEFAULT_MAX_ACK_PENDING = 1000  # the server's
LONGEST_DELAY = "nats_job_queue.longest_delay"  # in a durable's metadata: of its messages that wait for a retry


async def ensure_durable(nc: Client, stream: str, config: ConsumerConfig, *, update: bool = False) -> "Durable":
    """Return what the server says of a durable consumer; create it if it is missing.

    With `update`, change in one that exists the fields that are set in `config`. The others are an operator's, and
    stay. So does `max_ack_pending`, unless it is the server's default.

    Raises:
        Failure: the durable can't be used, or has another filter, which is not changed: the server would skip what
            doesn't match.
    """
    durable, own = config.durable_name, {field: value for field, value in config.as_dict().items() if value}
    subject, reconnects = _create_subject(stream, config), nc.reconnects
    try:
        info = await api_request(nc, f"CONSUMER.INFO.{stream}.{durable}")
    except NotFoundError:
        try:
            made = await _configure(nc, subject, {"stream_name": stream, "config": own, "action": "create"})
            return Durable(made, reconnects)
        except APIError as error:
            if error.err_code != CONSUMER_EXISTS:  # another process has just created it
                raise
            return await ensure_durable(nc, stream, config, update=update)
    current, found = info["config"], Durable(info, reconnects)
    if not update:
        return found
    for field in UNUSABLE_FIELDS:
        if current.get(field):
            raise Failure(
                f"the durable {durable} on {stream} has {field}, and can't be used: delete it by `nats consumer rm -f`"
            )
    if current.get("max_ack_pending") != DEFAULT_MAX_ACK_PENDING:
        _keep_max_ack_pending(stream, current, own)
    if current | own == current:
        return found
    if "filter_subject" in own and found.filters != [own["filter_subject"]]:
        raise Failure(
            f"the durable {durable} on {stream} takes {printable(', '.join(found.filters))}, not "
            f"{own['filter_subject']}; all its processes share that. To change it, stop them, run "
            f"`nats consumer rm -f {stream} {durable}`, and start again: what was skipped is then delivered, "
            "and so are the dead letters"
        )
    return Durable(await _configure(nc, subject, {"stream_name": stream, "config": current | own}), reconnects)


def _keep_max_ack_pending(stream: str, current: dict[str, Any], own: dict[str, Any]) -> None:
    """Let an operator's value stay, and say so."""
    wanted, kept = own.pop("max_ack_pending", None), current.get("max_ack_pending")
    if wanted and wanted != kept:
        command = f"nats consumer edit -f {stream} {current['durable_name']} --max-pending {wanted}"
        log.warning("the durable's max_ack_pending of %s is kept; `%s` sets it to %s", kept, command, wanted)


def _create_subject(stream: str, config: ConsumerConfig) -> str:
    subject = f"CONSUMER.CREATE.{stream}.{config.durable_name}"
    return f"{subject}.{config.filter_subject}" if config.filter_subject else subject


async def _configure(nc: Client, subject: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return await api_request(nc, subject, request)
    except APIError as error:
        if error.err_code != MAX_ACK_PENDING_TOO_HIGH:
            raise
        log.warning("%s; orders that wait for a retry may block others", describe_error(error))
        del request["config"]["max_ack_pending"]
        return await api_request(nc, subject, request)


async def note_delay(nc: Client, stream: str, config: ConsumerConfig, seconds: float) -> None:
    """Note in a durable's metadata how long its messages wait for a retry, if that is longer than ever before.

    Whoever looks for dead letters waits for that long before it asks about a message. Noted, in `config` too, is the
    next power of two, so that it is seldom written.
    """
    noted = 2.0 ** math.ceil(math.log2(max(seconds, 1.0)))
    if noted <= longest_delay(config.metadata):
        return
    info = await api_request(nc, f"CONSUMER.INFO.{stream}.{config.durable_name}")
    current = info["config"]
    metadata = {LONGEST_DELAY: f"{max(noted, longest_delay(current.get('metadata'))):g}"}
    current["metadata"] = (current.get("metadata") or {}) | metadata
    request = {"stream_name": stream, "config": current, "action": "update"}
    await _configure(nc, _create_subject(stream, config), request)
    config.metadata = metadata


def longest_delay(metadata: dict[str, str] | None) -> float:
    """Return the longest delay, in seconds, in a durable's metadata."""
    try:
        return float((metadata or {}).get(LONGEST_DELAY, 0))
    except ValueError:
        return 0.0


class Durable:
    """What the server says of a durable."""

    def __init__(self, info: dict[str, Any], reconnects: int) -> None:
        self.name: str = info["name"]
        self.config: dict[str, Any] = info["config"]  # as it is on the wire
        self.created: str = info["created"]  # by the server's clock
        self.described_at: str = info["ts"]  # when the server said all this, by its own clock
        self.delivered: int = info["delivered"]["stream_seq"]  # the highest one
        self.consumer_seq: int = info["delivered"]["consumer_seq"]  # the number of its last delivery
        self.waiting: int = info["num_pending"]  # messages that it has not delivered yet
        self.pending: int = info["num_ack_pending"]  # messages that are delivered and neither acked nor exhausted
        self.pull_requests: int = info["num_waiting"]  # the open ones
        self.is_paused = bool(info.get("paused"))  # by an operator
        cluster: dict[str, Any] = info.get("cluster") or {}
        self.leader: str | None = cluster.get("leader")  # None on a single server
        self.has_replicas = bool(cluster.get("replicas"))  # these agree on each ack, and one may become the leader
        self.filters: list[str] = self.config.get("filter_subjects") or [self.config.get("filter_subject") or ">"]
        backoff: list[int] = self.config.get("backoff") or [self.config.get("ack_wait", 0)]  # nanoseconds
        self.ack_wait = min(backoff) / 1e9  # seconds until a message is redelivered unless there is a heartbeat
        self.longest_delay = longest_delay(self.config.get("metadata"))  # seconds, of the messages nak'd with a delay
        self.longest_wait = max(max(backoff) / 1e9, self.longest_delay)  # seconds until a retry
        self.reconnects = reconnects  # those of the connection until then

    def takes(self, subject: str) -> bool:
        """Return whether its filter matches a message's subject."""
        return any(subjects_overlap(one, subject) for one in self.filters)


class Durables:
    """What the server says of a stream's durables. An answer is valid for half a second, on one connection."""

    def __init__(self, nc: Client, stream: str) -> None:
        self._nc = nc
        self._stream = stream
        self._found: dict[str, tuple[float, Durable]] = {}  # by name, and when the server was asked
        self._locks: dict[str, asyncio.Lock] = {}
        self._now = asyncio.get_running_loop().time

    async def find(self, name: str, since: float = 0.0) -> Durable | None:
        """Return what the server has said of a durable since a time of the event loop; None if there is none."""
        async with self._locks.setdefault(name, asyncio.Lock()):  # one request answers all that wait
            now, reconnects = self._now(), self._nc.reconnects
            asked_at, found = self._found.get(name, (0.0, None))
            if found and asked_at >= max(since, now - DURABLE_VALID_FOR) and found.reconnects == reconnects:
                return found
            self._found.pop(name, None)
            try:
                info = await api_request(self._nc, f"CONSUMER.INFO.{self._stream}.{name}")
            except NotFoundError as error:
                if error.err_code != CONSUMER_NOT_FOUND:
                    raise
                return None
            self._found[name] = now, Durable(info, reconnects)
            return self._found[name][1]

    async def find_all(self) -> list[Durable]:
        """Return what the server says of each durable of the stream; raise Error while one of them has no leader."""
        found: list[Durable] = []
        while True:
            reconnects = self._nc.reconnects
            page = await api_request(self._nc, f"CONSUMER.LIST.{self._stream}", {"offset": len(found)})
            if page.get("missing"):
                raise Error(f"the durable {printable(page['missing'][0])} does not answer")
            found += [Durable(info, reconnects) for info in page["consumers"] or []]
            if not page["consumers"] or len(found) >= page["total"]:
                return found

    async def has_max_deliver(self, name: str, max_deliver: int) -> bool:
        """Return whether a durable has this MaxDeliver; an operator or another process may have changed it."""
        with suppress(Error, TimeoutError):
            durable = await self.find(name)
            return bool(durable and durable.config["max_deliver"] == max_deliver)
        return False
