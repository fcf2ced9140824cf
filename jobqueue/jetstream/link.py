"""How many bytes to have in transit on a link of unknown speed."""

import asyncio

MIN_RATE = 64 * 1024  # bytes a second (0.5 Mbit/s); timeouts allow for a link as slow as that
MIN_WINDOW = 128 * 1024  # bytes, while nothing is known of the link
OVERHEAD = 256  # bytes of a message for its subjects and its headers
INTERVAL = 0.1  # seconds of one measurement
DECAY = 0.9  # of the measured rate in each interval in which less came: there may have been less to come


def transfer_time(size: int) -> float:
    """Return the seconds that so many bytes take on the slowest link."""
    return size / MIN_RATE


class LinkWindow:
    """As many bytes as the link was seen to carry within some seconds: nothing waits for longer behind them.

    While the window is what limits the throughput, it grows until the link does, up to `largest` bytes.
    """

    def __init__(self, seconds: float, largest: int) -> None:
        self.size = MIN_WINDOW
        self.rate = 0.0  # bytes a second
        self._seconds = seconds
        self._largest = largest
        self._since = asyncio.get_running_loop().time()
        self.carried = 0  # bytes, which the owner counts

    def update(self, now: float) -> None:
        """Recompute the size from the bytes that were carried since the last time."""
        elapsed = now - self._since
        if elapsed >= INTERVAL:
            self.rate = max(self.carried / elapsed, DECAY * self.rate)
            self.size = min(max(MIN_WINDOW, int(self.rate * self._seconds)), self._largest)
            self._since += elapsed
            self.carried = 0
