"""Pins on a GPU over a real server, which the fake driver plays (gds/fake-driver): one driver in each process.

The fears: a load path that the probe saw working and the server cannot take; bytes that reach the device otherwise
than they reach the host; a consumer that imports and reads something else than the server wrote.
"""

import json
import os
import subprocess
import sys

import pinion
import pytest
from support import gpu as fake
from support.process import Server
from support.wait import until
from test_lane import LATEST, calls_metrics, connect, items, python_environment
from test_pins_server import devices, held, pins

READ = """
import json, sys, pinion
c = pinion.connect(sys.argv[1], lane='lane://' + sys.argv[2])
pin = c.pin('items', ['item', 'price', 'name', 'code'], device=0, mode=sys.argv[3], name=sys.argv[3])
with pin.latest() as view:
    rows = view.to_arrow(declared=True).to_pylist()
    checked = view.verify()
    ids = [int(i) for i in view.row_ids({'item': [7, 10**9]})]
print(json.dumps([pin.device, view.snapshot, sorted(rows, key=lambda r: r['item']), checked, [rows[ids[0]]['item'], ids[1]]]))
"""


@pytest.fixture
def gpu(tmp_path_factory):
    """gpu(names) -> the environment of a machine whose libraries of these names are the fake's."""
    if not fake.library().exists():
        pytest.skip(f"{fake.library()} is not built (cargo build --release -p pinion-gds-fake-driver)")

    def environment(*names):
        folder = tmp_path_factory.mktemp("fake")
        for name in names:
            (folder / name).symlink_to(fake.library())
        return {"LD_LIBRARY_PATH": str(folder), "VIRTUAL_ENV": "", "HOME": "/nonexistent"}

    return environment


@pytest.mark.parametrize("path", ["bounce", "direct"])
def test_a_table_on_a_gpu_is_read_equal_by_another_process_and_follows(store, gpu, path):
    store.apply(LATEST)
    driver = gpu("libcuda.so.1", *(["libcufile.so.0"] if path == "direct" else []))
    settings = {"PINION__GDS__LOAD_PATH": path, "PINION__GDS__BUDGET_BYTES": "256 MiB"}
    with Server(store.data, env={**driver, **settings}) as server, connect(server) as client:
        kinds = [(device["device"]["kind"], device["path"]) for device in devices(server)]
        if kinds[0][1] != path:
            pytest.skip(f"{path} does not work on this disk, even over the fake driver: {kinds}")
        assert kinds == [("cuda", path), ("host", "host")]
        client.put("items", items(range(5000)))
        client.action("merge", {"table": "items"})
        # A clean table: on the host it would be lent.
        with pytest.raises(pinion.InvalidArgument) as refused:
            client.action("pin", {"table": "items", "mode": "frozen", "device": 0, "layout": "segments"})
        assert refused.value.error == "PIN_REQUEST" and "files cannot be mapped on" in refused.value.message
        client.put("items", items(range(100, 200), 1))
        for mode in ("frozen", "fresh"):
            for version in (2, 3):
                if mode == "fresh":
                    client.put("items", items(range(50, 250), version))
                    snapshot = client.map("items").snapshot
                    if version == 3:
                        until(lambda: newest(server, "fresh")["snapshot"] == snapshot)
                device, read_of, rows, checked, found = read(server, driver, mode)
                assert device["kind"] == "cuda" and device["uuid"].startswith("GPU-")
                assert found == [7, -1] and checked["bytes"] > 0
                scanned = client.scan("items", ["item", "price", "name", "code"], snapshot=read_of, local=False)
                assert rows == sorted(scanned.to_pylist(), key=lambda row: row["item"])
        until(lambda: held(server) == [[], []], seconds=1)
        assert {pin["device"]["kind"] for pin in pins(server)} == {"cuda"}
        [device] = [d for d in devices(server) if d["device"]["kind"] == "cuda"]
        assert f'pinion_device_used_bytes{{device="{device["device"]["uuid"]}"}}' in calls_metrics(server)
        told = metric_values(server)
        pinned = device["pinned"]
        assert told[f'pinion_device_pinned_cap_bytes{{device="{device["device"]["uuid"]}"}}'] == pinned["cap_bytes"] > 0
        assert told[f'pinion_device_pinned_waiting{{device="{device["device"]["uuid"]}"}}'] == 0
        idle = told[f'pinion_device_pinned_bytes{{device="{device["device"]["uuid"]}",state="idle"}}']
        assert 0 < idle == pinned["idle_bytes"] == pinned["pinned_bytes"]
        assert [d["pinned"] for d in devices(server) if d["device"]["kind"] == "host"] == [None]
        for name in ("frozen", "fresh"):
            client.unpin(name)
        until(lambda: devices(server)[0]["used_bytes"] == 0)


def metric_values(server):
    lines = [line for line in calls_metrics(server).splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def newest(server, name):
    [pin] = [pin for pin in pins(server) if pin["name"] == name]
    return pin["generation"]


def read(server, driver, mode):
    command = [sys.executable, "-c", READ, server.flight, str(server.lane), mode]
    env = {**python_environment(), **driver, "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_required_path_that_is_not_there_keeps_the_server_from_starting(store, gpu):
    env = {**gpu(), "PINION__GDS__REQUIRE": "bounce"}
    server = Server(store.data, env=env, start=False)
    with pytest.raises(AssertionError, match="bounce") as refused:
        server.start()
    assert "pinion doctor" in str(refused.value)
