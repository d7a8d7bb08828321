"""Fills a redis-server with rows of an Arrow file: a hash `e:<rank>` and a packed value `p:<rank>` for each."""

import subprocess

import numpy as np
import pyarrow as pa
import serving


def fill(redis, source, step, chunk=50_000):
    """Every `step`-th row. Returns how many; the server then holds twice as many keys."""
    ids = np.arange(0, source.num_rows, step)
    with subprocess.Popen(
        ["redis-cli", "-s", str(redis.uds), "--pipe"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False
    ) as pipe:
        for first in range(0, len(ids), chunk):
            for piece in commands(source.take(pa.array(ids[first : first + chunk])), first):
                pipe.stdin.write(piece)
        said, _ = pipe.communicate()
    assert pipe.returncode == 0 and b"errors: 0" in said, said
    assert int(redis.cli("dbsize")) == 2 * len(ids), redis.cli("dbsize")
    assert redis.cli("save") == "OK"
    return len(ids)


def commands(rows, first_rank):
    """The commands of some rows in Redis's own protocol."""
    names, columns = serving.FEATURES, [values(rows[name].combine_chunks()) for name in serving.FEATURES]
    heads = [b"$%d\r\n%s\r\n" % (len(name), name.encode()) for name in names]
    texts = [name for name in names if pa.types.is_string(serving.SCHEMA.field(name).type)]
    count = 2 + 2 * len(names)
    for number, row in enumerate(zip(*columns)):
        rank = first_rank + number
        hash_of = b"".join(b"%s$%d\r\n%s\r\n" % (head, len(value), value) for head, value in zip(heads, row))
        packed = b"".join(row[: -len(texts)]) + b"\0".join(row[-len(texts) :])
        yield b"*%d\r\n$4\r\nHSET\r\n$14\r\ne:%012d\r\n%s" % (count, rank, hash_of)
        yield b"*3\r\n$3\r\nSET\r\n$14\r\np:%012d\r\n$%d\r\n%s\r\n" % (rank, len(packed), packed)


def values(column):
    """The bytes of each value."""
    if pa.types.is_string(column.type):
        return [text.encode() for text in column.to_pylist()]
    width = column.type.bit_width // 8
    raw = np.ascontiguousarray(column.to_numpy()).tobytes()
    return [raw[at : at + width] for at in range(0, len(raw), width)]
