"""The table `users`, a test double of the server that has it pinned, and a client of it."""

import os
import subprocess
import sys
import textwrap
from decimal import Decimal

import numpy as np
import pinion
import pyarrow as pa
import pytest

from .pins import StubServer, TestPin
from .process import REPOSITORY

ROWS = 20


def users(version=0, rows=ROWS):
    """A table of many types; some values are null."""

    def some(values, data_type, step=7):
        return pa.array([None if i % step == 3 else v for i, v in enumerate(values)], data_type)

    ids = range(rows)
    embedding = pa.list_(pa.float32(), 4)
    struct = pa.struct([pa.field("low", pa.int16()), pa.field("name", pa.string())])
    return pa.table(
        {
            "user": pa.array([i * 10 for i in ids], pa.int64()),
            "age": some([i + version for i in ids], pa.int32()),
            "score": some([i / 4 + version for i in ids], pa.float32()),
            "rank": some([-i - version for i in ids], pa.float32(), 5),
            "half": some([np.float16(i) for i in ids], pa.float16()),
            "count": pa.array([i * 3 + version for i in ids], pa.uint16()),
            "on": some([i % 2 == 0 for i in ids], pa.bool_()),
            "at": some([1_700_000_000_000_000 + i for i in ids], pa.timestamp("us", tz="UTC")),
            "price": some([Decimal(i) / 100 for i in ids], pa.decimal128(9, 2)),
            "name": some([f"user {i}" + " with a long name" * (i % 3) + f" v{version}" for i in ids], pa.string()),
            "code": some([f"c{i % 4}" for i in ids], pa.dictionary(pa.int16(), pa.string())),
            "raw": some([bytes([i]) * i for i in ids], pa.large_binary()),
            "hash": some([bytes([i]) * 16 for i in ids], pa.binary(16)),
            "tags": some([[f"t{j} of {i}, and more" for j in range(i % 4)] for i in ids], pa.list_(pa.string())),
            "seen": some([[i, None] if i % 2 else [] for i in ids], pa.large_list(pa.int32())),
            "embedding": some([[i + j / 10 for j in range(4)] for i in ids], embedding, 6),
            "pair": some([{"low": i if i % 2 else None, "name": f"n{i}"} for i in ids], struct),
        }
    )


ALL_FLOATS = ["score", "rank"]


@pytest.fixture
def stub():
    server = StubServer({"users": TestPin(users(), ["user"], slots=3)})
    yield server
    server.stop()


@pytest.fixture
def client(stub):
    with pinion.connect(stub.url) as connected:
        yield connected


@pytest.fixture
def pin(client):
    return client.pin("users")


def leased(stub):
    return len(stub.leases)


def released(stub):
    return stub.wait(lambda: not stub.leases)


def in_child(code, *arguments):
    """Runs Python with the client importable; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "python")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout
