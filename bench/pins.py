"""Pins: how fast a table is loaded, and how fresh a pin is beside a stream of updates.

Parts, each optional:
- `load`: a table of 4 GB into host memory, cold beside what fio reads from the same files with O_DIRECT, warm beside a
  plain memory copy of as many bytes;
- `fresh`: 1 M keys by 20 features, uniform updates of 10,000 rows a second for a minute, one consumer that leases anew
  every second and one that never releases; on the host and on the fake driver (gds/fake-driver), whose work is done by
  threads over host memory: what it takes is its own, and no GPU's.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from harness import (
    DATA,
    RESULTS,
    Span,
    Unmeasured,
    binary,
    drop_pages,
    environment,
    machine,
    pinion,
    read_pages,
    rounds,
    save_part,
    show_part,
    versions,
)
from pins_report import REPORTS, WITH_NULLS
from serve_for import example

FULL_ROWS, FULL_KEYS, FULL_SECONDS = 16_777_216, 1_000_000, 60


def main():
    parts = {"load": load, "fresh": fresh}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), help=" ".join(parts))
    parser.add_argument("--rows", type=int, default=FULL_ROWS, help="of load; fewer write no results")
    parser.add_argument("--rounds", type=int, default=5, help="of load")
    parser.add_argument("--keys", type=int, default=FULL_KEYS, help="of fresh; fewer write no results")
    parser.add_argument("--seconds", type=int, default=FULL_SECONDS, help="of fresh; fewer write no results")
    parser.add_argument("--rate", type=int, default=10_000, help="of fresh: rows a second; others write no results")
    parser.add_argument("--compare", type=int, default=12, help="of fresh: leased generations that are compared")
    parser.add_argument("--only", nargs="+", default=None, help="of fresh: settings by name; fewer write no results")
    parser.add_argument("--build-only", action="store_true", help="make the table of load, measure nothing")
    parser.add_argument("--render", action="store_true", help="only write docs/benchmarks.md again from the results")
    options = parser.parse_args()
    if options.render:
        for name, found in json.loads((RESULTS / "pins.json").read_text())["parts"].items():
            show_part("pins", name, found, *REPORTS[name](found))
        return
    if options.build_only:
        table(options.rows)
        table(options.rows // 4, NULL_SHARE)
        return
    trials = {
        "load": options.rows < FULL_ROWS,
        "fresh": (options.keys, options.seconds, options.rate) != (FULL_KEYS, FULL_SECONDS, 10_000)
        or options.only is not None,
    }
    for name in options.parts:
        here = machine()
        try:
            with Span() as span:
                found = parts[name](options)
        except Unmeasured as why:
            print(f"\n== {name} is not measured: {why}")
            continue
        here |= {"span": span.found, "versions": versions("pyarrow")}
        found = {"machine": here, **found}
        if trials[name]:
            body, *_ = REPORTS[name](found)
            print(f"\n== {name} (a trial: nothing is written)\n{body}\n{here['span']}")
        else:
            save_part("pins", name, found, *REPORTS[name](found))


def native(name, *arguments, env=None, timeout=300):
    """Runs an example of the crate `gds` to its end; the JSON that it prints."""
    path = example(name)
    if path is None:
        raise Unmeasured(f"build it first: cargo build --release --package pinion-gds --example {name}")
    command = [str(path), *map(str, arguments)]
    done = subprocess.run(command, env=environment(env), capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- loads to host memory

COLUMNS, CHUNK = 31, 65_536
# Of a table of a quarter of the rows, beside one without nulls.
NULL_SHARE = 0.01
SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False)] + [(f"f{n}", pa.float64()) for n in range(COLUMNS)])
DEFINITION = (
    '[table]\nname = "loaded"\nentity = [{ name = "id", type = "int64" }]\nhistory = "latest"\n[features]\n'
    + "".join(f'f{n} = "float64"\n' for n in range(COLUMNS))
)


def table(rows, null_share=0.0):
    """The data directory with the table that is loaded: 256 bytes a row. Built once."""
    folder = DATA / (f"pins-{rows}-nulls-{null_share}" if null_share else f"pins-{rows}")
    if (folder / "complete").exists():
        return folder / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file, described, data = folder / "rows.arrow", folder / "loaded.toml", folder / "data"
    described.write_text(DEFINITION)
    with pa.ipc.new_file(str(file), SCHEMA) as writer:
        for first in range(0, rows, CHUNK):
            count = min(CHUNK, rows - first)
            generator = np.random.default_rng([31, first])
            columns = [pa.array(np.arange(first, first + count))]
            for _ in range(COLUMNS):
                values = generator.random(count)
                columns.append(pa.array(values, mask=generator.random(count) < null_share if null_share else None))
            writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
    pinion("init", "--data", data)
    pinion("apply", "--data", data, described)
    print(f"loading {file}", flush=True)
    pinion("load", "--data", data, "loaded", file, timeout=3600)
    file.unlink()
    (folder / "complete").touch()
    return data


# (jobs, reads under way in each), of 1 MiB.
FIO = ((1, 1), (1, 4), (1, 8), (2, 4), (4, 2), (4, 8))


def load(options):
    if shutil.which("fio") is None:
        raise Unmeasured("fio is missing (Debian calls it fio)")
    data, some_null = table(options.rows), table(options.rows // 4, NULL_SHARE)
    files = sorted(file for file in data.rglob("*.arrow") if file.stat().st_size)
    tables = (data, some_null)
    everything = [file for data in tables for file in data.rglob("*") if file.is_file() and file.stat().st_size]
    file_bytes = sum(file.stat().st_size for file in files)
    ways = {
        "pin, frozen": ("pin", data, "loaded", "frozen"),
        "pin, fresh": ("pin", data, "loaded", "fresh"),
        WITH_NULLS: ("pin", some_null, "loaded", "frozen"),
        "files": ("files", *files),
    }

    def loaded(arguments, prepare):
        def one():
            stayed = prepare()
            return {**native("host_load", *arguments), "resident_before": stayed}

        return one

    cold = {name: loaded(arguments, partial(drop_pages, everything)) for name, arguments in ways.items()}
    for jobs, depth in FIO:
        cold[f"fio, {jobs} x {depth}"] = partial(fio, files, jobs, depth)
    found = {"cold": rounds(cold, options.rounds, warm=0, limit_seconds=600)}
    warm = {name: loaded(arguments, partial(read_pages, everything)) for name, arguments in ways.items()}
    for threads in sorted({1, os.cpu_count(), 8}):
        warm[f"copy, {threads} thread{'s' * (threads > 1)}"] = partial(
            native, "host_load", "copy", file_bytes, threads
        )
    found["warm"] = rounds(warm, options.rounds, limit_seconds=300)
    return {"rows": options.rows, "file_bytes": file_bytes, "files": len(files), "rounds": found}


def fio(files, jobs, depth):
    """Reads all files once, with O_DIRECT, in blocks of 1 MiB: each job a stretch of its own."""
    drop_pages(files)
    lines = ["[global]", "rw=read", "direct=1", "bs=1m", "ioengine=libaio", f"iodepth={depth}", "allow_file_create=0"]
    chains = []
    for number, stretches in enumerate(divided(files, jobs)):
        chain = []
        for file, offset, size in stretches:
            name = f"job{number}-{len(chain)}"
            lines += [f"[{name}]", f"filename={file}", f"offset={offset}", f"size={size}"]
            lines += [f"wait_for={chain[-1]}"] if chain else []
            chain.append(name)
        chains.append(chain)
    with tempfile.NamedTemporaryFile("w", suffix=".fio") as described:
        described.write("\n".join(lines) + "\n")
        described.flush()
        command = ["fio", "--output-format=json", described.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise Unmeasured(f"fio: {(done.stderr or done.stdout).strip()[-300:]}")
    told = {job["jobname"]: job for job in json.loads(done.stdout[done.stdout.index("{") :])["jobs"]}
    read = sum(job["read"]["io_bytes"] for job in told.values())
    seconds = max(sum(told[name]["read"]["runtime"] for name in chain) for chain in chains) / 1e3
    return {"bytes": read, "seconds": seconds, "gb_per_second": read / 1e9 / max(seconds, 1e-3)}


def divided(files, jobs, block=1 << 20):
    """For each job the stretches (file, offset, bytes) that it reads: about equal shares, in whole blocks."""
    blocks = [(file, at) for file in files for at in range(0, file.stat().st_size - block + 1, block)]
    share = -(-len(blocks) // jobs)
    found = []
    for first in range(0, len(blocks), share):
        stretches = []
        for file, at in blocks[first : first + share]:
            if stretches and stretches[-1][0] == file:
                stretches[-1][2] += block
            else:
                stretches.append([file, at, block])
        found.append(stretches)
    return found


# -- fresh pins

# name -> (device, how late each operation of the fake driver starts, in microseconds).
SETTINGS = {
    "host": ("host", None),
    "bounce, fake driver": ("bounce", "0-0"),
    "bounce, fake driver, late": ("bounce", "0-200"),
    "direct, fake driver": ("direct", "0-0"),
}


def fresh(options):
    library = binary().resolve().parent / "libpinion_gds_fake_driver.so"
    runs = {}
    for name, (device, delay) in SETTINGS.items():
        if options.only is not None and name not in options.only:
            continue
        env, more = {}, []
        if device != "host":
            if not library.exists():
                raise Unmeasured("build it first: cargo build --release --package pinion-gds-fake-driver")
            # Strict: a violation of a lifetime or of an order ends the run.
            env = {"PINION_FAKE_GPU_STRICT": 1, "PINION_FAKE_GPU_DELAY_MICROS": delay}
            more = ["--driver", library]
        DATA.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="pinion-bench-", dir=DATA) as folder:
            runs[name] = native(
                "pin_bench",
                *("--device", device, "--folder", Path(folder), "--keys", options.keys, "--rate", options.rate),
                *("--seconds", options.seconds, "--compare", options.compare, *more),
                env=env,
                timeout=options.seconds + 600,
            ) | {"delay_micros": delay}
        print(f"{name}: done", flush=True)
    return {"runs": runs}


if __name__ == "__main__":
    main()
