"""Pins of a running server: from `pin` to the first tensor, gathers, and how soon a refresh is seen.

    python3 pin_checks.py --out FILE.json [--binary PINION] [--device 0|host] [--rows N] [--seconds N]

Starts a `pinion serve` of its own, on a store of its own that it removes. Needs the program (gds/verify/bin/pinion, or
the one named), the Python client (python/ of this repository) with pyarrow, and torch; without one of them it says
which. `--device host` needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "python")]

from torch_checks import Report  # noqa: E402

FEATURES = [f"f{number:03}" for number in range(64)]
DEFINITION = """
[table]
name = "verify"
entity = [{ name = "id", type = "int64" }]
event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
history = "latest"

[features]
""" + "".join(f'{name} = "float32"\n' for name in FEATURES)


class Server:
    """`pinion serve`; leaving the block stops it."""

    def __init__(self, binary, folder):
        self.binary, self.folder = str(binary), Path(folder)
        self.data, self.lane, self.ready = (self.folder / name for name in ("store", "lane.sock", "ready.json"))

    def command(self, *arguments):
        done = subprocess.run([self.binary, *map(str, arguments)], capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"pinion {arguments[0]}: {done.stderr[-400:]}")

    def __enter__(self):
        definition = self.folder / "verify.toml"
        definition.write_text(DEFINITION)
        self.command("init", "--data", self.data)
        self.command("apply", "--data", self.data, definition)
        command = [self.binary, "serve", "--data", self.data, "--flight", "127.0.0.1:0", "--admin", "127.0.0.1:0",
                   "--lane", self.lane, "--ready-file", self.ready]  # fmt: skip
        log = (self.folder / "serve.log").open("wb")
        self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        start = time.monotonic()
        while not self.ready.exists():
            if self.process.poll() is not None or time.monotonic() - start > 60:
                self.__exit__()
                said = (self.folder / "serve.log").read_text(errors="replace")[-600:]
                raise RuntimeError(f"the server did not start: {said}")
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def url(self):
        first = json.loads(self.ready.read_text())["flight"]
        first = first[0] if isinstance(first, list) else first
        return first if "://" in first else f"grpc://{first}"


def rows(pyarrow, numpy, ids, version):
    """Every feature is the row's id plus its number plus the version, so that any value can be checked."""
    ids = numpy.asarray(ids, dtype="int64")
    at = numpy.full(len(ids), 1_700_000_000_000_000 + version, dtype="int64")
    columns = {"id": pyarrow.array(ids), "at": pyarrow.array(at, pyarrow.timestamp("us", tz="UTC"))}
    for number, name in enumerate(FEATURES):
        columns[name] = pyarrow.array((ids % 4096 + number + version).astype("float32"))
    return pyarrow.table(columns)


class Scene:
    def __init__(self, report, options, client, modules):
        self.report, self.options, self.client = report, options, client
        self.torch, self.pyarrow, self.numpy = modules
        self.given = f"{options.rows} rows x {len(FEATURES)}"
        self.bytes = options.rows * len(FEATURES) * 4

    def pin(self, mode):
        device = "host" if self.options.device == "host" else int(self.options.device)
        return self.client.pin("verify", FEATURES, device=device, mode=mode, layout="columns", name=mode)

    def synchronize(self):
        if self.options.device != "host":
            self.torch.cuda.synchronize()

    def first_tensor(self, mode):
        """From the call to a value on the host that a tensor over the pin gave."""
        if self.options.device != "host":
            self.torch.zeros(1, device="cuda")
            self.synchronize()
        start = time.perf_counter()
        pin = self.pin(mode)
        pinned = time.perf_counter()
        with pin.latest() as view:
            matrix = view.to_torch(matrix=True)
            total = float(matrix[:, 0].double().sum())
            seconds = time.perf_counter() - start
            loaded = self.bytes / 1e9 / (pinned - start)
            expected = float((self.numpy.arange(self.options.rows) % 4096).sum())
            self.report.figure(f"pin to first tensor, {mode}", self.given, seconds * 1e3, "ms")
            self.report.figure(f"pin: rate of the load, {mode}", self.given, loaded, "GB/s")
            self.report.check(f"pin: values of a {mode} pin", total == expected, f"sum {total}, expected {expected}")
            checked = view.verify()
            self.report.check(f"pin: checksums of a {mode} pin", checked["bytes"] >= self.bytes, checked)
        return pin

    def gather(self, pin):
        count = min(65_536, self.options.rows)
        with pin.latest() as view:
            matrix = view.to_torch(matrix=True)
            ids = self.torch.randperm(self.options.rows, device=matrix.device)[:count]
            for name, work in (
                ("pin: index_select of the matrix", lambda: matrix.index_select(0, ids)),
                ("pin: view.take of the matrix", lambda: view.take(ids, matrix=True)),
            ):
                work()
                self.synchronize()
                start, calls = time.perf_counter(), 0
                while calls == 0 or time.perf_counter() - start < self.options.seconds:
                    work()
                    calls += 1
                self.synchronize()
                moved = 2 * count * len(FEATURES) * 4 * calls
                self.report.figure(name, f"{count} of {self.given}", moved / 1e9 / (time.perf_counter() - start), "GB/s")
            right = self.torch.equal(view.take(ids, matrix=True), matrix.index_select(0, ids))
            self.report.check("pin: view.take is index_select", right, f"equal: {right}")

    def refresh(self, pin):
        """From a write to a generation that has it."""
        changed = max(1, self.options.rows // 100)
        times = []
        for version in range(1, 6):
            ids = self.numpy.arange(changed) * 97 % self.options.rows
            before = self.number(pin)
            start = time.perf_counter()
            self.client.put("verify", rows(self.pyarrow, self.numpy, self.numpy.unique(ids), version))
            written = time.perf_counter()
            while self.number(pin) == before:
                if time.perf_counter() - written > 10:
                    raise RuntimeError("no new generation within 10 s of a write")
                time.sleep(0.0005)
            times.append((time.perf_counter() - start, time.perf_counter() - written))
        times.sort()
        given = f"{changed} rows changed of {self.options.rows}"
        middle = times[len(times) // 2]
        self.report.figure("refresh: write and new generation, median", given, middle[0] * 1e3, "ms")
        self.report.figure("refresh: new generation after the write", given, sorted(t[1] for t in times)[2] * 1e3, "ms")
        with pin.latest() as view:
            row = int(view.row_ids({"id": [0]})[0])
            value = float(view.to_torch(matrix=True)[row, 0])
            self.report.check("refresh: what was written last is there", value == 5.0, f"row 0 is {value}, expected 5.0")

    def number(self, pin):
        with pin.latest() as view:
            return view.snapshot


def run(report, options):
    names = ("torch", "pyarrow", "numpy", "pinion")
    modules = {}
    for name in names:
        try:
            modules[name] = importlib.import_module(name)
        except Exception as error:
            report.lacks("pins of a server", f"{name}: {type(error).__name__}: {error}")
            return
    if not hasattr(modules["pinion"].client.Client, "pin"):
        report.lacks("pins of a server", "the Python client of this checkout has no pins")
        return
    if not Path(options.binary).is_file():
        report.lacks("pins of a server", f"no program: {options.binary}")
        return
    if options.device != "host" and not modules["torch"].cuda.is_available():
        report.lacks("pins of a server", "torch sees no GPU (--device host needs none)")
        return
    # A socket's path has about 100 bytes: the lane's folder is in /tmp, whatever the disk to measure is.
    with tempfile.TemporaryDirectory(prefix="gds-verify-") as folder, Server(options.binary, folder) as server:
        client = modules["pinion"].connect(server.url(), lane=f"lane://{server.lane}")
        with client:
            scene = Scene(report, options, client, [modules[name] for name in ("torch", "pyarrow", "numpy")])
            step = 100_000
            for start in range(0, options.rows, step):
                ids = range(start, min(start + step, options.rows))
                client.put("verify", rows(scene.pyarrow, scene.numpy, ids, 0))
            client.action("merge", {"table": "verify"}) if hasattr(client, "action") else None
            scene.first_tensor("frozen")
            fresh = scene.first_tensor("fresh")
            scene.gather(fresh)
            scene.refresh(fresh)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--binary", default=os.environ.get("PINION", str(HERE / "bin" / "pinion")))
    parser.add_argument("--device", default="0")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=0.4)
    options = parser.parse_args()
    report = Report()
    try:
        run(report, options)
    except Exception as error:
        report.check("pins of a server", False, f"broke off: {type(error).__name__}: {error}")
    finally:
        Path(options.out).write_text(json.dumps(report.json(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
