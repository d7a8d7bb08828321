"""Tables fed from a topic, and waiting until they have read it."""

from support import flight as calls
from support.wait import until


def caught_up(client, table, topic, ends):
    """True when the table's positions reached `ends` ({partition: next offset})."""
    _, found = calls.scan_with_positions(client, table, limit=1)
    reached = found.get(topic, {})
    return all(reached.get(partition, 0) >= offset for partition, offset in ends.items())


def wait_caught_up(server, client, table, log, seconds=60):
    """Waits until the table has everything that was produced."""
    log.flush()
    ends = log.ends()

    def done():
        assert server.alive(), f"the server exited {server.process.returncode}\n{server.log_text()}"
        return caught_up(client, table, log.topic, ends)

    until(done, seconds, f"{table} reading {log.topic} up to {ends}", why=server.log_text)
