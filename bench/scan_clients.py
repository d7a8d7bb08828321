"""The Python clients of the scan benchmarks."""

import json
import os
import socket
import struct
import threading
import time
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc


def connect(url):
    from pyarrow import flight

    return flight.connect(url)


def ticket(asked):
    from pyarrow import flight

    return flight.Ticket(json.dumps(asked).encode())


def received_bytes():
    """Bytes that this process's TCP sockets have received so far, HTTP/2 and gRPC framing included."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                        # tcpi_bytes_received of struct tcp_info
                        total += struct.unpack_from(
                            "Q", found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 128
                        )[0]
    return total


class Scan:
    """pyarrow's Flight client, reading batch by batch and keeping none."""

    def __init__(self, url):
        self.url = url
        self.client = connect(url)

    def scan(self, asked, repeat=1):
        """Reads a ticket's stream to its end, `repeat` times."""
        wire, cpu, began = received_bytes(), time.process_time(), time.perf_counter()
        for _ in range(repeat):
            rows, messages, metadata = self.read(asked)
        return {
            "seconds": time.perf_counter() - began,
            "client_cpu_seconds": time.process_time() - cpu,
            "rows": rows * repeat,
            "messages": messages * repeat,
            "wire_bytes": received_bytes() - wire,
            "metadata": metadata,
        }

    def read(self, asked):
        reader = self.client.do_get(ticket(asked))
        rows, messages, metadata = 0, 0, None
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                break
            if chunk.data is not None:
                rows += chunk.data.num_rows
                messages += 1
            if chunk.app_metadata is not None:
                metadata = chunk.app_metadata
        return rows, messages, json.loads(metadata.to_pybytes()) if metadata and metadata.size else None

    def many(self, asked, streams, seconds):
        """So many streams at once, each scanning again and again for so long; rows and whole scans in all."""
        end, counts, errors = time.monotonic() + seconds, [], []

        def one():
            client = connect(self.url)
            rows = scans = 0
            try:
                while time.monotonic() < end:
                    reader = client.do_get(ticket(asked))
                    while time.monotonic() < end:
                        try:
                            rows += reader.read_chunk().data.num_rows
                        except StopIteration:
                            scans += 1
                            break
                    else:
                        reader.cancel()
            except Exception as error:  # shown by the benchmark
                errors.append(str(error)[:500])
            finally:
                client.close()
            counts.append((rows, scans))

        threads = [threading.Thread(target=one) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"rows": sum(r for r, _ in counts), "scans": sum(s for _, s in counts), "errors": errors}

    def cancelled(self, asked, streams):
        """Opens streams one after the other and cancels each: unread, after the schema, or after a batch."""
        for number in range(streams):
            reader = self.client.do_get(ticket(asked))
            if number % 3 == 1:
                _ = reader.schema
            elif number % 3 == 2:
                reader.read_chunk()
            reader.cancel()
        return streams


class FlightTable:
    """From connect to a checked table in this process, over Flight."""

    def __init__(self, url, asked):
        self.url, self.asked = url, asked

    def deliver(self, rows, row, value):
        began = time.perf_counter()
        table = connect(self.url).do_get(ticket(self.asked)).read_all()
        return check_and_sum(table, began, rows, row, value)


class MappedTable:
    """From connect to a checked table in this process, mapped over the local lane by Pinion's Python client."""

    def __init__(self, socket):
        import pinion

        self.pinion, self.socket = pinion, socket

    def deliver(self, rows, row, value):
        began = time.perf_counter()
        table = self.pinion.connect(lane=f"lane://{self.socket}").scan("scan", local=True)
        return check_and_sum(table, began, rows, row, value)


def check_and_sum(table, began, rows, row, value):
    assert table.num_rows == rows, f"{table.num_rows} rows instead of {rows}"
    found = [table["id"][row].as_py(), table["f3"][row].as_py()]
    assert found == [row, value], f"row {row} is {found}"
    delivered = time.perf_counter() - began
    total = sums(table)
    return {"table_seconds": delivered, "sum_seconds": time.perf_counter() - began, "sums": total}


def sums(table):
    """A number per column: sums, and the bytes of texts."""
    return [
        float(pc.sum(pc.binary_length(column) if pa.types.is_string(column.type) else column).as_py())
        for column in table.columns
    ]
