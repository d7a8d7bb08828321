"""`pinion doctor`: it looks at everything, says why, and ends, whatever a driver does.

The fears: NVIDIA's library loops for ever where /proc/modules does not exist (1.16 and later); a child that hangs or
crashes takes the command with it; a machine without a GPU is an error; files are left behind.

libcufile is the one of the wheel `nvidia-cufile`, which pip fetches into the venv of these tests.
"""

import json
import os
import stat
import sysconfig
import time
from pathlib import Path

import pytest

from support.process import binary, pinion

PATHS = ["direct", "bounce", "host"]
LIMIT_SECONDS = 12


def doctor(*arguments, env=None, check=True, cwd=None):
    """Runs it; it ends in time. No libraries are found but those that `env` leads to."""
    clean = {"VIRTUAL_ENV": "", "HOME": "/nonexistent", "LD_LIBRARY_PATH": "", **(env or {})}
    began = time.monotonic()
    done = pinion("doctor", *arguments, env=clean, check=check, timeout=60, cwd=cwd)
    assert time.monotonic() - began < LIMIT_SECONDS
    return done


def examined(*arguments, **options):
    return json.loads(doctor(*arguments, "--output", "json", **options).stdout)


def paths(told):
    return {verdict["path"]: verdict for verdict in told["load_paths"]}


def fact(told, area, name):
    [line] = [f for f in told["facts"] if (f["area"], f["name"]) == (area, name)]
    return line


@pytest.fixture(scope="session")
def cufile():
    """The wheel's libcufile."""
    found = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/lib/libcufile.so.0"))
    assert found, "nvidia-cufile of requirements.txt is not installed"
    return found[0]


@pytest.fixture
def gpu(tmp_path_factory):
    """gpu(fail=RULES, …) -> the environment of a machine that the fake driver plays (gds/fake-driver)."""
    chosen = os.environ.get("PINION_TEST_FAKE_DRIVER")
    library = Path(chosen) if chosen else binary().parent / "libpinion_gds_fake_driver.so"
    assert library.exists(), f"{library} does not exist: cargo build --release -p pinion-gds-fake-driver"
    folder = tmp_path_factory.mktemp("fake")
    for name in ("libcuda.so.1", "libcufile.so.0"):
        (folder / name).symlink_to(library)

    def environment(**settings):
        named = {f"PINION_FAKE_GPU_{name.upper()}": text for name, text in settings.items()}
        return {"LD_LIBRARY_PATH": folder, **named}

    return environment


def program(folder, script):
    """An executable that does what `script` says, for gds.probe_binary."""
    path = folder / "probe"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def assert_every_path_works_or_says_why(told):
    assert [verdict["path"] for verdict in told["load_paths"]] == PATHS
    for verdict in told["load_paths"]:
        assert verdict["usable"] == (verdict["reasons"] == [])
        assert all(reason["why"] and "\n" not in reason["why"] for reason in verdict["reasons"])
    assert paths(told)["host"]["usable"]
    assert all(line["says"] and "\n" not in line["says"] for line in told["facts"])


# -- what it tells


def test_every_load_path_works_or_says_why_without_any_library(store):
    told = examined("--data", store.data)
    assert_every_path_works_or_says_why(told)
    assert told["chosen"]["path"] in PATHS and told["chosen"]["refused"] is None
    assert told["report"]["found"]["fate"] == "finished"
    for name in ("kernel", "memory", "/proc/modules"):
        assert fact(told, "machine", name)
    assert fact(told, "data directory", "file system")["says"] != "unknown"
    assert fact(told, "server", "store")["state"] == "ok"


def test_every_load_path_works_or_says_why_with_the_library_of_a_wheel(store, cufile):
    told = examined("--data", store.data, env={"PINION__GDS__CUFILE": cufile})
    assert_every_path_works_or_says_why(told)
    found = told["report"]["found"]
    assert found["fate"] == "finished"
    assert found["cufile_version"] >= 1160, "an older one has no endless loop to survive"
    assert found["open"] is not None, "the strict open returned"
    line = fact(told, "cuFile", "libcufile")
    assert str(cufile) in line["says"] and "gds.cufile" in line["says"]
    if not os.path.exists("/proc/modules") and not told["report"]["machine"]["device_nodes"]:
        assert "does not return" in fact(told, "cuFile", "default open")["says"]


def test_the_library_of_a_venv_is_found(tmp_path, cufile):
    """`cufile` lies in VENV/lib/python3.X/site-packages/nvidia/PART/lib."""
    venv = cufile.parents[6]
    told = examined("--data", tmp_path, env={"VIRTUAL_ENV": venv})
    first = told["report"]["libraries"]["libcufile"][0]
    if first["found_by"] != "loader":  # a machine with GPUDirect has one for everybody
        assert first == first | {"path": str(cufile), "found_by": "venv"}


def test_people_read_it_in_lines_without_colours(store, cufile):
    text = doctor("--data", store.data, "--verbose", env={"PINION__GDS__CUFILE": cufile}).stdout
    assert "\x1b" not in text
    headings = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert headings[:5] == ["load paths", "machine", "data directory", "driver", "cuFile"]
    assert "  host    works\n" in text
    told = examined("--data", store.data, env={"PINION__GDS__CUFILE": cufile})
    for verdict in told["load_paths"]:
        for reason in verdict["reasons"]:
            assert reason["why"] in text
            assert f"-> {reason['change']}" in text


def test_it_needs_no_store_and_no_directory_and_leaves_nothing(tmp_path, cufile):
    working = tmp_path / "working"
    working.mkdir()
    told = examined(cwd=working, env={"PINION__GDS__CUFILE": cufile})
    assert_every_path_works_or_says_why(told)
    assert fact(told, "server", "store")["state"] == "note"
    told = examined("--data", tmp_path / "not" / "yet", cwd=working)
    assert told["report"]["folder"]["path"] == str(tmp_path)
    assert list(working.iterdir()) == [], "neither a log of cuFile nor a trial file"
    assert list(tmp_path.iterdir()) == [working]


def test_a_store_keeps_at_most_what_the_drivers_said(store, cufile):
    before = {path.name for path in store.data.iterdir()}
    examined("--data", store.data, env={"PINION__GDS__CUFILE": cufile})
    assert {path.name for path in store.data.iterdir()} - before <= {"gds-probe.json"}
    store.run("check")


# -- a machine with GPUs


def test_with_gpudirect_every_path_works_and_each_gpu_has_a_line(tmp_path, gpu):
    told = examined("--data", tmp_path, env=gpu(devices=2))
    assert_every_path_works_or_says_why(told)
    assert [verdict["usable"] for verdict in told["load_paths"]] == [True, True, True]
    assert told["chosen"] == {"path": "direct", "reason": None, "refused": None}
    for number in (0, 1):
        line = fact(told, "driver", f"GPU {number}")
        assert line["state"] == "ok" and "GPU-" in line["says"]


@pytest.mark.parametrize(
    "settings, path, words",
    [
        ({"devices": 0}, "host", ["CUDA_ERROR_NO_DEVICE"]),
        ({"fail": "cuInit@1+=100"}, "host", ["cuInit failed with 100"]),
        ({"fail": "cuInit@1+=654321"}, "host", ["654321", "unknown"]),
        ({"gds": 0}, "bounce", ["5001"]),
        ({"fail": "cuFileDriverOpen@1+=5099"}, "bounce", ["5099", "unknown"]),
        ({"fail": "cuFileHandleRegister@1+=5027"}, "bounce", ["5027", "/run/udev"]),
    ],
)
def test_what_a_driver_lacks_is_said_with_its_code(tmp_path, gpu, settings, path, words):
    told = examined("--data", tmp_path, env=gpu(**settings))
    assert_every_path_works_or_says_why(told)
    assert told["chosen"]["path"] == path
    assert all(word in told["chosen"]["reason"] for word in words), told["chosen"]["reason"]


def test_a_store_remembers_a_gpu_for_the_next_start(store, gpu):
    told = examined("--data", store.data, env=gpu())
    kept = json.loads((store.data / "gds-probe.json").read_text())
    assert kept["findings"] == told["report"]["found"]
    assert not examined("--data", store.data, env=gpu())["report"]["from_cache"], "a doctor always asks"


# -- what it survives


def test_an_open_that_hangs_leaves_what_was_found_before_it(tmp_path, gpu):
    told = examined("--data", tmp_path, env=gpu(fail="cuFileDriverOpen@1+=hang"))
    assert told["report"]["found"]["fate"] == {"timed_out": {"during": "open", "killed": True}}
    assert told["chosen"]["path"] == "bounce"
    assert "cuFileDriverOpen did not return within 10 s" in told["chosen"]["reason"]


def test_a_child_that_never_returns_is_given_up_and_named(tmp_path):
    hangs = program(tmp_path, """echo '{"begin":"init"}'; exec sleep 600""")
    told = examined("--data", tmp_path, env={"PINION__GDS__PROBE_BINARY": hangs})
    assert told["report"]["found"]["fate"] == {"timed_out": {"during": "init", "killed": True}}
    assert "did not return within 10 s" in paths(told)["bounce"]["reasons"][0]["why"]
    assert told["chosen"]["path"] == "host"


def test_a_child_that_crashes_is_told_with_its_signal(tmp_path):
    crashes = program(tmp_path, """echo '{"begin":"init"}'; kill -SEGV $$""")
    told = examined("--data", tmp_path, env={"PINION__GDS__PROBE_BINARY": crashes})
    assert "SIGSEGV" in paths(told)["bounce"]["reasons"][0]["why"]
    assert paths(told)["host"]["usable"]


def test_a_probe_that_cannot_be_started_is_a_failure_that_says_what_to_change(tmp_path):
    env = {"PINION__GDS__PROBE_BINARY": tmp_path / "nothing"}
    done = doctor("--data", tmp_path, env=env, check=False)
    assert done.returncode == 1
    assert "gds.probe_binary" in done.stderr
    assert "  host    works\n" in done.stdout, "the rest is told all the same"


def test_a_library_that_is_no_library_is_a_reason(tmp_path):
    wrong = tmp_path / "libcufile.so.0"
    wrong.write_text("no library")
    told = examined("--data", tmp_path, env={"PINION__GDS__CUFILE": wrong})
    assert any("libcufile" in reason["why"] for reason in paths(told)["direct"]["reasons"])
    told = examined("--data", tmp_path, env={"PINION__GDS__CUFILE": tmp_path / "nothing"})
    assert any("which is no file" in reason["why"] for reason in paths(told)["direct"]["reasons"])


# -- settings


def test_a_required_path_that_is_not_there_is_refused_with_its_reasons(tmp_path):
    settings = tmp_path / "pinion.toml"
    settings.write_text('[gds]\nrequire = "direct"\n')
    told = examined("--data", tmp_path, "--config", settings)
    direct = paths(told)["direct"]
    if direct["usable"]:
        assert told["chosen"]["path"] == "direct"
    else:
        assert told["chosen"]["path"] is None
        assert all(reason["why"] in told["chosen"]["refused"] for reason in direct["reasons"])
    settings.write_text('[gds]\nload_path = "host"\n')
    chosen = examined("--data", tmp_path, "--config", settings)["chosen"]
    assert chosen == {"path": "host", "reason": None, "refused": None}
    settings.write_text('[gds]\nload_path = "gds"\n')
    done = doctor("--data", tmp_path, "--config", settings, check=False)
    assert done.returncode == 2
    assert "auto, direct, bounce, host" in done.stderr


def test_the_lane_of_a_running_server_answers(store, serve):
    server = serve()
    told = examined("--data", store.data, env={"PINION__LANE__PATH": server.lane})
    assert "a server answers" in fact(told, "server", "local lane")["says"]
    server.stop()
    told = examined("--data", store.data, env={"PINION__LANE__PATH": server.lane})
    assert "a server answers" not in fact(told, "server", "local lane")["says"]


def test_the_child_is_no_command_for_people():
    text = pinion("--help").stdout
    assert "doctor" in text and "gds-probe" not in text
    assert "EXAMPLES" in pinion("doctor", "--help").stdout
    done = pinion("gds-probe", "nonsense", check=False)
    assert done.returncode != 0 and "panicked" not in done.stderr
