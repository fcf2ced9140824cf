"""How many messages are dead, by what the server counts. While messages come and go it is a few more or less."""

from typing import Any

from nats.errors import Error

from jobqueue.connection.client import Client
from jobqueue.jetstream.durables import Durable, Durables
from jobqueue.jetstream.streams import api_request


async def count_dead(nc: Client, stream: str, durables: list[Durable]) -> list[int]:
    """Return for each durable how many of the messages that it takes are stored, less the waiting and pending ones."""
    info = await api_request(nc, f"STREAM.INFO.{stream}")
    if info["config"]["retention"] != "workqueue":
        raise Error(f"{stream} is no work queue, and keeps what is done")
    return [await _count_stored(nc, info, durable) - durable.waiting - durable.pending for durable in durables]


async def read_status(nc: Client, dlq_stream: str, stream: str) -> dict[str, Any]:
    """Return the state of a queue in a few numbers."""
    durables = await Durables(nc, stream).find_all()
    info, dlq = [await api_request(nc, f"STREAM.INFO.{name}") for name in (stream, dlq_stream)]
    dead, untaken = await count_dead(nc, stream, durables), 0
    if not any(_takes_all(durable, info) for durable in durables):
        subjects = await _count_by_subject(nc, stream, ">")
        untaken = sum(n for subject, n in subjects.items() if not any(one.takes(subject) for one in durables))
    return {
        "waiting": sum(durable.waiting for durable in durables),
        "pending": sum(durable.pending for durable in durables),
        "dead": max(0, sum(dead)),
        "untaken": untaken,  # no durable's filter matches them
        "oldest": info["state"]["first_ts"] if info["state"]["messages"] else None,
        "pull_requests": sum(durable.pull_requests for durable in durables),
        "paused": [durable.name for durable in durables if durable.is_paused],
        "streams": {one["config"]["name"]: _fullness(one) for one in (info, dlq)},
    }


def _fullness(info: dict[str, Any]) -> dict[str, Any]:
    """Return how full a stream is: `full` is the share of the limit that is nearer, 0 without a limit."""
    state, config = info["state"], info["config"]
    limits = {"messages": config["max_msgs"], "bytes": config["max_bytes"]}
    full = max((state[name] / limit for name, limit in limits.items() if limit > 0), default=0.0)
    return {"messages": state["messages"], "bytes": state["bytes"], "full": round(full, 3)}


async def _count_stored(nc: Client, info: dict[str, Any], durable: Durable) -> int:
    if _takes_all(durable, info):
        return int(info["state"]["messages"])
    counts = [await _count_by_subject(nc, info["config"]["name"], one) for one in durable.filters]
    return sum(sum(count.values()) for count in counts)


def _takes_all(durable: Durable, info: dict[str, Any]) -> bool:
    """Return whether a durable takes all that the stream may have; then no list of subjects is needed."""
    return ">" in durable.filters or set(info["config"].get("subjects") or [">"]) <= set(durable.filters)


async def _count_by_subject(nc: Client, stream: str, subject: str) -> dict[str, int]:
    """Return how many messages are stored of each subject that matches; an answer has 100,000 subjects at most."""
    found: dict[str, int] = {}
    while True:
        page = await api_request(nc, f"STREAM.INFO.{stream}", {"subjects_filter": subject, "offset": len(found)})
        some = page["state"].get("subjects") or {}
        found |= some
        if not some or len(found) >= page.get("total", 0):
            return found
