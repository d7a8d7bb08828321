"""What the tests share: the binary and server as processes, the broker, Flight calls, the oracle."""
