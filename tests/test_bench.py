"""The benchmarks run: trials at tiny sizes, with their peers, print their tables and leave nothing behind."""

import os
import shutil
import subprocess
import sys

import pytest
from support.process import REPOSITORY, binary


def trial(folder, script, *arguments):
    """What a benchmark prints."""
    env = {**os.environ, "PINION_BENCH_DATA": str(folder), "PINION_TEST_BINARY": str(binary().resolve())}
    document = (REPOSITORY / "docs" / "benchmarks.md").read_bytes()
    command = [sys.executable, str(REPOSITORY / "bench" / script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (REPOSITORY / "docs" / "benchmarks.md").read_bytes() == document, "a trial writes no results"
    return done.stdout


def test_a_trial_of_the_scan_benchmark_prints_its_tables(tmp_path):
    said = trial(tmp_path, "scan.py", "part", "share", "--rows", "10000", "--rounds", "1")
    for expected in (
        "| 3 of 22 columns | TCP | pyarrow <- Pinion |",
        "| 1 % of the rows | Unix socket | pyarrow <- pyarrow server, 256k rows a batch |",
        "| and 1,000 rows all over the table |",
        "foreign_cpu_share",
    ):
        assert expected in said, said


def example_or_skip(name):
    if not (binary().resolve().parent / "examples" / name).exists():
        pytest.skip(f"{name} is not built (cargo build --release --package pinion-gds --examples)")


def test_a_trial_of_the_loads_of_pins_measures_pin_files_copy_and_fio(tmp_path):
    example_or_skip("host_load")
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    said = trial(tmp_path, "pins.py", "load", "--rows", "40000", "--rounds", "1")
    for expected in ("| cold | pin, frozen |", "| cold | fio, 4 x 8 |", "| warm | files |", "| warm | copy, 8 threads |"):
        assert expected in said, said
    assert "40,000 rows in 1 segment" in said, said


@pytest.mark.parametrize("setting", ["host", "bounce, fake driver, late", "direct, fake driver"])
def test_a_trial_of_fresh_pins_compares_generations_with_their_snapshots(tmp_path, setting):
    example_or_skip("pin_bench")
    sizes = ("--keys", "20000", "--rate", "1000", "--seconds", "3", "--compare", "2")
    said = trial(tmp_path, "pins.py", "fresh", *sizes, "--only", setting)
    [row] = [line for line in said.splitlines() if line.startswith(f"| {setting} |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    stalls, reloads, compared = cells[7:10]
    # Two of the second-long leases and the last one; four slots are enough for two consumers.
    assert (stalls.split()[0], reloads, compared) == ("0", "0", "3 of 9"), said
    assert f"{setting}: 300 commits," in said, said
