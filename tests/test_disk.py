"""A disk that is full, and a disk that fails: what was acknowledged stays, what was not is refused in words."""

import shutil
import subprocess
import time

import pyarrow as pa
import pytest

from support import flight as calls
from support import power
from support.process import Server, pinion
from support.wait import until

DEFINITION = """
[table]
name = "writes"
entity = [{ name = "id", type = "int64" }]

[features]
text = "string"
"""
SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), ("text", pa.string())])


def rows(first, count=200):
    ids = range(first, first + count)
    return pa.Table.from_pydict({"id": ids, "text": [f"{n:01000}" for n in ids]}, schema=SCHEMA)


def put_until_refused(client, first, limit):
    """Puts until one fails; returns the ids acknowledged and what the failure said."""
    acknowledged = set()
    for number in range(limit):
        batch = rows(first + number * 200)
        try:
            assert calls.put(client, "writes", batch)[-1]["durable"] is True
        except pa.ArrowException as refused:
            return acknowledged, str(refused)
        acknowledged.update(batch["id"].to_pylist())
    raise AssertionError(f"{limit} puts of 200 kB were all acknowledged")


def ids(client):
    return set(calls.scan(client, "writes", features=["id"])["id"].to_pylist())


@pytest.mark.skipif(power.unavailable() is not None, reason=str(power.unavailable()))
def test_a_full_disk_refuses_puts_serves_reads_and_goes_on_when_there_is_room(tmp_path):
    disk = power.Disk(tmp_path, megabytes=200)
    try:
        data = disk.mount_point / "data"
        definition = tmp_path / "writes.toml"
        definition.write_text(DEFINITION)
        pinion("init", "--data", data)
        pinion("apply", "--data", data, definition)
        with Server(data, env={"PINION__STORE__DELTA_MAX_BYTES": 4 << 20}) as server:
            client = calls.connect(server)
            calls.put(client, "writes", rows(0))
            ballast = disk.mount_point / "ballast"
            free = shutil.disk_usage(disk.mount_point).free
            subprocess.run(["fallocate", "-l", str(free - (20 << 20)), str(ballast)], check=True)
            acknowledged, refused = put_until_refused(client, 1_000, limit=600)
            assert "space" in refused.lower() or "log" in refused.lower(), refused
            before = ids(client)
            assert acknowledged | set(range(200)) == before

            ballast.unlink()
            last = until(lambda: retried(client), 30, "puts being taken again")
            assert last["durable"] is True
            assert ids(client) == before | set(range(900_000, 900_200))
            server.kill()
        pinion("check", "--data", data)
        with Server(data) as server:
            assert ids(calls.connect(server)) == before | set(range(900_000, 900_200))
    finally:
        disk.unmount()


def retried(client):
    try:
        return calls.put(client, "writes", rows(900_000))[-1]
    except pa.ArrowException:
        return None


def can_inject():
    """True when strace may attach to a process here."""
    if shutil.which("strace") is None:
        return False
    with subprocess.Popen(["sleep", "5"]) as sleeper:
        tried = subprocess.run(
            ["timeout", "1", "strace", "-p", str(sleeper.pid)], capture_output=True, text=True, check=False
        )
        sleeper.kill()
    return "attached" in tried.stderr


@pytest.mark.skipif(
    not can_inject(), reason="failing syscalls are injected with strace, which is missing or may not attach"
)
def test_after_a_failed_sync_nothing_is_acknowledged_and_the_reason_is_told(store, serve):
    store.apply(DEFINITION)
    server = serve()
    client = calls.connect(server)
    calls.put(client, "writes", rows(0))
    inject = ["-e", "inject=fdatasync,fsync,msync,sync_file_range:error=EIO", "-e", "trace=fdatasync,fsync,msync"]
    with subprocess.Popen(
        ["strace", "-f", "-q", "-o", "/dev/null", *inject, "-p", str(server.process.pid)], stderr=subprocess.DEVNULL
    ) as strace:
        time.sleep(0.5)
        with pytest.raises(pa.ArrowException) as first:
            calls.put(client, "writes", rows(1_000))
        strace.terminate()
    # The disk is well again, but nobody knows what the failed sync lost: no put is acknowledged any more.
    with pytest.raises(pa.ArrowException, match="read-only") as second:
        calls.put(client, "writes", rows(2_000))
    assert "restart" in str(second.value), (str(first.value), str(second.value))
    assert ids(client) >= set(range(200))
    (stats,) = calls.action(client, "stats", table="writes")
    assert stats["tables"][0]["read_only"], stats
    server.kill()
    server.start()
    client = calls.connect(server)
    assert ids(client) >= set(range(200))
    assert calls.put(client, "writes", rows(3_000))[-1]["durable"] is True
