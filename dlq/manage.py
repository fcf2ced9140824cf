"""Show the state of a queue; list dead letters, redrive or discard them. The same as `python -m jobqueue.manage`.

Usage:
    python dlq/manage.py orders_unprocessed orders_stream list
"""

import os
import runpy
import signal

for signum in (signal.SIGINT, signal.SIGTERM):  # Until `run`. As process 1, Linux ignores what has no handler.
    signal.signal(signum, lambda signum, _: os._exit(128 + signum))

if __name__ == "__main__":
    runpy.run_module("jobqueue.manage", run_name="__main__")
