"""Durable consumers: how they are created, and what the server says of them."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

from nats.aio.client import Client
from nats.errors import Error
from nats.js.api import ConsumerConfig
from nats.js.errors import APIError, NotFoundError

from jobqueue.errors import Failure, describe_error, printable
from jobqueue.streams import api_request

log = logging.getLogger(__name__)

CONSUMER_NOT_FOUND, CONSUMER_EXISTS, MAX_ACK_PENDING_TOO_HIGH = 10014, 10148, 10121  # JetStream's error codes
UNUSABLE_FIELDS = ("deliver_subject", "priority_groups", "headers_only")  # of a durable
DURABLE_VALID_FOR = 0.5  # seconds
DEFAULT_MAX_ACK_PENDING = 1000  # the server's


async def ensure_durable(nc: Client, stream: str, config: ConsumerConfig, *, update: bool = False) -> dict[str, Any]:
    """Return what the server says of a durable consumer; create it if it is missing.

    Args:
        nc: the connection.
        stream: the stream's name.
        config: the fields that are set here are its own.
        update: whether to change its own fields in a durable that exists. The others are an operator's, and stay.
            So does `max_ack_pending`, unless it is the server's default.

    Raises:
        Failure: the durable can't be used, or has another filter, which is not changed: the server would skip what
            doesn't match.
        nats.errors.Error: the request timed out or was refused.
    """
    durable, own = config.durable_name, {field: value for field, value in config.as_dict().items() if value}
    subject = f"CONSUMER.CREATE.{stream}.{durable}" + (f".{config.filter_subject}" if config.filter_subject else "")
    try:
        info = await api_request(nc, f"CONSUMER.INFO.{stream}.{durable}")
    except NotFoundError:
        try:
            return await _configure(nc, subject, {"stream_name": stream, "config": own, "action": "create"})
        except APIError as error:
            if error.err_code != CONSUMER_EXISTS:  # another process has just created it
                raise
            return await ensure_durable(nc, stream, config, update=update)
    current = info["config"]
    if not update:
        return info
    for field in UNUSABLE_FIELDS:
        if current.get(field):
            raise Failure(
                f"the durable {durable} on {stream} has {field}, and can't be used: delete it by `nats consumer rm -f`"
            )
    if current.get("max_ack_pending") != DEFAULT_MAX_ACK_PENDING:
        _keep_max_ack_pending(stream, current, own)
    if current | own == current:
        return info
    if "filter_subject" in own and (filters := subject_filters(current)) != [own["filter_subject"]]:
        raise Failure(
            f"the durable {durable} on {stream} takes {printable(', '.join(filters))}, not {own['filter_subject']}; "
            "all its processes share that. To change it, stop them, run "
            f"`nats consumer rm -f {stream} {durable}`, and start again: what was skipped is then delivered, "
            "and so are the dead letters"
        )
    return await _configure(nc, subject, {"stream_name": stream, "config": current | own})


def _keep_max_ack_pending(stream: str, current: dict[str, Any], own: dict[str, Any]) -> None:
    """Let an operator's value stay, and say so."""
    wanted, kept = own.pop("max_ack_pending", None), current.get("max_ack_pending")
    if wanted and wanted != kept:
        command = f"nats consumer edit -f {stream} {current['durable_name']} --max-pending {wanted}"
        log.warning("the durable's max_ack_pending of %s is kept; `%s` sets it to %s", kept, command, wanted)


async def _configure(nc: Client, subject: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return await api_request(nc, subject, request)
    except APIError as error:
        if error.err_code != MAX_ACK_PENDING_TOO_HIGH:
            raise
        log.warning("%s; orders that wait for a retry may block others", describe_error(error))
        del request["config"]["max_ack_pending"]
        return await api_request(nc, subject, request)


def shortest_ack_wait(config: dict[str, Any]) -> float:
    """Return the seconds until a message of a durable is redelivered unless there is a heartbeat."""
    return float(min(config.get("backoff") or [config["ack_wait"]])) / 1e9


def subject_filters(config: dict[str, Any]) -> list[str]:
    """Return the subject filters of a durable."""
    return config.get("filter_subjects") or [config.get("filter_subject") or ">"]


class Durables:
    """What the server says of a stream's durables. Answers are cached for half a second."""

    def __init__(self, nc: Client, stream: str) -> None:
        self._nc = nc
        self._stream = stream
        self._answers: dict[str, tuple[float, dict[str, Any]]] = {}
        self._now = asyncio.get_running_loop().time

    async def find(self, durable: str) -> dict[str, Any] | None:
        """Return what the server says of a durable; None if there is none.

        Raises:
            nats.errors.Error: the request timed out.
        """
        asked_at, answer = self._answers.get(durable, (0.0, {}))
        if not answer or self._now() > asked_at + DURABLE_VALID_FOR:
            try:
                answer = await api_request(self._nc, f"CONSUMER.INFO.{self._stream}.{durable}")
            except NotFoundError as error:
                if error.err_code != CONSUMER_NOT_FOUND:
                    raise
                return None
            self._answers[durable] = self._now(), answer
        return answer

    def forget(self, durable: str) -> None:
        """Drop a durable's cached answer."""
        self._answers.pop(durable, None)

    async def has_max_deliver(self, durable: str, max_deliver: int) -> bool:
        """Return whether a durable has this MaxDeliver; an operator or another process may have changed it."""
        with suppress(Error, TimeoutError):
            info = await self.find(durable)
            return bool(info and info["config"]["max_deliver"] == max_deliver)
        return False


async def list_durables(nc: Client, stream: str) -> list[dict[str, Any]]:
    """Return what the server says of each durable of a stream."""
    found: list[dict[str, Any]] = []
    while True:
        page = await api_request(nc, f"CONSUMER.LIST.{stream}", {"offset": len(found)})
        found += page["consumers"] or []
        if not page["consumers"] or len(found) >= page["total"]:
            return found
