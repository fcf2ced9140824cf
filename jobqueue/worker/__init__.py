"""A process's share of the work on a durable."""
