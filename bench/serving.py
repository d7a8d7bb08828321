"""The data of the serving benchmarks (scan, lookup): three tables, their Arrow files, one store that holds them all.

- `scan`: 2 GB; a key, 3 int64, 16 float32, 2 strings; the peers map the same rows from Arrow files of 8 k, 64 k and
  256 k rows a batch;
- `profile`: 10 M keys with the same columns, laid out for lookups;
- `fifty`: 1 M keys with 50 float32 features.

Keys are 0 and up, in order. Every chunk of rows has a seed of its own, so any of them can be made again. Files and
stores are kept in the cache from run to run, under a name that tells their sizes.
"""

import shutil
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from harness import DATA, pinion

KEY = pa.field("id", pa.int64(), nullable=False)
SCHEMA = pa.schema(
    [KEY]
    + [(f"i{n}", pa.int64()) for n in range(3)]
    + [(f"f{n}", pa.float32()) for n in range(16)]
    + [("category", pa.string()), ("label", pa.string())]
)
FIFTY = pa.schema([KEY] + [(f"x{n}", pa.float32()) for n in range(50)])
FEATURES = SCHEMA.names[1:]
TYPES = {"int64": "int64", "float": "float32", "string": "string"}
CHUNK = 262_144
BATCHES = {"8k": 8_192, "64k": 65_536, "256k": 262_144}
# Redis holds one key in ten of `profile`, Feast one in a hundred, spread over all of it.
REDIS_STEP, FEAST_STEP = 10, 100
CATEGORIES = pa.array([f"category-{n:02d}" for n in range(64)])


@dataclass(frozen=True)
class Sizes:
    """Rows of each table."""

    scan: int
    profile: int
    fifty: int

    @staticmethod
    def scaled(part):
        """All tables at `part` of their full size."""

        def rows(full):
            return max(10_000, int(full * part) // 1_000 * 1_000)

        return Sizes(16_777_216, 10_000_000, 1_000_000) if part >= 1 else Sizes(*map(rows, (16_777_216, 10**7, 10**6)))

    @property
    def folder(self):
        return DATA / f"serving-{self.scan}-{self.profile}-{self.fifty}"


def wide_chunk(first, count):
    """Rows of `scan` and `profile`, which start with the same ones."""
    generator = np.random.default_rng([7, first])
    columns = [pa.array(np.arange(first, first + count))]
    columns += [pa.array(generator.integers(-(2**62), 2**62, count)) for _ in range(3)]
    columns += [pa.array(generator.random(count, dtype=np.float32)) for _ in range(16)]
    columns.append(CATEGORIES.take(pa.array(generator.integers(0, 64, count))))
    columns.append(hex_text(generator.integers(0, 256, (count, 4), dtype=np.uint8)))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def fifty_chunk(first, count):
    generator = np.random.default_rng([50, first])
    columns = [pa.array(np.arange(first, first + count))]
    columns += [pa.array(generator.random(count, dtype=np.float32)) for _ in range(50)]
    return pa.Table.from_arrays(columns, schema=FIFTY)


def hex_text(raw):
    from gen import fixed_text

    return fixed_text(raw)


def write(path, count, chunk, batch_rows):
    """One Arrow file in key order. Keeps one that is there already."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    schema = chunk(0, 1).schema
    with pa.ipc.new_file(str(partial), schema) as writer:
        for first in range(0, count, CHUNK):
            writer.write_table(chunk(first, min(CHUNK, count - first)), max_chunksize=batch_rows)
    partial.rename(path)
    return path


def scan_files(sizes):
    """batch name -> the file that a peer maps."""
    return {
        name: write(sizes.folder / f"scan-{name}.arrow", sizes.scan, wide_chunk, rows) for name, rows in BATCHES.items()
    }


def profile_file(sizes):
    return write(sizes.folder / "profile.arrow", sizes.profile, wide_chunk, BATCHES["64k"])


def fifty_file(sizes):
    return write(sizes.folder / "fifty.arrow", sizes.fifty, fifty_chunk, BATCHES["64k"])


def definition(name, schema, lookup=None):
    lines = [f'[table]\nname = "{name}"\nentity = [{{ name = "id", type = "int64" }}]\nhistory = "latest"']
    lines += [f'lookup = "{lookup}"'] if lookup else []
    lines += ["\n[features]"] + [f'{field.name} = "{TYPES[str(field.type)]}"' for field in list(schema)[1:]]
    return "\n".join(lines) + "\n"


def store(sizes):
    """The data directory with the three tables; built once."""
    data = sizes.folder / "data"
    if (sizes.folder / "complete").exists():
        return data
    shutil.rmtree(data, ignore_errors=True)
    files = {"scan": scan_files(sizes)["64k"], "profile": profile_file(sizes), "fifty": fifty_file(sizes)}
    pinion("init", "--data", data)
    for name, file in files.items():
        schema = FIFTY if name == "fifty" else SCHEMA
        described = sizes.folder / f"{name}.toml"
        described.write_text(definition(name, schema, "columns" if name == "scan" else "rows"))
        pinion("apply", "--data", data, described)
        print(f"loading {name} from {file}", flush=True)
        pinion("load", "--data", data, name, file, timeout=3600)
    (sizes.folder / "complete").touch()
    return data


def mapped(path):
    """An Arrow file as a table that lies in the page cache."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def row_bytes(schema, table=None):
    """Bytes of the values of one row: the ideal that bytes on the wire are compared with. Text by its mean length."""
    total = 0.0
    for field in schema:
        if pa.types.is_string(field.type):
            text = pc.sum(pc.binary_length(table[field.name])).as_py()
            total += 4 + text / table.num_rows
        else:
            total += field.type.bit_width / 8
    return total
