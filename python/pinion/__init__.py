"""Client of Pinion, an Arrow-native feature store server.

    import pinion

    client = pinion.connect("grpc://127.0.0.1:8815", lane="lane:///run/pinion/lane.sock")
    client.lookup(["weather:temp"], {"origin": ["EWR", "JFK"]}, status=True)   # a RecordBatch
    client.scan("weather")                                                    # a Table
    client.scan("weather", wait=client.put("weather", rows))                  # that holds what was put

Two ways lead to one server: Arrow Flight, from anywhere, and the local lane, a Unix socket for
programs on the same machine: lookups in tens of microseconds, whole tables mapped instead of sent.
A `Client` has either or both, and takes the faster for each call. Values, types, statuses and errors
are the same on both.
"""

from pinion.barrier import Offsets
from pinion.client import Client, Lookup, connect, is_partial
from pinion.errors import (
    Aborted,
    Cancelled,
    ConnectionLost,
    DataLoss,
    DeadlineExceeded,
    DefinitionChanged,
    DeviceError,
    DeviceUnavailable,
    FailedPrecondition,
    Forked,
    HasNulls,
    Internal,
    InvalidArgument,
    LayoutChanged,
    LeasedMaxBytes,
    LeaseGone,
    LeaseOverdue,
    NotFound,
    NoTensor,
    PeerRefused,
    PermissionDenied,
    PinionError,
    ProtocolError,
    ResourceExhausted,
    SnapshotExpired,
    SnapshotLost,
    Unavailable,
    Unimplemented,
    UnknownFeature,
    UnknownPin,
    UnknownTable,
)
from pinion.mapped import MappedTable
from pinion.pin import Pin
from pinion.view import View

__version__ = "0.1.0"

PRESENT, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE, NOT_READ = 1, 2, 3, 4, 5
"""What became of a value: the numbers in `<feature>__status`."""

__all__ = [
    "Aborted",
    "Cancelled",
    "Client",
    "ConnectionLost",
    "DataLoss",
    "DeadlineExceeded",
    "DefinitionChanged",
    "DeviceError",
    "DeviceUnavailable",
    "FailedPrecondition",
    "Forked",
    "HasNulls",
    "Internal",
    "InvalidArgument",
    "LayoutChanged",
    "LeaseGone",
    "LeaseOverdue",
    "LeasedMaxBytes",
    "Lookup",
    "MappedTable",
    "NOT_FOUND",
    "NOT_READ",
    "NULL_VALUE",
    "NoTensor",
    "NotFound",
    "OUTSIDE_MAX_AGE",
    "Offsets",
    "PRESENT",
    "PeerRefused",
    "PermissionDenied",
    "Pin",
    "PinionError",
    "ProtocolError",
    "ResourceExhausted",
    "SnapshotExpired",
    "SnapshotLost",
    "Unavailable",
    "Unimplemented",
    "UnknownFeature",
    "UnknownPin",
    "UnknownTable",
    "View",
    "connect",
    "is_partial",
]
