"""Pins: tables in the memory of a device, read where they lie and kept fresh by the server.

    pin = client.pin("user_profile", device="host")
    with pin.latest() as view:                  # one message; no copy
        view.to_torch()                         # {feature: tensor} on the device
        view.to_torch(matrix=True)              # one tensor [rows, features]
        view.take(view.row_ids(users))          # gathered by key

A `View` is one generation, leased: while it is open, and while anything that it gave out without a copy is
alive, the server does not write its slot. After that the lease ends by itself, once the work that could read the
slot is done (`leases`); a fresh pin whose slots are all leased stays at its generation.

Elsewhere: the promises (docs/local-lane.md, "Pins"), what a view gives out (`view`), batches for training (`torch`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pinion import errors, held
from pinion import lane as wire
from pinion.leases import Releaser
from pinion.lent import LentView
from pinion.mapping import Mapping
from pinion.view import View

# A server may be restarted, or a pin laid out anew, while it is asked for.
ATTEMPTS = 4


class PinLane:
    """A connection of its own for pins: it outlives the client while anything is leased."""

    def __init__(self, path: str, timeout: float | None):
        self.pid = os.getpid()
        self.lane = held.HeldLane(path, timeout)
        self.releaser = Releaser(self.lane)
        weakref.finalize(self, self.releaser.close).atexit = False


class Pin:
    """A pinned table, by `Client.pin`. Threads may share it; processes may not."""

    def __init__(self, room: PinLane, pin: str, again: Callable[[], str]):
        """`again` pins it anew, after the server was: returns the new id."""
        self._room = room
        self._again = again
        self._lock = threading.Lock()
        self._closed = False
        self._mapping: Mapping | None = Mapping(room.lane, room.releaser, pin)
        # Views whose block a thread is in.
        self._entered = threading.local()

    @property
    def id(self) -> str:
        """The server's id of this pin."""
        return self._mapped().pin

    @property
    def name(self) -> str:
        return self._mapped().info["name"]

    @property
    def table(self) -> str:
        return self._mapped().info["table"]

    @property
    def mode(self) -> str:
        """`fresh` or `frozen`."""
        return self._mapped().layout["kind"]

    @property
    def form(self) -> str:
        """`columns`, a copy in the layout of pins; or `segments`, the table's own files, lent."""
        return self._mapped().layout["form"]

    @property
    def device(self) -> dict[str, Any]:
        """Where it lies: `kind` (`host`, `cuda`), `uuid`, and the `ordinal` that the device has in this process."""
        mapping = self._mapped()
        device = dict(mapping.layout["device"])
        if mapping.device is not None:
            device["ordinal"] = mapping.device.ordinal
        return device

    @property
    def schema(self) -> pa.Schema:
        """The pinned columns as the table declares them."""
        return self._mapped().result

    @property
    def key(self) -> list[str]:
        """The table's key columns, pinned or not."""
        return list(self._mapped().info["key"])

    @property
    def row_count(self) -> int:
        """Rows of the generation that was leased last, or was the newest when the slots were imported."""
        return self._mapped().info["generation"]["rows"]

    def latest(self) -> View:
        """Leases the newest generation. Use it as a context: `with pin.latest() as view`.

        Never waits for a newer one. Imports the slots anew when the pin was laid out anew, or the server
        restarted; raises `UnknownPin` when it was unpinned.
        """
        for attempt in range(ATTEMPTS):
            mapping = self._mapped()
            try:
                reply, hold = mapping.lease()
            except (errors.LayoutChanged, errors.LeaseGone):
                if attempt == ATTEMPTS - 1:
                    raise
                self._map_anew(mapping)
                continue
            mapping.info["generation"] = reply
            view = View if mapping.files is None else LentView
            return view(self, mapping, reply, hold)
        raise AssertionError("unreachable")

    def rows(self, keys: Any) -> Any:
        """`View.row_ids` of the view that is open in this thread."""
        return self._opened().row_ids(keys)

    def take(self, rows: Any, **options: Any) -> Any:
        """`View.take` of the view that is open in this thread."""
        return self._opened().take(rows, **options)

    def verify(self) -> dict[str, int]:
        """Compares every used byte of the newest generation with what the server reads in it, or with what was
        recorded of it when it was written, where the pin is lent.

        Returns `{"number": generation, "buffers": n, "bytes": n}`; raises `DataLoss` at the first difference. Reads
        the whole pin on both sides.
        """
        with self.latest() as view:
            return view.verify()

    def close(self) -> None:
        """Lets the slots go, once nothing that was given out refers to them. The pin stays: see `Client.unpin`."""
        self._closed = True
        self._mapping = None

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _mapped(self) -> Mapping:
        if os.getpid() != self._room.pid:
            raise errors.Forked(
                "this pin was made by the process that this one was forked from: pin it anew here (on a GPU only in"
                " a process started by 'spawn'), or read it in the parent",
                "FORKED",
            )
        mapping = self._mapping
        if mapping is None:
            raise errors.FailedPrecondition("this pin was closed", "CLOSED")
        return mapping

    def _map_anew(self, old: Mapping) -> None:
        with self._lock:
            if self._mapping is not old:
                return  # another thread was quicker, or it was closed
            lane, releaser = self._room.lane, self._room.releaser
            try:
                self._mapping = Mapping(lane, releaser, old.pin)
            except errors.UnknownPin:
                if lane.generation == old.generation:
                    raise  # unpinned
                # Another server, or the same one restarted: it knows nothing of the old pin.
                self._mapping = Mapping(lane, releaser, self._again())
            if self._closed:
                self._mapping = None

    @property
    def _open(self) -> list[View]:
        return self._entered.__dict__.setdefault("views", [])

    def _opened(self) -> View:
        if not self._open:
            raise errors.FailedPrecondition(
                "row numbers are those of a leased generation: use this within `with pin.latest() as view`", "NOT_OPEN"
            )
        return self._open[-1]
