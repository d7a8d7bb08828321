"""Bulk load: Parquet in random key order with 10 % duplicate keys, 20 features, within a fixed memory.

The peer is pyarrow in the same run: read the file, sort by key, write an Arrow file. It neither removes
duplicates nor builds an index, and takes as much memory as it likes. Rounds alternate; medians.
"""

import argparse
import shutil
import sys

import gen
from harness import DATA, binary, directory_bytes, environment, median, pinion, save, watch

MEMORY_MIB = 512

PEER = """
import sys, pyarrow as pa, pyarrow.parquet as parquet
table = parquet.read_table(sys.argv[1]).sort_by([("id", "ascending"), ("at", "ascending")])
with pa.ipc.new_file(sys.argv[2], table.schema) as writer:
    writer.write_table(table, max_chunksize=65536)
"""


def pinion_load(file, folder):
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    definition = folder / "wide.toml"
    definition.write_text(gen.DEFINITION)
    pinion("init", "--data", data)
    pinion("apply", "--data", data, definition)
    env = environment({"PINION__LOAD__MEMORY_BYTES": MEMORY_MIB << 20})
    found = watch([str(binary()), "load", "--data", str(data), "wide", str(file)], env=env)
    found["bytes"] = directory_bytes(data)
    shutil.rmtree(data)
    return found


def peer(file, folder):
    out = folder / "peer.arrow"
    found = watch([sys.executable, "-c", PEER, str(file), str(out)])
    found["bytes"] = out.stat().st_size
    out.unlink()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000_000, 30_000_000])
    parser.add_argument("--repeat", type=int, nargs="+", default=[3], help="rounds, for each size or for all")
    options = parser.parse_args()
    folder = DATA / "load"
    folder.mkdir(parents=True, exist_ok=True)
    rows, raw = [], {}
    notes = [
        f"load_memory {MEMORY_MIB} MiB; goals: at least 0.5x the peer's rows/s, anonymous memory under {MEMORY_MIB + 128} MiB"
    ]
    repeats = options.repeat * len(options.rows) if len(options.repeat) == 1 else options.repeat
    for count, repeat in zip(options.rows, repeats, strict=True):
        file = gen.write_parquet(DATA / f"wide-{count}.parquet", count)
        file.read_bytes() if file.stat().st_size < 4 << 30 else None  # warm
        found = {"pinion load": [], "pyarrow read, sort, write": []}
        for _ in range(repeat):
            found["pinion load"].append(pinion_load(file, folder))
            found["pyarrow read, sort, write"].append(peer(file, folder))
        for name, runs in found.items():
            seconds = median([run["seconds"] for run in runs])
            rows.append(
                [
                    f"{count:,}",
                    name,
                    f"{seconds:.1f}",
                    f"{count / seconds:,.0f}",
                    f"{max(run['peak_rss_anon_bytes'] for run in runs) / 2**20:,.0f}",
                    f"{runs[0]['bytes'] / 1e9:.2f}",
                ]
            )
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(*found.values())]
        notes.append(
            f"{count:,} rows: {median(ratios):.2f}x the peer's rows/s (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
        )
        for runs in found.values():
            for run in runs:
                run["output"] = run["output"][-2000:]
        raw[count] = found
    save(
        "load",
        {
            "header": ["rows", "", "seconds", "rows/s", "peak RssAnon MiB", "GB written"],
            "rows": rows,
            "notes": notes,
            "runs": raw,
        },
    )


if __name__ == "__main__":
    main()
