"""Waiting for what must become true, with a limit and a reason when it does not."""

import time


def until(condition, seconds=30, what="the condition", every=0.05, why=None):
    """Calls `condition` until it returns something true, and returns that. What `why` returns is told on failure."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            told = f"\n{why()}" if why else ""
            raise AssertionError(f"{what} did not come true within {seconds} s (last: {value!r}){told}")
        time.sleep(every)
