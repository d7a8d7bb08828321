"""What a reader may wait for: records of topics, and puts.

Whoever wrote says what a reader must see at least, in one of these forms, and hands it on:

    {"clicks": {0: 41, 3: 7}}         # topic -> partition -> offset of a record
    pinion.Offsets                    # the same, gathered from a producer's delivery reports
    client.put(...)                   # an acknowledgement, or its "token" alone

A list of them waits for all. Tokens and plain offsets are JSON, and `Offsets.token()` is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, Union

from pinion import errors

Wait = Union["Offsets", Mapping[str, Any], list, tuple]
"""One of the forms above, or a list of them."""


class Offsets:
    """The last record written to each partition: what a reader must have seen at least.

        seen = pinion.Offsets()
        producer.produce("clicks", value, on_delivery=seen.delivered)
        producer.flush()
        client.lookup(["clicks:page"], {"user": ["a"]}, wait=seen)

    Threads may share it. Records of a transaction count once it is committed: commit, then wait; the records of
    one that is still open, and all that follow them in their partitions, come into no table.
    """

    def __init__(self, offsets: Mapping[str, Mapping[Any, int]] | None = None):
        self._lock = threading.Lock()
        self._last: dict[str, dict[int, int]] = {}
        for topic, partitions in (offsets or {}).items():
            for partition, offset in partitions.items():
                self.see(topic, partition, offset)

    def see(self, topic: str, partition: int, offset: int) -> Offsets:
        """Takes in one record. A smaller offset than one seen before changes nothing."""
        partition, offset = int(partition), int(offset)
        if partition < 0 or offset < 0:
            raise ValueError(
                f"{topic} partition {partition} offset {offset} names no record: was it produced with acks=0?"
            )
        with self._lock:
            last = self._last.setdefault(topic, {})
            last[partition] = max(last.get(partition, 0), offset)
        return self

    def add(self, report: Any) -> Offsets:
        """Takes in a delivery report: anything with `topic`, `partition` and `offset`, as methods
        (confluent-kafka's `Message`) or as attributes (the `RecordMetadata` of kafka-python and aiokafka)."""
        topic, partition, offset = (
            member() if callable(member) else member for member in (report.topic, report.partition, report.offset)
        )
        return self.see(topic, partition, -1 if offset is None else offset)

    def delivered(self, error: Any, report: Any) -> None:
        """A delivery callback for confluent-kafka: adds what was delivered, and nothing for a failure."""
        if error is None:
            self.add(report)

    def token(self) -> dict[str, dict[str, int]]:
        """`{topic: {partition: offset}}` as JSON has it, to hand to another process."""
        with self._lock:
            return {
                topic: {str(partition): offset for partition, offset in sorted(last.items())}
                for topic, last in sorted(self._last.items())
            }

    def __bool__(self) -> bool:
        return bool(self._last)

    def __repr__(self) -> str:
        return f"Offsets({self.token()})"

    def __reduce__(self):
        # The lock stays where it is.
        return type(self), (self.token(),)


def members(wait: Wait | None, wait_timeout: float | None) -> dict[str, Any]:
    """The members of a command that make it wait: docs/protocol.md, "Barriers"."""
    offsets, tokens = Offsets(), []
    _gather(wait, offsets, tokens)
    found: dict[str, Any] = {}
    if offsets:
        found["at_least"] = offsets.token()
    if tokens:
        found["token"] = tokens
    if wait_timeout is not None:
        if wait_timeout < 0:
            raise errors.InvalidArgument(f"wait_timeout is {wait_timeout} s", "COMMAND_MEMBER")
        found["timeout_ms"] = math.ceil(wait_timeout * 1000)
    return found


def _gather(wait: Any, offsets: Offsets, tokens: list[Any]) -> None:
    if wait is None:
        return
    if isinstance(wait, (list, tuple)):
        for part in wait:
            _gather(part, offsets, tokens)
        return
    if isinstance(wait, Offsets):
        wait = wait.token()
    if not isinstance(wait, Mapping):
        raise TypeError(f"wait for Offsets, {{topic: {{partition: offset}}}} or a put's token, not {wait!r}")
    # Topics may have these names; what they map to is a partition's offsets.
    if isinstance(wait.get("durable"), bool) and "token" in wait:
        wait = wait["token"] or {}
    if isinstance(wait.get("snapshot"), str):
        tokens.append(dict(wait))
        return
    for topic, partitions in wait.items():
        if not isinstance(partitions, Mapping):
            raise TypeError(f"wait: {topic!r} is no topic's {{partition: offset}}: {partitions!r}")
        for partition, offset in partitions.items():
            offsets.see(topic, partition, offset)
