"""The peer of the scans: a Flight server of pyarrow, as its documentation writes one, over memory-mapped Arrow files.

    flight_peer.py LOCATION READY NAME=FILE...

Serves on LOCATION and creates READY. A ticket is JSON: {"file": NAME, "columns"?: [...], "rows"?: [first, end]}.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
from pyarrow import flight


class Peer(flight.FlightServerBase):
    def __init__(self, location, files):
        super().__init__(location)
        self.tables = {name: pa.ipc.open_file(pa.memory_map(file)).read_all() for name, file in files.items()}

    def do_get(self, context, ticket):
        asked = json.loads(ticket.ticket)
        table = self.tables[asked["file"]]
        if columns := asked.get("columns"):
            table = table.select(columns)
        if rows := asked.get("rows"):
            table = table.slice(rows[0], rows[1] - rows[0])
        return flight.RecordBatchStream(table)


if __name__ == "__main__":
    location, ready, *files = sys.argv[1:]
    server = Peer(location, dict(file.split("=", 1) for file in files))
    Path(ready).write_text(str(server.port))
    server.serve()
