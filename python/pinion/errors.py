"""Errors: one class per gRPC code, so that `except` tells whose fault it is, and some by name.

Every `PinionError` has `error`, the server's upper-case name (`"UNKNOWN_TABLE"`; the table of
docs/protocol.md says what to do about each), `message`, `code` (the name of the gRPC code) and
`details`, the names and numbers that belong to it.
"""

from __future__ import annotations

import json
from typing import Any


class PinionError(Exception):
    """The server refused a request, or the way to it failed."""

    code = "UNKNOWN"

    def __init__(self, message: str, error: str | None = None, details: dict[str, Any] | None = None):
        super().__init__(message)
        self.message = message
        self.error = error
        self.details = dict(details or {})

    def __reduce__(self):
        # Errors cross processes (multiprocessing): keep what belongs to them.
        return type(self), (self.message, self.error, self.details)


class Cancelled(PinionError):
    """The call was taken back."""

    code = "CANCELLED"


class InvalidArgument(PinionError, ValueError):
    """The request is wrong: correct it."""

    code = "INVALID_ARGUMENT"


class UnknownFeature(InvalidArgument):
    """A feature or column that the table does not have. `details["hint"]` is the nearest."""


class DeadlineExceeded(PinionError, TimeoutError):
    """A barrier was not reached in time. `details["positions"]` says how far it got."""

    code = "DEADLINE_EXCEEDED"


class NotFound(PinionError, LookupError):
    """What was asked for does not exist."""

    code = "NOT_FOUND"


class UnknownTable(NotFound):
    """No such table. `details["hint"]` is the nearest name."""


class UnknownPin(NotFound):
    """No such pin: it was unpinned, or the server was started anew."""


class PermissionDenied(PinionError):
    """Not allowed."""

    code = "PERMISSION_DENIED"


class PeerRefused(PermissionDenied):
    """The local lane is not open to this user: `details["uid"]`."""


class ResourceExhausted(PinionError):
    """Over a limit: ask for less, or wait. The details name the limit."""

    code = "RESOURCE_EXHAUSTED"


class LeasedMaxBytes(ResourceExhausted):
    """Mapped files may hold no more disk. `details["holder_pid"]` holds the most."""


class FailedPrecondition(PinionError):
    """The state does not allow it: the message says what to do first."""

    code = "FAILED_PRECONDITION"


class SnapshotExpired(FailedPrecondition):
    """The snapshot is no longer kept: ask for the newest."""


class SnapshotLost(FailedPrecondition):
    """A power cut took rows that the snapshot held."""


class DefinitionChanged(FailedPrecondition):
    """The table changed under a prepared lookup: prepare again."""


class LeaseOverdue(FailedPrecondition):
    """A lease of this connection is past its term: release or renew it."""


class LayoutChanged(FailedPrecondition):
    """A pin was laid out anew: its slots are imported again."""


class LeaseGone(FailedPrecondition):
    """The connection that held a lease is gone: what was leased may have changed since it broke."""


class Forked(FailedPrecondition):
    """Made in another process than this one, which was forked from it: make it anew here."""


class HasNulls(FailedPrecondition):
    """A column without a value that could mean null holds nulls: ask for `mask=True`. `details["column"]`."""


class NoTensor(InvalidArgument, TypeError):
    """A column whose type no tensor has, or columns that are no matrix: `details["column"]`."""


class DeviceUnavailable(FailedPrecondition):
    """This process cannot use the device: no driver, no such GPU, or a fork of a process that uses CUDA."""


class DeviceError(PinionError):
    """The CUDA driver refused a call: `details` has `call`, `code` and `name`, the driver's name of the code."""


class Aborted(PinionError):
    """The server gave up, for instance because the client read nothing."""

    code = "ABORTED"


class Unimplemented(PinionError, NotImplementedError):
    """Not in this release."""

    code = "UNIMPLEMENTED"


class Internal(PinionError):
    """A bug in the server: report it."""

    code = "INTERNAL"


class Unavailable(PinionError):
    """Not now: try again."""

    code = "UNAVAILABLE"


class ConnectionLost(Unavailable, ConnectionError):
    """No server answers, or it went away."""


class DataLoss(PinionError):
    """Stored data is damaged: run `pinion check`."""

    code = "DATA_LOSS"


class ProtocolError(PinionError):
    """The other side does not speak this protocol."""


_BY_CODE: dict[int, type[PinionError]] = {
    1: Cancelled,
    3: InvalidArgument,
    4: DeadlineExceeded,
    5: NotFound,
    7: PermissionDenied,
    8: ResourceExhausted,
    9: FailedPrecondition,
    10: Aborted,
    12: Unimplemented,
    13: Internal,
    14: Unavailable,
    15: DataLoss,
}

_BY_NAME: dict[str, type[PinionError]] = {
    "UNKNOWN_TABLE": UnknownTable,
    "UNKNOWN_FEATURE": UnknownFeature,
    "SNAPSHOT_EXPIRED": SnapshotExpired,
    "SNAPSHOT_LOST": SnapshotLost,
    "DEFINITION_CHANGED": DefinitionChanged,
    "LEASED_MAX_BYTES": LeasedMaxBytes,
    "LEASE_OVERDUE": LeaseOverdue,
    "LAYOUT_CHANGED": LayoutChanged,
    "UNKNOWN_PIN": UnknownPin,
    "PEER_REFUSED": PeerRefused,
}


def of_code(code: int, message: str, details: dict[str, Any]) -> PinionError:
    """The exception for a gRPC code and the server's details (which may hold `error`)."""
    details = {name: value for name, value in details.items() if name != "message"}
    error = details.pop("error", None)
    kind = _BY_NAME.get(error) or _BY_CODE.get(code, PinionError)
    return kind(message, error, details)


def of_lane(code: int, payload: bytes) -> PinionError:
    """The exception that an ERROR frame stands for."""
    try:
        details = json.loads(payload)
        message = details["message"]
    except (ValueError, TypeError, KeyError):
        return ProtocolError(f"an ERROR frame of code {code} that is not JSON")
    return of_code(code, message, details)
