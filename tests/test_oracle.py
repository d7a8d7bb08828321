"""The oracle itself: if it is wrong, everything that is compared with it is worthless."""

import pytest

from oracle import NOT_FOUND, NULL_VALUE, OUTSIDE_MAX_AGE, PRESENT, Oracle, same_rows


def row(key, time, value):
    return {"k": key, "t": time, "v": value}


def test_the_greatest_event_time_wins_whatever_the_order_of_arrival():
    table = Oracle(["k"], "t")
    for time in (3, 1, 2):
        table.upsert(row("a", time, time))
    assert table.winner(("a",)) == row("a", 3, 3)


def test_of_equal_event_times_the_later_commit_wins_and_history_keeps_both():
    table = Oracle(["k"], "t", history="all")
    table.upsert(row("a", 1, "first"))
    table.upsert(row("a", 1, "second"))
    assert table.winner(("a",))["v"] == "second"
    assert len(table.rows()) == 2


def test_a_delete_hides_the_key_from_its_time_until_a_newer_row():
    table = Oracle(["k"], "t", history="all")
    table.upsert(row("a", 1, 1))
    table.delete(("a",), 5)
    assert table.winner(("a",), as_of=4)["v"] == 1
    assert table.winner(("a",), as_of=5) is None
    table.upsert(row("a", 7, 7))
    assert table.winner(("a",))["v"] == 7


def test_a_duration_cuts_relative_to_the_greatest_event_time():
    table = Oracle(["k"], "t", history=10)
    for time in (0, 5, 15):
        table.upsert(row("a", time, time))
    assert sorted(r["t"] for r in table.rows()) == [5, 15]


def test_statuses_tell_null_absent_and_expired_apart():
    table = Oracle(["k"], "t", ttl=10)
    table.upsert(row("a", 100, None))
    table.upsert(row("b", 100, 1))
    table.upsert(row("c", 50, 1))
    values, statuses = table.lookup([("a",), ("b",), ("c",), ("d",)], ["v"], now=105)["v"]
    assert values == [None, 1, None, None]
    assert statuses == [NULL_VALUE, PRESENT, OUTSIDE_MAX_AGE, NOT_FOUND]


def test_same_rows_counts_repetitions():
    same_rows([row("a", 1, 1)], [row("a", 1, 1)])
    with pytest.raises(AssertionError):
        same_rows([row("a", 1, 1)] * 2, [row("a", 1, 1)])
