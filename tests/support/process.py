"""The `pinion` binary as a user runs it: one-off commands, and a server that may be killed."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "schemas" / "examples"


def binary() -> Path:
    """$PINION_TEST_BINARY, or the release build in the target directory that `tests/run` uses."""
    chosen = os.environ.get("PINION_TEST_BINARY")
    if chosen:
        return Path(chosen)
    cache = Path(os.environ.get("PINION_CACHE", Path.home() / ".cache" / "pinion"))
    target = Path(os.environ.get("CARGO_TARGET_DIR", cache / "target"))
    return target / "release" / "pinion"


def environment(extra=None):
    """The caller's environment without settings that would reach Pinion, plus `extra`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PINION_")}
    clean.update({name: str(value) for name, value in (extra or {}).items()})
    return clean


class CommandFailed(AssertionError):
    """A command that should have succeeded; the message holds all it said."""


def pinion(*arguments, env=None, stdin=None, check=True, timeout=120, cwd=None):
    """Runs one command to its end. stdout and stderr are text."""
    done = subprocess.run(
        [str(binary()), *map(str, arguments)],
        env=environment(env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
    )
    if check and done.returncode != 0:
        raise CommandFailed(
            f"pinion {' '.join(map(str, arguments))} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


def pinion_json(*arguments, **options):
    """Runs one command with `--output json` and returns what it printed, parsed."""
    return json.loads(pinion(*arguments, "--output", "json", **options).stdout)


class Server:
    """`pinion serve` on a data directory, on free ports and a Unix socket.

    Leaving the `with` block stops it in an orderly way, unless it is already dead. The log of every
    start is appended to one file, shown when a start fails.
    """

    def __init__(self, data, brokers=None, env=None, arguments=(), start=True):
        self.data = Path(data)
        self.brokers = brokers
        self.env = dict(env or {})
        self.arguments = list(arguments)
        # A socket path may have about 100 bytes: pytest's own folders are longer.
        self.folder = Path(tempfile.mkdtemp(prefix="pinion-"))
        self.log = self.folder / "log"
        self.uds = self.folder / "flight.sock"
        self.lane = self.folder / "lane.sock"
        self.process = None
        self.addresses = {}
        self.start_seconds = None
        if start:
            self.start()

    def start(self, env=None, wait=True):
        """Starts it; `env` counts for this start only. Returns once the ready file is there."""
        assert self.process is None or self.process.poll() is not None, "already running"
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        command = [str(binary()), "serve", "--data", str(self.data), "--flight", "127.0.0.1:0"]
        command += ["--uds", str(self.uds), "--lane", str(self.lane), "--admin", "127.0.0.1:0", "--ready-file", str(ready)]
        if self.brokers:
            command += ["--brokers", self.brokers]
        began = time.monotonic()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command + self.arguments,
                env=environment({**self.env, **(env or {})}),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        if not wait:
            return self
        while not ready.exists():
            if self.process.poll() is not None:
                raise CommandFailed(f"serve exited {self.process.returncode}\n{self.log_text()}")
            if time.monotonic() - began > 60:
                raise CommandFailed(f"serve not ready after 60 s\n{self.log_text()}")
            time.sleep(0.002)
        self.start_seconds = time.monotonic() - began
        self.addresses = json.loads(ready.read_text())
        return self

    @property
    def flight(self) -> str:
        """`grpc://127.0.0.1:PORT`."""
        first = self.addresses["flight"]
        first = first[0] if isinstance(first, list) else first
        return first if "://" in first else f"grpc://{first}"

    @property
    def admin(self) -> str:
        address = self.addresses["admin"]
        return address if "://" in address else f"http://{address}"

    def log_text(self, last=4000):
        return self.log.read_text(errors="replace")[-last:]

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """SIGKILL, as a crash would."""
        if self.alive():
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def wait_dead(self, timeout):
        """Waits for it to die by itself (a fail point). True when it did."""
        try:
            self.process.wait(timeout)
            return True
        except subprocess.TimeoutExpired:
            return False

    def stop(self):
        """SIGTERM; fails the test unless it exits 0 in time."""
        if not self.alive():
            return
        self.process.terminate()
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise CommandFailed(f"serve did not stop within 30 s\n{self.log_text()}")
        if code != 0:
            raise CommandFailed(f"serve exited {code} on SIGTERM\n{self.log_text()}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is not None:
                self.kill()
                print(self.log_text())
            else:
                self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
