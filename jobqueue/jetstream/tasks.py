"""Several requests at a time: never more than the connection and the memory can take."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

AT_A_TIME = 64

T = TypeVar("T")
R = TypeVar("R")


async def run_all(coroutines: Iterable[Coroutine[Any, Any, R]]) -> list[R]:
    """Return what the coroutines return; at the first error cancel the others, and raise it as it is.

    No TaskGroup: after an error that of Python 3.11.2 leaves its own task cancelled, so that a later time-out ends it.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def run_for_each(items: Iterable[T], call: Callable[[T], Awaitable[None]]) -> None:
    """Call a function with each item, AT_A_TIME of them; at the first error cancel the others, and raise it.

    A task for each of 100,000 items would block the event loop until the requests of the first ones time out.
    """
    iterator = iter(items)

    async def work() -> None:
        for item in iterator:
            await call(item)

    await run_all(work() for _ in range(AT_A_TIME))
