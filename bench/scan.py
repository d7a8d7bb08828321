"""Scans of a 2 GB table: GB/s and CPU beside pyarrow's Flight server and a tonic server, projections, cold scans.

Parts, each optional:
- `full`: the whole table, hot, over the Unix socket and TCP, by pyarrow's client and by Rust clients;
- `part`: 3 of 22 columns, and 1 % of the rows by a range of keys; bytes on the wire against the ideal;
- `share`: how much is sent without a copy, as more and more rows are replaced;
- `copies`: user-space memory copies in a profile of the server, clean scans only (needs `perf`);
- `cold`: lookups of 100 keys beside a scan that comes from the disk;
- `table`: from connect to a checked table in a process on the same machine.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from functools import partial

import numpy as np
import pyarrow as pa
import serving
from harness import (
    DATA,
    RESULTS,
    Span,
    Unmeasured,
    copy_store,
    cpu_seconds,
    drop_pages,
    machine,
    median,
    read_pages,
    rounds,
    save_part,
    show_part,
    versions,
)
from peers import PyarrowServer, TonicServer
from scan_report import REPORTS
from serve_for import RAISED, Pinion, example, missing_lane, native
from serving import Sizes
from workers import Workers

from support import flight as calls

COLUMNS = ["id", "f3", "label"]
# As large as the peer's with its largest batches. pyarrow's client has no limit; others' is 4 MiB.
LARGER = {"max_message_bytes": (32 << 20) - (64 << 10)}
LARGE = "Pinion, messages of 32 MiB"


def main():
    parts = {"full": full, "part": part, "share": share, "copies": copies, "cold": cold, "table": delivered}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), help=" ".join(parts))
    parser.add_argument("--rows", type=int, default=16_777_216, help="fewer for a trial, which writes no results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--build-only", action="store_true", help="make the data and the store, measure nothing")
    parser.add_argument("--render", action="store_true", help="only write docs/benchmarks.md again from the results")
    options = parser.parse_args()
    if options.render:
        for name, found in json.loads((RESULTS / "scan.json").read_text())["parts"].items():
            show_part("scan", name, found, *REPORTS[name](found))
        return
    sizes = Sizes.scaled(options.rows / 16_777_216)
    serving.scan_files(sizes)
    data = serving.store(sizes)
    if options.build_only:
        return
    warm(data)
    for name in options.parts:
        here = machine()
        try:
            with Span() as span:
                found = parts[name](sizes, data, options.rounds)
        except Unmeasured as why:
            print(f"\n== {name} is not measured: {why}")
            continue
        here |= {"span": span.found, "versions": versions("pyarrow")}
        found = {"machine": here, "rows": sizes.scan, **found}
        if sizes.scan == 16_777_216:
            save_part("scan", name, found, *REPORTS[name](found))
        else:
            body, *plots = REPORTS[name](found)
            print(f"\n== {name} (a trial: nothing is written)\n{body}\n{here['span']}")


def warm(data):
    """Everything into the page cache."""
    read_pages(file for file in [*data.rglob("*"), *data.parent.glob("scan-*.arrow")] if file.is_file())


def gigabytes(sizes, columns=None, share=1.0):
    """GB of values in a scan, without padding and framing: what GB/s and CPU per GB are counted by."""
    file = serving.mapped(sizes.folder / "scan-64k.arrow")
    schema = file.schema if columns is None else pa.schema([file.schema.field(name) for name in columns])
    return serving.row_bytes(schema, file) * sizes.scan * share / 1e9


def asked(**more):
    """A ticket for Pinion."""
    return {"scan": {"table": "scan", **more}}


def measured(scan, pid, gb):
    """One pass in GB/s and CPU seconds per GB of server and client."""
    before = cpu_seconds(pid)
    found = scan()
    server = cpu_seconds(pid) - before
    whole = gb * found.get("repeat", 1)
    return {
        "gb_per_second": whole / found["seconds"],
        "server_cpu_per_gb": server / (whole * found.get("server_passes", 1)),
        "client_cpu_per_gb": found["client_cpu_seconds"] / whole,
        "rows": found["rows"],
        "wire_bytes": found.get("wire_bytes", 0),
        "metadata": found.get("metadata"),
    }


# -- the whole table


def full(sizes, data, count):
    gb, cases = gigabytes(sizes), {}
    files = serving.scan_files(sizes)
    with ExitStack() as stack:
        pinion = stack.enter_context(Pinion(data))
        unix, tcp = (stack.enter_context(PyarrowServer(files, uds=uds)) for uds in (True, False))
        ways = {"Unix socket": (pinion.unix, unix), "TCP": (pinion.flight, tcp)}
        for way, (url, peer) in ways.items():
            client = stack.enter_context(Workers("scan", {"url": url}, clients=1))
            cases[f"{way} | pyarrow | Pinion"] = pass_of(client, asked(), pinion.pid, gb, sizes.scan)
            client = stack.enter_context(Workers("scan", {"url": url}, clients=1))
            cases[f"{way} | pyarrow | {LARGE}"] = pass_of(client, asked(**LARGER), pinion.pid, gb, sizes.scan)
            for name in files:
                # A client of its own: what one has read decides how much memory its allocator keeps.
                other = stack.enter_context(Workers("scan", {"url": peer.url}, clients=1))
                cases[f"{way} | pyarrow | pyarrow server, {name} rows a batch"] = pass_of(
                    other, {"file": name}, peer.pid, gb, sizes.scan
                )
        more, tried = rust_cases(stack, sizes, files, ways, gb, pinion)
        found = rounds(cases | more, count, limit_seconds=240)
    return {"gb": gb, "rounds": found, "tried": tried}


def pass_of(client, request, pid, gb, rows):
    def one():
        found = measured(lambda: client.call("scan", asked=request), pid, gb)
        assert found["rows"] == rows, f"{found['rows']} rows of {rows}"
        return found

    return one


def rust_cases(stack, sizes, files, ways, gb, pinion):
    """Pinion's own Rust client on Pinion, and arrow-flight's on three servers: (cases, the settings tried before).

    Which of its three batch sizes a peer serves these clients with is settled beforehand, over the Unix socket.
    """
    if example("scan_bench") is None:
        print("the examples of client/ are not built: the Rust clients are not measured")
        return {}, {}
    rust = partial(rust_pass, gb=gb, rows=sizes.scan)
    cases, tried = {}, {}
    unix = ways["Unix socket"][1]
    for name in files:
        tried.setdefault("pyarrow server", {})[name] = best_of_two(
            rust("arrow-flight", unix.url, {"file": name}, unix.pid)
        )
        with TonicServer(example("tonic_flight_server"), files[name], uds=True) as tonic:
            tried.setdefault("tonic's encoder", {})[name] = best_of_two(rust("arrow-flight", tonic.url, {}, tonic.pid))
    best = {server: max(found, key=found.get) for server, found in tried.items()}
    for way, (url, peer) in ways.items():
        cases[f"{way} | own Rust | Pinion"] = rust("pinion", url, asked(), pinion.pid)
        cases[f"{way} | arrow-flight | Pinion"] = rust("arrow-flight", url, asked(), pinion.pid)
        name = best["pyarrow server"]
        cases[f"{way} | arrow-flight | pyarrow server, {name} rows a batch"] = rust(
            "arrow-flight", peer.url, {"file": name}, peer.pid
        )
        name = best["tonic's encoder"]
        uds = way == "Unix socket"
        tonic = stack.enter_context(TonicServer(example("tonic_flight_server"), files[name], uds))
        cases[f"{way} | arrow-flight | tonic's encoder, {name} rows a batch"] = rust(
            "arrow-flight", tonic.url, {}, tonic.pid
        )
    return cases, tried


def best_of_two(one):
    return max(one()["gb_per_second"] for _ in range(2))


def rust_pass(client, url, request, pid, gb, rows, repeat=1):
    """A process with a warm-up pass and `repeat` measured ones; the server's CPU is that of all."""

    def one():
        def scan():
            arguments = ("--via", client, "--url", url, "--ticket", json.dumps(request), "--passes", 1 + repeat)
            passes = native("scan_bench", *arguments)[1:]
            summed = {name: sum(each[name] for each in passes) for name in ("rows", "seconds", "client_cpu_seconds")}
            return {**summed, "repeat": repeat, "server_passes": (1 + repeat) / repeat}

        found = measured(scan, pid, gb)
        assert found["rows"] == rows * repeat, f"{found['rows']} rows of {rows} x {repeat}"
        return found

    return one


# -- a part of it


def part(sizes, data, count):
    files, found = serving.scan_files(sizes), {}
    first = sizes.scan // 3
    end = first + sizes.scan // 100
    questions = {
        "3 of 22 columns": ({"features": COLUMNS}, {"columns": COLUMNS}, gigabytes(sizes, COLUMNS), sizes.scan, 1),
        "1 % of the rows": (
            {"filter": f"id >= {first} and id < {end}"},
            {"rows": [first, end]},
            gigabytes(sizes, share=(end - first) / sizes.scan),
            end - first,
            20,
        ),
    }
    with ExitStack() as stack:
        pinion = stack.enter_context(Pinion(data))
        unix, tcp = (stack.enter_context(PyarrowServer(files, uds=uds)) for uds in (True, False))
        for question, (ours, theirs, gb, rows, repeat) in questions.items():
            cases = {}
            for way, url, peer in (("Unix socket", pinion.unix, unix), ("TCP", pinion.flight, tcp)):
                client = stack.enter_context(Workers("scan", {"url": url}, clients=1))
                cases[f"{way} | pyarrow | Pinion"] = repeated(client, asked(**ours), pinion.pid, gb, rows, repeat)
                client = stack.enter_context(Workers("scan", {"url": url}, clients=1))
                larger = asked(**ours, **LARGER)
                cases[f"{way} | pyarrow | {LARGE}"] = repeated(client, larger, pinion.pid, gb, rows, repeat)
                for name in files:
                    other = stack.enter_context(Workers("scan", {"url": peer.url}, clients=1))
                    cases[f"{way} | pyarrow | pyarrow server, {name} rows a batch"] = repeated(
                        other, {"file": name, **theirs}, peer.pid, gb, rows, repeat
                    )
                if example("scan_bench") is not None:
                    rust = partial(rust_pass, gb=gb, rows=rows, repeat=repeat)
                    cases[f"{way} | own Rust | Pinion"] = rust("pinion", url, asked(**ours), pinion.pid)
                    for name in files:
                        cases[f"{way} | arrow-flight | pyarrow server, {name} rows a batch"] = rust(
                            "arrow-flight", peer.url, {"file": name, **theirs}, peer.pid
                        )
            found[question] = {"gb": gb, "rows": rows, "rounds": rounds(cases, count, limit_seconds=60)}
    return {"questions": found}


def repeated(client, request, pid, gb, rows, repeat):
    def one():
        def scan():
            return {**client.call("scan", asked=request, repeat=repeat), "repeat": repeat}

        found = measured(scan, pid, gb)
        assert found["rows"] == rows * repeat, f"{found['rows']} rows of {rows} x {repeat}"
        found["wire_bytes"] /= repeat
        return found

    return one


# -- what is sent without a copy


def share(sizes, data, count):
    """Rows are replaced by puts to a copy of the store; a range of keys, then keys spread over the whole table."""
    copy = copy_store(data, DATA / "scan-share-work")
    try:
        steps = []
        with Pinion(copy) as pinion, Workers("scan", {"url": pinion.unix}, clients=1) as client:
            fixed = [field.name for field in serving.SCHEMA if not pa.types.is_string(field.type)]
            gb, writer = gigabytes(sizes), calls.connect(pinion)
            steps.append(
                step("no row, fixed-width columns", client, pinion, asked(features=fixed), gigabytes(sizes, fixed))
            )
            steps.append(step("no row", client, pinion, asked(), gb))
            replace(writer, np.arange(sizes.scan // 100))
            steps.append(step("1 % in one range of keys", client, pinion, asked(), gb))
            everywhere = np.random.default_rng(11).permutation(sizes.scan)
            done = 0
            for until in (50, 200, 1_000):
                replace(writer, np.sort(everywhere[done:until]))
                done = until
                steps.append(step(f"and {until:,} rows all over the table", client, pinion, asked(), gb))
        return {"steps": steps}
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def replace(writer, ids):
    for first in range(0, len(ids), 50_000):
        some = ids[first : first + 50_000]
        rows = serving.wide_chunk(0, len(some)).set_column(0, serving.KEY, pa.array(some))
        calls.put(writer, "scan", rows)


def step(replaced, client, pinion, request, gb):
    runs = [measured(lambda: client.call("scan", asked=request), pinion.pid, gb) for _ in range(4)][1:]
    metadata = runs[-1]["metadata"] or {}
    return {
        "replaced": replaced,
        "share": metadata.get("zero_copy_share"),
        "gb_per_second": [run["gb_per_second"] for run in runs],
        "server_cpu_per_gb": median([run["server_cpu_per_gb"] for run in runs]),
        "rows": runs[-1]["rows"],
    }


# -- copies, seen from outside

COPIES = re.compile(r"mem(cpy|move)|copy_nonoverlapping|extend_from_slice|copy_from_slice")


def copies(sizes, data, count):
    """A sampled profile of the server while a pyarrow client scans a clean table."""
    if shutil.which("perf") is None:
        raise Unmeasured("perf is missing (Debian calls it linux-perf)")
    found = {}
    with Pinion(data) as pinion, tempfile.TemporaryDirectory() as folder:
        for way, url in (("Unix socket", pinion.unix), ("TCP", pinion.flight)):
            with Workers("scan", {"url": url}, clients=1) as client:
                client.call("scan", asked=asked())
                file = f"{folder}/{way[:3]}.data"
                record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "1999", "-p", str(pinion.pid), "-o", file]
                with subprocess.Popen(record, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as perf:
                    time.sleep(0.3)
                    client.call("scan", asked=asked(), repeat=max(3, count))
                    perf.terminate()
                found[way] = profile(file)
    return {"profiles": found}


def profile(file):
    """Shares of the samples by kind, and the greatest symbols."""
    report = [
        "perf",
        "report",
        "--stdio",
        "-i",
        file,
        "--no-children",
        "-F",
        "overhead,dso,sym",
        "-w",
        "0,40,120",
        "-t",
        "|",
    ]
    done = subprocess.run(report, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unmeasured(f"perf recorded nothing: {done.stderr.strip()[-200:]}")
    said = done.stdout
    symbols = []
    for line in said.splitlines():
        if match := re.match(r"\s*([\d.]+)%\s*\|\s*(\S+)\s*\|\s*\[(.)\]\s*(.*)", line):
            percent, _, mode, symbol = match.groups()
            symbols.append((float(percent), "user" if mode == "." else "kernel", symbol.strip()))
    user = [(share, name) for share, mode, name in symbols if mode == "user"]
    return {
        "user_percent": sum(share for share, _ in user),
        "copy_percent": sum(share for share, name in user if COPIES.search(name)),
        "top": [list(found) for found in symbols[:12]],
    }


# -- a cold scan beside hot lookups


def cold(sizes, data, count):
    """The table's pages are dropped while no server maps them; then lookups run alone, and beside the cold scan."""
    found = []
    paths = {"Flight, Unix socket": "flight"} | ({} if missing_lane() else {"local lane": "lane"})
    for number in range(min(count, 3)):
        for path, kind in paths.items():
            dropped = drop_pages([f for f in scan_table(data).rglob("*") if f.is_file() and f.stat().st_size])
            with Pinion(data, env=RAISED) as pinion, ExitStack() as stack:
                where = {"url": pinion.unix} if kind == "flight" else {"socket": str(pinion.lane)}
                lookups = Workers(kind, {**where, "table": "profile", "features": serving.FEATURES}, clients=1)
                stack.enter_context(lookups)
                scan = stack.enter_context(Workers("scan", {"url": pinion.unix}, clients=1))

                ask = partial(lookups.run, 1, 100, among=sizes.profile, step=1, seed=number)

                ask(seconds=1.0)
                alone = ask(seconds=1.5)
                scan.start(1, "scan", asked=asked())
                beside = ask(seconds=1.5)
                [scanned] = scan.finish()
                scan.start(1, "scan", asked=asked(), repeat=3)
                hot = ask(seconds=1.5)
                scan.finish()
            assert scanned["rows"] == sizes.scan
            found.append(
                {"path": path, "resident_before": dropped, "alone": alone, "beside_cold": beside, "beside_hot": hot}
                | {"scan_seconds": scanned["seconds"]}
            )
    return {"gb": gigabytes(sizes), "runs": found}


def scan_table(data):
    """The folder of the table `scan`: the first that was made."""
    return sorted((data / "tables").iterdir())[0]


# -- a table in a process on the same machine


def delivered(sizes, data, count):
    files = serving.scan_files(sizes)
    file = serving.mapped(files["64k"])
    row = int(np.random.default_rng(5).integers(0, sizes.scan))
    expect = {"rows": sizes.scan, "row": row, "value": file["f3"][row].as_py()}
    from scan_clients import sums

    expected = sums(file)

    def once(kind, options):
        def one():
            with Workers(kind, options, clients=1) as fresh:
                found = fresh.call("deliver", **expect)
            assert np.allclose(found.pop("sums"), expected, rtol=1e-6), "the sums differ from the file's"
            return found

        return one

    with ExitStack() as stack:
        pinion = stack.enter_context(Pinion(data))
        unix = stack.enter_context(PyarrowServer(files, uds=True))
        cases = {
            f"pyarrow Flight server, {name} rows a batch": once(
                "table-flight", {"url": unix.url, "asked": {"file": name}}
            )
            for name in files
        }
        cases["Pinion, Flight"] = once("table-flight", {"url": pinion.unix, "asked": asked()})
        if why := missing_lane():
            print(f"the mapped table is not measured: {why}")
        else:
            cases["Pinion, mapped over the local lane"] = once("table-mapped", {"socket": str(pinion.lane)})
        found = rounds(cases, count, warm=1)
    return {"gb": gigabytes(sizes), "rounds": found}


if __name__ == "__main__":
    main()
