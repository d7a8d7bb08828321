"""What the benchmarks share: where data lies, watching a process, results as JSON, tables in docs/benchmarks.md."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.process import Server, binary, environment, pinion  # noqa: F401

DATA = Path(
    os.environ.get(
        "PINION_BENCH_DATA", Path(os.environ.get("PINION_CACHE", Path.home() / ".cache" / "pinion")) / "bench"
    )
)
RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"


def machine():
    """What the figures were measured on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    version = subprocess.run([str(binary()), "version"], capture_output=True, text=True).stdout.strip().splitlines()
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1),
        "kernel": platform.release(),
        "pinion": " ".join(version[0].split()) if version else "",
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": os.getloadavg()[0],
    }


def watch(command, env=None, every=0.02):
    """Runs a command to its end; returns seconds, CPU seconds, and the peak of its anonymous memory in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, rss_anon(process.pid))
        time.sleep(every)
    seconds = time.monotonic() - began
    output = process.stdout.read()
    if process.returncode != 0:
        raise RuntimeError(f"{command} exited {process.returncode}\n{output}")
    return {"seconds": seconds, "peak_rss_anon_bytes": peak, "output": output}


def rss_anon(pid):
    """Anonymous resident bytes: mapped files are the page cache's, not the process's."""
    try:
        found = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found.group(1)) * 1024 if found else 0
    except (FileNotFoundError, ProcessLookupError):
        return 0


def cpu_seconds(pid):
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def directory_bytes(path):
    """Bytes that the files below take on disk (blocks, so that preallocated space counts)."""
    return sum(f.stat().st_blocks * 512 for f in Path(path).rglob("*") if f.is_file())


def median(values):
    return statistics.median(values)


def save(name, result):
    """Writes bench/results/NAME.json and puts the tables into docs/benchmarks.md."""
    result = {"machine": machine(), **result}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    render(name, result)
    print(f"wrote {path}")


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def render(name, result):
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->`."""
    machine = result["machine"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}; "
        f"{machine['pinion']}; {machine['when']}; load average before: {machine['load_before']:.1f}"
    )
    body = (
        table(result["header"], result["rows"])
        + "\n\n"
        + "\n".join(f"- {note}" for note in result["notes"])
        + f"\n\n{where}\n"
    )
    print(body)
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin in text:
        head, rest = text.split(begin, 1)
        tail = rest.split(end, 1)[1]
        DOCUMENT.write_text(f"{head}{begin}\n{body}{end}{tail}")
