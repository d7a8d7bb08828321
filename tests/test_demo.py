"""`pinion demo` is the first thing anyone runs: it must end by itself and show its figures."""

import re

from support.process import pinion


def test_the_demo_ends_by_itself_and_prints_its_figures():
    done = pinion("demo", "--seconds", "5", "--users", "100000", timeout=240)
    said = done.stdout + done.stderr
    for figure in (
        r"rows/s",
        r"events/s",
        r"p50",
        r"p99",
        r"GB/s",
        r"mock",
        r"grpc://127\.0\.0\.1:\d+",
        r"import pyarrow",
    ):
        assert re.search(figure, said), f"{figure} is missing in:\n{said}"
    assert "\x1b[" not in said, "colours or cursor movements although this is no terminal"
