"""A TCP proxy between a process and its server, which can be cut and can drop what it should pass on."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

# The other servers of a cluster, of which a server tells its clients, which would go round the proxy.
ADVERTISED = re.compile(rb'(?<="connect_urls":\[)[^]]*')


class Proxy:
    """Passes bytes on, unless told otherwise.

    `drops` is called with each piece, whichever way it goes, and the connection is cut instead of passing on
    a piece for which it returns True.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.drops: Callable[[bytes], bool] = lambda _: False
        self.is_cut = False
        self.delay = 0.0  # seconds, each way
        self.rate = math.inf  # bytes a second, each way
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Close every connection; while cut, new ones are closed at once."""
        self.is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def stall(self) -> None:
        """Read nothing more from the connections of now, without a word to either side; new ones work."""
        for writer in self._writers:
            writer.transport.pause_reading()  # type: ignore[attr-defined]

    def restore(self) -> None:
        self.is_cut = False
        for writer in self._writers:
            writer.transport.resume_reading()  # type: ignore[attr-defined]

    def cut_instead_of(self, part: bytes) -> asyncio.Event:
        """Cut the connection once, instead of passing on a piece that has this in it, and set the event then."""
        has_cut = asyncio.Event()

        def drops(piece: bytes) -> bool:
            if part not in piece:
                return False
            self.drops = lambda _: False
            has_cut.set()
            return True

        self.drops = drops
        return has_cut

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # the server is down
            writer.transport.abort()
            return
        both = {writer, server_writer}
        self._writers |= both
        try:
            with suppress(OSError):
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._pump(reader, server_writer))
                    tasks.create_task(self._pump(server_reader, writer))
        finally:
            self._writers -= both
            for one in both:
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def pass_on() -> None:
            with suppress(OSError):
                while (item := await late.get())[1]:
                    await asyncio.sleep(max(item[0] - loop.time(), 0) + len(item[1]) / self.rate)
                    writer.write(item[1])
                    await writer.drain()
            writer.transport.abort()

        passing = asyncio.create_task(pass_on())
        with suppress(OSError):
            while piece := await reader.read(2**16):
                if self.drops(piece):
                    break
                late.put_nowait((loop.time() + self.delay, ADVERTISED.sub(_blanked, piece)))
        late.put_nowait((0, b""))
        await passing


def _blanked(found: re.Match[bytes]) -> bytes:
    return b" " * len(found[0])


@asynccontextmanager
async def proxied(target: int) -> AsyncIterator[Proxy]:
    """Run a proxy to a port of this machine."""
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        proxy.cut()
        server.close()


class Link:
    """The proxies of some processes, one to each server."""

    def __init__(self, proxies: list[Proxy]) -> None:
        self._proxies = proxies

    @property
    def url(self) -> str:
        return ",".join(proxy.url for proxy in self._proxies)

    def cut(self) -> None:
        for proxy in self._proxies:
            proxy.cut()

    def stall(self) -> None:
        for proxy in self._proxies:
            proxy.stall()

    def restore(self) -> None:
        for proxy in self._proxies:
            proxy.restore()

    def delay(self, seconds: float) -> None:
        for proxy in self._proxies:
            proxy.delay = seconds


@asynccontextmanager
async def linked(*targets: int) -> AsyncIterator[Link]:
    """Run a proxy to each of these ports of this machine."""
    async with AsyncExitStack() as stack:
        yield Link([await stack.enter_async_context(proxied(target)) for target in targets])
