"""Opening: from `exec` of `pinion get --data` to the printed row.

The table has 8 segments, 5 % superseded rows, and a log of 100,000 rows left by `kill -9`. Warm page cache,
median of 20, each with another key. `pinion version` and `true` show what starting any process costs here.
"""

import argparse
import os
import shutil
import subprocess
import time

import gen
import numpy as np
import pyarrow as pa
from harness import DATA, Server, binary, directory_bytes, environment, median, pinion, save

from support import flight as calls

SEGMENTS = 8
LOG_ROWS = 100_000
SUPERSEDED = 0.05
SETTINGS = {"PINION__STORE__MAX_SEGMENTS": 64}


def build(count):
    """The store; one that is there already is kept."""
    folder = DATA / f"open-{count}"
    data = folder / "data"
    if (folder / "complete").exists():
        return data
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(count)
    definition = folder / "wide.toml"
    definition.write_text(gen.DEFINITION)
    pinion("init", "--data", data)
    pinion("apply", "--data", data, definition)
    # Segment n has new keys and, from the second on, some that replace older rows.
    replaced = int(count * SUPERSEDED / (SEGMENTS - 1))
    new = (count - replaced * (SEGMENTS - 1)) // SEGMENTS
    file = folder / "part.arrow"
    for number in range(SEGMENTS):
        ids = np.arange(number * new, (number + 1) * new)
        if number:
            ids = np.concatenate([ids, generator.choice(number * new, replaced, replace=False)])
        generator.shuffle(ids)
        part = gen.rows(generator, ids, gen.START_MICROS + number * count)
        with pa.ipc.new_file(str(file), gen.SCHEMA) as writer:
            writer.write_table(part, max_chunksize=65_536)
        pinion("load", "--data", data, "wide", file, env=SETTINGS, timeout=3600)
    file.unlink()
    with Server(data, env=SETTINGS) as server:
        client = calls.connect(server)
        for start in range(0, LOG_ROWS, 5_000):
            ids = generator.integers(0, new * SEGMENTS, 5_000)
            calls.put(client, "wide", gen.rows(generator, ids, gen.START_MICROS + 100 * count + start))
        (stats,) = calls.action(client, "stats", table="wide")
        print(
            {k: v for k, v in stats["tables"][0].items() if k != "segments"},
            len(stats["tables"][0]["segments"]),
            "segments",
        )
        assert len(stats["tables"][0]["segments"]) == SEGMENTS and stats["tables"][0]["log_rows"] == LOG_ROWS
        server.kill()
    (folder / "complete").touch()
    return data


def once(command):
    """Milliseconds from before exec to the printed row (one write of the process), and to its end."""
    env = environment()
    began = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, close_fds=False, bufsize=0) as process:
        output = os.read(process.stdout.fileno(), 1 << 16)
        printed = (time.perf_counter() - began) * 1000
        output += process.stdout.read()
    milliseconds = (time.perf_counter() - began) * 1000
    assert process.returncode == 0, output
    return printed, milliseconds, output


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--build-only", action="store_true")
    options = parser.parse_args()
    stores = {count: build(count) for count in options.rows}
    if options.build_only:
        return
    cases = {"true (any process)": lambda n: ["/bin/true"], "pinion version": lambda n: [str(binary()), "version"]}
    for count, data in stores.items():
        subprocess.run(f"cat {data}/tables/*/*/* {data}/tables/*/* >/dev/null 2>&1", shell=True)
        cases[f"pinion get, {count:,} rows"] = lambda n, data=data, count=count: [
            str(binary()),
            "get",
            "--data",
            str(data),
            "wide",
            str(n * 7919 % int(count * 0.9)),
        ]
    times = {name: [] for name in cases}
    ends = {name: [] for name in cases}
    for number in range(options.repeat + 2):
        for name, command in cases.items():  # interleaved: noise falls on all alike
            printed, milliseconds, output = once(command(number))
            if name.startswith("pinion get"):
                assert b"category-" in output, output
            if number >= 2:
                times[name].append(printed)
                ends[name].append(milliseconds)
    rows = [
        [name, f"{median(found):.1f}", f"{min(found):.1f}", f"{max(found):.1f}", f"{median(ends[name]):.1f}"]
        for name, found in times.items()
    ]
    gets = [median(found) for name, found in times.items() if name.startswith("pinion get")]
    sizes = ", ".join(f"{count:,} rows: {directory_bytes(data) / 1e9:.2f} GB on disk" for count, data in stores.items())
    save(
        "open",
        {
            "header": ["", "to the printed row: median ms", "min", "max", "to the exit: median"],
            "rows": rows,
            "notes": [
                f"{SEGMENTS} segments, {SUPERSEDED:.0%} superseded rows, a log of {LOG_ROWS:,} rows left by kill -9; {sizes}",
                f"largest against smallest table: {gets[-1] / gets[0]:.2f}x (goal: within 1.3x; 10 M rows under 17 ms)",
            ],
            "milliseconds": times,
        },
    )


if __name__ == "__main__":
    main()
