"""Upserts: cost per row by table size, what merges cost over time, and what thin traffic costs in the log.

Three questions, each optional:
- `cost`: CPU of the server per upserted row at 1 M and at 30 M keys (uniform keys, puts of 1,000 rows);
- `churn`: write amplification, segments and space amplification over minutes of uniform updates to 10 M rows;
- `thin`: log bytes per row at 1,000 single-row events a second from Kafka, against a segment's bytes per row.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import gen
import numpy as np
from harness import DATA, RESULTS, Server, copy_store, cpu_seconds, directory_bytes, median, pinion, save

from support import flight as calls


def store_with(keys):
    """A store of one load with at least `keys` keys, one in nine of which came twice; kept for the next run, copied for
    this."""
    count = rows_for(keys)
    folder = DATA / f"upsert-{count}"
    data = folder / "data"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        definition = folder / "wide.toml"
        definition.write_text(gen.DEFINITION)
        pinion("init", "--data", data)
        pinion("apply", "--data", data, definition)
        # The file of bench/load.py: one key in ten occurs twice.
        file = gen.write_parquet(DATA / f"wide-{count}.parquet", count)
        pinion("load", "--data", data, "wide", file, timeout=7200)
        (folder / "complete").touch()
    return copy_store(data, DATA / "upsert-work")


def rows_for(keys):
    """Rows of a file as bench/load.py loads it, one in ten of which repeats a key, that holds the keys 0 to `keys` and up."""
    return -(-keys * 10 // 9)


def stats_of(client):
    return calls.action(client, "stats", table="wide")[0]["tables"][0]


def cost(sizes, rounds=60, rows_per_put=1_000):
    """Server CPU and wall time per row, after a warm-up."""
    found = {}
    for keys in sizes:
        data = store_with(keys)
        generator = np.random.default_rng(keys)
        with Server(data) as server:
            client = calls.connect(server)
            each = []
            for number in range(rounds + 10):
                batch = gen.rows(
                    generator,
                    generator.integers(0, keys, rows_per_put),
                    gen.START_MICROS + 10**12 + number * rows_per_put,
                )
                cpu, wall = cpu_seconds(server.process.pid), time.perf_counter()
                calls.put(client, "wide", batch)
                if number >= 10:
                    each.append((time.perf_counter() - wall, cpu_seconds(server.process.pid) - cpu))
        found[keys] = {
            "wall_micros_per_row": median([w for w, _ in each]) / rows_per_put * 1e6,
            "cpu_micros_per_row": sum(c for _, c in each) / len(each) / rows_per_put * 1e6,
        }
    return found


def churn(keys, minutes, rows_per_second):
    """Samples of the table's figures while uniform updates run."""
    data = store_with(keys)
    generator = np.random.default_rng(3)
    samples = []
    with Server(data) as server:
        client = calls.connect(server)
        first = stats_of(client)
        row_bytes = first["bytes"] / max(first["rows"], 1)
        began = time.monotonic()
        sent = 0
        while time.monotonic() - began < minutes * 60:
            batch = gen.rows(generator, generator.integers(0, keys, 2_000), gen.START_MICROS + 10**12 + sent)
            calls.put(client, "wide", batch)
            sent += 2_000
            ahead = sent / rows_per_second - (time.monotonic() - began)
            if ahead > 0:
                time.sleep(ahead)
            if not samples or time.monotonic() - began - samples[-1]["seconds"] >= 10:
                stats = stats_of(client)
                samples.append(
                    {
                        "seconds": time.monotonic() - began,
                        "rows_sent": sent,
                        "segments": len(stats["segments"]),
                        "bytes_on_disk": directory_bytes(data),
                        "segment_bytes_written": stats["segment_bytes_written"],
                        "log_bytes_written": stats["log_bytes_written"],
                        "merges": stats["merges"],
                        "live_rows": stats["rows"],
                    }
                )
        last = samples[-1]
        written = last["segment_bytes_written"] + last["log_bytes_written"]
        return {
            "keys": keys,
            "rows_per_second": sent / last["seconds"],
            "write_amplification": written / (sent * row_bytes),
            "segments_max": max(s["segments"] for s in samples),
            "space_amplification_max": max(s["bytes_on_disk"] for s in samples) / (keys * row_bytes),
            "merges": last["merges"],
            "samples": samples,
        }


def thin(seconds, rate=1_000):
    """Bytes per row of a log fed by single-row events, and of the segment made of it."""
    from support.broker import Broker, Log
    from support.wait import until

    folder = tempfile.mkdtemp(prefix="pinion-bench-")
    broker = Broker(f"{folder}/kafka")
    try:
        topic = broker.topic("thin", partitions=1)
        data = f"{folder}/data"
        definition = f"{folder}/wide.toml"
        Path(definition).write_text(gen.DEFINITION + f'\n[source.kafka]\ntopic = "{topic}"\nformat = "json"\n')
        pinion("init", "--data", data)
        pinion("apply", "--data", data, definition)
        generator = np.random.default_rng(4)
        events = gen.rows(generator, generator.integers(0, 10**6, seconds * rate))
        events = events.set_column(1, "at", events["at"].cast("int64")).to_pylist()
        with Server(data, brokers=broker.bootstrap) as server:
            client = calls.connect(server)
            log = Log(broker.producer(**{"linger.ms": 0}), topic, keep=False)
            began = time.monotonic()
            for number, event in enumerate(events):
                log.send(json.dumps(event).encode())
                ahead = number / rate - (time.monotonic() - began)
                if ahead > 0:
                    time.sleep(ahead)
            log.flush()
            until(lambda: stats_of(client)["next_sequence"] >= len(events), 60, "all events being read")
            stats = stats_of(client)
            in_log = stats["log_bytes_written"] / len(events)
            calls.action(client, "flush", table="wide")
            flushed = stats_of(client)
            segment_rows = sum(s["rows"] for s in flushed["segments"])
            in_segment = sum(s["bytes"] for s in flushed["segments"]) / segment_rows
        return {"log_bytes_per_row": in_log, "segment_bytes_per_row": in_segment, "ratio": in_log / in_segment}
    finally:
        broker.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["cost", "churn", "thin"])
    parser.add_argument("--keys", type=int, nargs="+", default=[1_000_000, 30_000_000])
    parser.add_argument("--churn-keys", type=int, default=10_000_000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rows-per-second", type=int, default=20_000)
    parser.add_argument("--thin-seconds", type=int, default=30)
    options = parser.parse_args()
    # A part that is not measured this time keeps its last figures.
    path = RESULTS / "upsert.json"
    raw = json.loads(path.read_text())["measured"] if path.exists() else {}
    if "cost" in options.parts:
        raw["cost"] = {str(keys): found for keys, found in cost(options.keys).items()}
    if "churn" in options.parts:
        raw["churn"] = churn(options.churn_keys, options.minutes, options.rows_per_second)
    if "thin" in options.parts:
        raw["thin"] = thin(options.thin_seconds)
    rows, notes = figures(raw)
    save("upsert", {"header": ["", ""], "rows": rows, "notes": notes, "measured": raw})


def figures(raw):
    """The rows and notes of the table, for the parts that were ever measured."""
    rows, notes = [], ["puts wait for the disk: wall time is mostly the sync of the log, CPU is the work of the store"]
    if found := raw.get("cost"):
        for keys, each in found.items():
            rows.append([f"upsert at {int(keys):,} keys, wall", f"{each['wall_micros_per_row']:.2f} µs/row"])
            rows.append(
                [f"upsert at {int(keys):,} keys, server CPU", f"{each['cpu_micros_per_row']:.2f} µs/row"]
            )
        small, large = list(found.values())[0], list(found.values())[-1]
        notes.append(
            f"most keys against fewest: {large['wall_micros_per_row'] / small['wall_micros_per_row']:.2f}x wall, "
            f"{large['cpu_micros_per_row'] / max(small['cpu_micros_per_row'], 1e-9):.2f}x CPU (goal: within 2x)"
        )
    if found := raw.get("churn"):
        minutes = found["samples"][-1]["seconds"] / 60
        rows += [
            ["uniform updates, keys", f"{found['keys']:,}"],
            ["uniform updates, rate", f"{found['rows_per_second']:,.0f} rows/s for {minutes:.0f} min"],
            ["write amplification (segments and logs / rows sent)", f"{found['write_amplification']:.2f}x"],
            ["most segments", found["segments_max"]],
            ["space amplification, most", f"{found['space_amplification_max']:.2f}x"],
            ["merges", found["merges"]],
        ]
    if found := raw.get("thin"):
        rows += [
            ["log bytes per row at 1,000 single-row events/s", f"{found['log_bytes_per_row']:.0f}"],
            [
                "segment bytes per row of the same rows",
                f"{found['segment_bytes_per_row']:.0f} ({found['ratio']:.2f}x; goal: at most 3x)",
            ],
        ]
    return rows, notes


if __name__ == "__main__":
    main()
