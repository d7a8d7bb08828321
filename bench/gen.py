"""Seeded data for the benchmarks: one wide table, as Parquet files or as Arrow tables.

A row: `id` (int64 key), `at` (event time), and 20 features: ten float64, four int64, two float32, two int32, a
category and a longer text. About 200 bytes as Arrow, so that 10 million rows are 2 GB.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

DEFINITION = """
[table]
name = "wide"
entity = [{ name = "id", type = "int64" }]
event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
history = "latest"

[features]
""" + "".join(
    [f'd{n} = "float64"\n' for n in range(10)]
    + [f'i{n} = "int64"\n' for n in range(4)]
    + [f'f{n} = "float32"\n' for n in range(2)]
    + [f's{n} = "int32"\n' for n in range(2)]
    + ['category = "string"\n', 'label = "string"\n']
)
FEATURES = 20
START_MICROS = 1_700_000_000_000_000
SCHEMA = pa.schema(
    [pa.field("id", pa.int64(), nullable=False), pa.field("at", pa.timestamp("us", tz="UTC"), nullable=False)]
    + [(f"d{n}", pa.float64()) for n in range(10)]
    + [(f"i{n}", pa.int64()) for n in range(4)]
    + [(f"f{n}", pa.float32()) for n in range(2)]
    + [(f"s{n}", pa.int32()) for n in range(2)]
    + [("category", pa.string()), ("label", pa.string())]
)
CATEGORIES = pa.array([f"category-{n:02d}" for n in range(64)])


def rows(generator, ids, at_micros=START_MICROS):
    """Rows for these keys, in their order; event times grow by a microsecond a row from `at_micros` on."""
    count = len(ids)
    columns = [pa.array(ids, pa.int64()), pa.array(np.arange(at_micros, at_micros + count), SCHEMA.field("at").type)]
    columns += [pa.array(generator.random(count)) for _ in range(10)]
    columns += [pa.array(generator.integers(-(2**62), 2**62, count)) for _ in range(4)]
    columns += [pa.array(generator.random(count, dtype=np.float32)) for _ in range(2)]
    columns += [pa.array(generator.integers(0, 2**31, count, dtype=np.int32)) for _ in range(2)]
    columns.append(CATEGORIES.take(pa.array(generator.integers(0, 64, count))))
    columns.append(fixed_text(generator.integers(0, 256, (count, 16), dtype=np.uint8)))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def fixed_text(raw):
    """Random bytes as hexadecimal text, 32 characters a row, without a loop over rows."""
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    text = np.empty((raw.shape[0], raw.shape[1] * 2), dtype=np.uint8)
    text[:, 0::2] = digits[raw >> 4]
    text[:, 1::2] = digits[raw & 15]
    offsets = np.arange(raw.shape[0] + 1, dtype=np.int32) * text.shape[1]
    return pa.StringArray.from_buffers(raw.shape[0], pa.py_buffer(offsets), pa.py_buffer(text))


def random_ids(generator, count, duplicates=0.10):
    """`count` keys in random order, of which that share repeat another one."""
    distinct = count - int(count * duplicates)
    ids = generator.permutation(distinct).astype(np.int64)
    ids = np.concatenate([ids, generator.integers(0, distinct, count - distinct)])
    generator.shuffle(ids)
    return ids


def write_parquet(path, count, seed=1, duplicates=0.10, chunk=1_000_000):
    """One Parquet file with `count` rows in random key order. Keeps one that is there already."""
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    ids = random_ids(generator, count, duplicates)
    partial = path.with_suffix(".partial")
    with parquet.ParquetWriter(partial, SCHEMA, compression="zstd", compression_level=1) as writer:
        for start in range(0, count, chunk):
            writer.write_table(
                rows(generator, ids[start : start + chunk], START_MICROS + start), row_group_size=chunk // 4
            )
    partial.rename(path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--duplicates", type=float, default=0.10)
    options = parser.parse_args()
    print(write_parquet(options.path, options.rows, options.seed, options.duplicates))
