"""What becomes of a durable: it is created, its own fields are set, and an operator's edits stay."""

import asyncio
import shlex
from contextlib import AsyncExitStack
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from tests.harness import CONSUMER, DLQ, Server, durable_info, emptied, has_pull_request, publish, request, until

OPERATORS = {"max_ack_pending": 77, "max_waiting": 33, "inactive_threshold": 10**15, "metadata": {"team": "shop"}}


def create_subject(stream: str, config: dict[str, Any]) -> str:
    parts = ("CONSUMER.CREATE", stream, config["durable_name"], config.get("filter_subject"))
    return ".".join(filter(None, parts))


async def test_what_an_operator_has_edited_stays(server: Server, nc: Client) -> None:
    for command, stream, durable in (
        (CONSUMER, "orders_stream", "processor"),
        (DLQ, "orders_unprocessed", "unprocessed_order_handler"),
    ):
        own = {"durable_name": durable, "ack_policy": "explicit", "max_deliver": 9}
        config = OPERATORS | own | ({"filter_subject": "orders.*"} if command == CONSUMER else {})
        answer = await request(nc, create_subject(stream, config), {"stream_name": stream, "config": config})
        assert "error" not in answer, answer

        async def is_updated() -> bool:
            config = (await durable_info(nc, stream, durable))["config"]  # noqa: B023
            return bool(config["max_deliver"] == (2 if command == CONSUMER else -1))  # noqa: B023

        async with server.script(*command) as running:
            edit = await running.line("the durable's max_ack_pending of 77 is kept; `(.*)` sets it to 100000")
            await until(is_updated)
            assert await running.stop() == 0
        config = (await durable_info(nc, stream, durable))["config"]
        assert config["metadata"].pop("team") == "shop"
        assert config | OPERATORS | {"metadata": config["metadata"]} == config
        edited = await server.run(*shlex.split(edit))
        assert edited.process.returncode == 0, edited.lines
        assert (await durable_info(nc, stream, durable))["config"]["max_ack_pending"] == 100_000


async def test_a_durable_that_is_as_it_should_be_is_not_updated(server: Server, nc: Client) -> None:
    seen: list[str] = []

    async def see(message: Msg) -> None:
        seen.append(message.subject)

    async with server.script(*CONSUMER, "--failure-rate", "0") as first:
        await durable_info(nc, "orders_stream", "processor")
        await nc.subscribe("$JS.API.CONSUMER.CREATE.>", cb=see)
        await nc.flush()
        async with server.script(*CONSUMER, "--failure-rate", "0") as second:
            await publish(nc, *(b"order-%d" % i for i in range(20)))
            await emptied(nc, "orders_stream")
            assert await first.stop() == await second.stop() == 0
    assert not seen


async def test_an_operators_limits_of_pull_requests_are_kept(server: Server, nc: Client) -> None:
    """From when a request is refused on, without a restart."""
    async with server.script(*CONSUMER, "--concurrency", "40", "--failure-rate", "0") as running:
        await until(lambda: has_pull_request(nc, "orders_stream", "processor"))  # so it has seen the old limits
        config = (await durable_info(nc, "orders_stream", "processor"))["config"]
        payload = {"stream_name": "orders_stream", "config": config | {"max_batch": 5, "max_expires": 10**9}}
        assert "error" not in await request(nc, create_subject("orders_stream", config), payload)
        await running.line("orders_stream: 409 Exceeded MaxRequest.*; trying again")
        await running.line("orders_stream is back")
        await publish(nc, *(b"order-%d" % i for i in range(200)))
        await emptied(nc, "orders_stream")
        assert await running.stop() == 0
    assert len(running.lines) == 200 + 4


async def test_many_idle_consumers_do_not_use_up_the_pull_requests_of_a_durable(server: Server, nc: Client) -> None:
    """The server takes 512 for all processes together."""
    processes = 7
    async with AsyncExitStack() as stack:
        script = (*CONSUMER, "--concurrency", "100", "--failure-rate", "0")
        consumers = [await stack.enter_async_context(server.script(*script)) for _ in range(processes)]

        async def are_all_waiting() -> bool:
            return bool((await durable_info(nc, "orders_stream", "processor"))["num_waiting"] >= processes)

        await until(are_all_waiting)
        for i in range(300):  # one by one, so that each is a reason to ask for another one
            await publish(nc, b"order-%d" % i)
        await emptied(nc, "orders_stream")
        assert (await durable_info(nc, "orders_stream", "processor"))["num_waiting"] < 10 * processes
        for consumer in consumers:
            assert await consumer.stop() == 0
            assert not consumer.found(".*; trying again")


@pytest.mark.parametrize(
    "fields",
    [
        {"deliver_subject": "elsewhere"},
        {"priority_groups": ["a"]},
        {"headers_only": True},
        {"replay_policy": "original"},  # which can't be updated
    ],
)
async def test_a_durable_that_takes_no_pull_requests_of_ours_is_refused(
    server: Server, nc: Client, fields: dict[str, Any]
) -> None:
    config: dict[str, Any] = {"durable_name": "processor", "ack_policy": "explicit", "filter_subject": "orders.*"}
    config |= fields | ({"priority_policy": "overflow"} if "priority_groups" in fields else {})
    answer = await request(
        nc, create_subject("orders_stream", config), {"stream_name": "orders_stream", "config": config}
    )
    if "error" in answer or not answer["config"].get(next(iter(fields))):
        pytest.skip("this nats-server doesn't know that")
    async with asyncio.timeout(20):  # seconds; transient errors are retried for 30
        consumer = await server.run(*CONSUMER)
    assert consumer.process.returncode == 1
    assert len(consumer.lines) == 1
    assert consumer.found("cannot create the durable processor .*|the durable processor on orders_stream has .*")
    assert (await durable_info(nc, "orders_stream", "processor"))["config"] == answer["config"]
