"""What the server is asked about streams, durables and messages."""
