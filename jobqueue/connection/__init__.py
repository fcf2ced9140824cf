"""A connection to NATS: nats-py with its faults worked around."""
