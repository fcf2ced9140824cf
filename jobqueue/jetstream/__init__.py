"""What the server is asked about streams, durables and messages.

A request raises nats.js.errors.APIError where the server answers with an error (NotFoundError where something is
missing), and nats.errors.Error or TimeoutError where it times out or the connection is lost meanwhile.
"""
