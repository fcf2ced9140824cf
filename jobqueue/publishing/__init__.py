"""Publishing to a stream."""
