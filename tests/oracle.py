"""What a feature table must answer, in plain Python: sort a list and look.

Shares no code with Pinion and knows nothing of its files. Times are any comparable values of one kind; a ttl
or a history duration is whatever may be subtracted from them. Statuses are the numbers on the wire.
"""

from dataclasses import dataclass, field
from typing import Any

PRESENT, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE = 1, 2, 3, 4


@dataclass
class Version:
    """One row or delete of one key."""

    time: Any
    sequence: int
    row: dict | None  # None: a delete


@dataclass
class Oracle:
    """A table: give it rows in the order in which they were committed, then ask."""

    entity: list
    event_time: str | None = None
    history: Any = "latest"  # "latest", "all" or a duration
    ttl: Any = None
    versions: dict = field(default_factory=dict)
    sequence: int = 0
    greatest: Any = None

    def key(self, row):
        return tuple(row[column] for column in self.entity)

    def upsert(self, row):
        self._add(self.key(row), row[self.event_time] if self.event_time else None, dict(row))

    def delete(self, key, time=None):
        self._add(tuple(key), time, None)

    def _add(self, key, time, row):
        self.sequence += 1
        self.versions.setdefault(key, []).append(Version(time, self.sequence, row))
        if time is not None and (self.greatest is None or time > self.greatest):
            self.greatest = time

    def _ordered(self, key):
        """The visible versions of a key, oldest first."""
        found = self.versions.get(tuple(key), [])
        if self.event_time is None:
            found = sorted(found, key=lambda v: v.sequence)
        else:
            found = sorted(found, key=lambda v: (v.time, v.sequence))
        if self.history == "latest":
            return found[-1:]
        if self.history != "all":
            found = [v for v in found if v.time >= self.greatest - self.history]
        return found

    def winner(self, key, as_of=None):
        """The row that answers for a key, or None."""
        found = self._ordered(key)
        if as_of is not None and self.event_time is not None:
            found = [v for v in found if v.time <= as_of]
        return found[-1].row if found else None

    def lookup(self, keys, features, as_of=None, now=None):
        """feature -> (values, statuses), in the order of `keys`."""
        answers = {feature: ([], []) for feature in features}
        for key in keys:
            row = self.winner(key, as_of)
            for feature in features:
                value, status = self._judge(row, feature, as_of if as_of is not None else now)
                answers[feature][0].append(value)
                answers[feature][1].append(status)
        return answers

    def _judge(self, row, feature, at):
        if row is None:
            return None, NOT_FOUND
        if self.ttl is not None and at is not None and row[self.event_time] < at - self.ttl:
            return None, OUTSIDE_MAX_AGE
        value = row.get(feature)
        return (value, NULL_VALUE) if value is None else (value, PRESENT)

    def latest(self):
        """One row per key that has one."""
        return [row for row in (self.winner(key) for key in self.versions) if row is not None]

    def rows(self):
        """What a scan of the whole table returns, in no particular order."""
        if self.history == "latest":
            return self.latest()
        return [v.row for key in self.versions for v in self._ordered(key) if v.row is not None]


def same_rows(found, expected):
    """Asserts that two lists of dicts hold the same rows, each as often; says which differ."""

    def canonical(rows):
        return sorted((sorted(row.items(), key=lambda item: item[0]) for row in rows), key=repr)

    found, expected = canonical(found), canonical(expected)
    if found != expected:
        surplus = [dict(row) for row in found if row not in expected][:3] if len(found) < 50_000 else "many"
        missing = [dict(row) for row in expected if row not in found][:3] if len(found) < 50_000 else "many"
        raise AssertionError(
            f"{len(found)} rows, expected {len(expected)}; not expected: {surplus}; missing: {missing}"
        )
