"""A schema registry for tests: what Confluent's clients and Pinion ask of one, in memory."""

import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Registry:
    """Serves on a port of its own until closed. `down` makes every answer a 503.

    Protobuf clients register compiled descriptors; a registry gives out the text of the .proto file. `proto_texts`
    maps a subject to that text.
    """

    def __init__(self):
        self.schemas = []  # id is the index plus 1
        self.subjects = {}  # subject -> ids in order of their versions
        self.proto_texts = {}
        self.down = False
        self.asked = []
        self._lock = threading.Lock()
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                registry._answer(self, None)

            def do_POST(self):
                length = int(self.headers.get("content-length", 0))
                registry._answer(self, json.loads(self.rfile.read(length)))

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def register(self, subject, schema):
        """Adds a schema ({"schema", "schemaType", "references"}) unless it is there; returns what a client is told."""
        if subject in self.proto_texts and schema.get("schemaType") == "PROTOBUF":
            schema = {**schema, "schema": self.proto_texts[subject]}
        with self._lock:
            if schema not in self.schemas:
                self.schemas.append(schema)
            number = self.schemas.index(schema) + 1
            versions = self.subjects.setdefault(subject, [])
            if number not in versions:
                versions.append(number)
            return {"id": number, "guid": str(guid(number)), "version": versions.index(number) + 1, "subject": subject}

    def _answer(self, handler, body):
        path = urlsplit(handler.path).path
        self.asked.append(path)
        status, answer = (503, {"message": "down"}) if self.down else self._look_up(path, body)
        text = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def _look_up(self, path, body):
        match [unquote(part) for part in path.strip("/").split("/")]:
            case ["schemas", "ids", number] if number.isdigit() and 0 < int(number) <= len(self.schemas):
                return 200, self.schemas[int(number) - 1]
            case ["schemas", "guids", wanted]:
                for number, schema in enumerate(self.schemas, 1):
                    if str(guid(number)) == wanted:
                        return 200, schema
            case ["subjects", subject, "versions"] if body is not None:
                return 200, self.register(subject, body)
            case ["subjects", subject, "versions", version] if subject in self.subjects:
                versions = self.subjects[subject]
                if version.isdigit() and 0 < int(version) <= len(versions):
                    number = versions[int(version) - 1]
                    return 200, {**self.schemas[number - 1], "subject": subject, "version": int(version), "id": number}
        return 404, {"error_code": 40403, "message": "Schema not found"}


def guid(number):
    """The GUID of a schema id."""
    return uuid.uuid5(uuid.NAMESPACE_OID, str(number))
