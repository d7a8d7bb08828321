"""The benchmarks run: a trial of the scans at a tiny size, with peer, prints its tables and leaves nothing behind."""

import os
import subprocess
import sys

from support.process import REPOSITORY, binary


def test_a_trial_of_the_scan_benchmark_prints_its_tables(tmp_path):
    env = {**os.environ, "PINION_BENCH_DATA": str(tmp_path), "PINION_TEST_BINARY": str(binary().resolve())}
    document = (REPOSITORY / "docs" / "benchmarks.md").read_bytes()
    command = [
        sys.executable,
        str(REPOSITORY / "bench" / "scan.py"),
        "part",
        "share",
        "--rows",
        "10000",
        "--rounds",
        "1",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        "| 3 of 22 columns | TCP | pyarrow <- Pinion |",
        "| 1 % of the rows | Unix socket | pyarrow <- pyarrow server, 256k rows a batch |",
        "| and 1,000 rows all over the table |",
        "foreign_cpu_share",
    ):
        assert expected in done.stdout, done.stdout
    assert (REPOSITORY / "docs" / "benchmarks.md").read_bytes() == document, "a trial writes no results"
