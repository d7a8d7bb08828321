"""The peers as processes: pyarrow's Flight server, redis-server, Feast. Loopback and Unix sockets only."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import environment

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("PINION_CACHE", Path.home() / ".cache" / "pinion"))
FEAST_PYTHON = CACHE / "feast-venv" / "bin" / "python"


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


class Peer:
    """A process that says it is ready, and is ended with the `with` block."""

    def __init__(self, name):
        self.name = name
        # A socket's path may have about 100 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="pinion-peer-"))
        self.process = None

    def launch(self, command, env=None, cwd=None):
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=env or environment(),
                cwd=cwd,
            )
        return self

    def wait_for(self, ready, seconds=60):
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not become ready\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)
        return self

    @property
    def pid(self):
        return self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def connects(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class PyarrowServer(Peer):
    """pyarrow's Flight server; `files` are name -> Arrow file."""

    def __init__(self, files, uds):
        super().__init__("pyarrow Flight server")
        ready = self.folder / "ready"
        location = f"grpc+unix://{self.folder}/flight.sock" if uds else "grpc://127.0.0.1:0"
        self.launch([sys.executable, HERE / "flight_peer.py", location, ready, *(f"{n}={f}" for n, f in files.items())])
        self.wait_for(lambda: ready.exists() and ready.read_text())
        self.url = location if uds else f"grpc://127.0.0.1:{ready.read_text()}"


class TonicServer(Peer):
    """tonic with arrow-flight's default encoder; it reads one file into its own memory and serves one way."""

    def __init__(self, program, file, uds):
        super().__init__("tonic Flight server")
        socket_path = self.folder / "flight.sock"
        where = ["--uds", socket_path] if uds else ["--listen", "127.0.0.1:0"]
        self.launch([program, "--file", file, *where])
        self.wait_for(lambda: "ready" in (self.folder / "log").read_text())
        address = (self.folder / "log").read_text().split()[-1]
        self.url = f"grpc+unix://{socket_path}" if uds else f"grpc://{address}"


class Redis(Peer):
    """redis-server without persistence, on a Unix socket and a loopback port; what `dump` holds is loaded first."""

    def __init__(self, dump):
        super().__init__("redis-server")
        dump.parent.mkdir(parents=True, exist_ok=True)
        self.uds, self.port = self.folder / "redis.sock", free_port()
        self.launch(
            ["redis-server", "--port", self.port, "--bind", "127.0.0.1", "--unixsocket", self.uds, "--save", ""]
            + ["--appendonly", "no", "--dir", dump.parent, "--dbfilename", dump.name]
        )
        self.wait_for(self.answers, 120)

    def answers(self):
        return self.uds.exists() and self.cli("ping") == "PONG"

    def cli(self, *arguments, **options):
        done = subprocess.run(["redis-cli", "-s", str(self.uds), *arguments], capture_output=True, text=True, **options)
        return done.stdout.strip()


class Feast:
    """A Feast repository on a redis-server of its own, filled once; `serve` starts its HTTP server."""

    def __init__(self, folder, source, step):
        self.folder = folder
        self.redis = Redis(folder / "feast.rdb")
        try:
            self.prepare(source, step)
        except BaseException:
            self.redis.__exit__()
            raise

    def prepare(self, source, step):
        repository = self.folder / "feast"
        repository.mkdir(exist_ok=True)
        (repository / "feature_store.yaml").write_text(
            "project: bench\nprovider: local\nregistry: registry.db\nentity_key_serialization_version: 3\n"
            f"online_store:\n  type: redis\n  connection_string: 127.0.0.1:{self.redis.port}\n"
            "offline_store:\n  type: file\nauth:\n  type: no_auth\n"
        )
        self.repository = repository
        if not (self.folder / "feast-complete").exists():
            command = [str(FEAST_PYTHON), str(HERE / "feast_fill.py"), str(repository), str(source), str(step)]
            subprocess.run(command, check=True, env=self.environment(), cwd=repository, timeout=900)
            assert self.redis.cli("save") == "OK"
            (self.folder / "feast-complete").touch()

    @staticmethod
    def environment():
        return environment({"FEAST_USAGE": "False", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"})

    def serve(self, workers=1):
        peer, port = Peer("feast serve"), free_port()
        peer.launch(
            # By default a worker ends after 1,000 requests, and a connection after 30 s without one.
            [FEAST_PYTHON.with_name("feast"), "serve", "--host", "127.0.0.1", "--port", port, "--no-access-log"]
            + ["--workers", workers, "--max-requests", 10**9, "--keep-alive-timeout", 86_400],
            env=self.environment(),
            cwd=self.repository,
        )
        peer.wait_for(lambda: connects(port), 120)
        peer.port = port
        return peer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.redis.__exit__()
