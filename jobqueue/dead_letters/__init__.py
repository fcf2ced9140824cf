"""Dead letters: which there are, their reprocessing, and what an operator does with them.

Each coroutine raises nats.errors.Error where a request times out, is refused, or the connection is lost meanwhile.
"""
