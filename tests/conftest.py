"""Fixtures: the binary, a store, a server on it, the broker (one for the session), the real data."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Bodies out of gRPC lie where they lie: pyarrow's group_by copies them, and need not say so each time.
os.environ.setdefault("ACERO_ALIGNMENT_HANDLING", "reallocate")

from support import flight as calls
from support.broker import Broker
from support.process import REPOSITORY, Server, binary, pinion


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the long forms: 200 kills, 20 power cuts")


def pytest_configure(config):
    if not binary().exists():
        raise pytest.UsageError(f"{binary()} does not exist: build it with `cargo build --release`, or use tests/run")


@pytest.fixture(scope="session")
def soak(request):
    """True when the long forms were asked for."""
    return request.config.getoption("--soak")


@pytest.fixture(scope="session")
def kafka():
    """The broker. Tests that kill it start it again."""
    folder = tempfile.mkdtemp(prefix="pinion-kafka-")
    broker = Broker(folder)
    yield broker
    broker.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def real_data():
    """The folder of public data that the project does not carry: $PINION_TEST_DATA or ../shared/data."""
    named = os.environ.get("PINION_TEST_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "nyc" / "weather.csv").exists():
        pytest.skip(f"no real data in {folder} (PINION_TEST_DATA names another folder)")
    return folder


class Store:
    """A data directory and the commands that work on it directly."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.data = self.folder / "data"
        pinion("init", "--data", self.data)

    def run(self, *arguments, **options):
        command, *rest = arguments
        return pinion(command, "--data", self.data, *rest, **options)

    def apply(self, *definitions, **options):
        """Applies definitions given as TOML text or as paths."""
        files = []
        for number, definition in enumerate(definitions):
            if isinstance(definition, Path):
                files.append(definition)
            else:
                file = self.folder / f"definition-{number}.toml"
                file.write_text(definition)
                files.append(file)
        return self.run("apply", *files, **options)

    def segments(self, table=None):
        """The Arrow files of the segments (of every table: a store names its folders by id)."""
        return sorted(p for p in self.data.rglob("*.arrow") if p.is_file())


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def serve(store):
    """serve(**options) starts a server on `store`; all are stopped at the end."""
    started = []

    def start(**options):
        server = Server(store.data, **options)
        started.append(server)
        return server

    yield start
    failures = []
    for server in started:
        try:
            server.__exit__(None, None, None)
        except Exception as error:  # every server is stopped, then the first failure counts
            failures.append(error)
    if failures:
        raise failures[0]


@pytest.fixture(params=["tcp", "uds"])
def transport(request):
    """Both ways in."""
    return request.param


@pytest.fixture
def connect(transport):
    """connect(server) -> a Flight client over the transport of this run."""
    return lambda server: calls.connect(server, uds=transport == "uds")
