"""Fills a Feast repository: one feature view with every STEP-th row of an Arrow file. Runs in Feast's own venv.

feast_fill.py REPOSITORY FILE STEP
"""

import sys
from datetime import UTC, datetime, timedelta

import pyarrow as pa
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64, String
from pyarrow import parquet

TYPES = {"int64": Int64, "float": Float32, "string": String}


def main():
    repository, file, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    source = pa.ipc.open_file(pa.memory_map(file)).read_all()
    rows = source.take(list(range(0, source.num_rows, step)))
    now = datetime.now(UTC).replace(microsecond=0)
    rows = rows.append_column("at", pa.array([now] * rows.num_rows, pa.timestamp("us", tz="UTC")))
    path = f"{repository}/profile.parquet"
    parquet.write_table(rows.slice(0, 1_000), path)
    entity = Entity(name="profile", join_keys=["id"], value_type=ValueType.INT64)
    view = FeatureView(
        name="profile",
        entities=[entity],
        ttl=timedelta(days=3650),
        schema=[Field(name=field.name, dtype=TYPES[str(field.type)]) for field in list(source.schema)[1:]]
        + [Field(name="id", dtype=Int64)],
        source=FileSource(path=path, timestamp_field="at"),
    )
    store = FeatureStore(repo_path=repository)
    store.apply([entity, view])
    for first in range(0, rows.num_rows, 10_000):
        store.write_to_online_store("profile", df=rows.slice(first, 10_000).to_pandas())


main()
