"""How the Python client's leases on pins live and end, against a test double of the server: shared host memory, no GPU.

The fears: a lease that ends while something still reads, or never; a fork, a restart or a new layout after which
old numbers are believed; a deleter that runs when the interpreter has gone.
"""

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pinion
import pyarrow as pa
import pytest
from pinion.leases import Releaser, Work
from support.pinned import ALL_FLOATS, client, in_child, leased, pin, released, stub, users  # noqa: F401  (fixtures)
from support.pins import TestPin
from support.process import REPOSITORY
from support.wait import until


def test_a_view_is_leased_until_its_block_is_left(pin, stub):
    with pin.latest() as view:
        assert leased(stub) == 1
        view.to_arrow(["count"])
    assert released(stub)
    with pytest.raises(pinion.FailedPrecondition, match="left"):
        view.to_numpy()
    with pytest.raises(pinion.FailedPrecondition, match="left"):
        view.row_ids([1])


def test_a_view_that_is_dropped_lets_its_lease_go(pin, stub):
    view = pin.latest()
    assert leased(stub) == 1
    del view
    assert released(stub)


@pytest.mark.parametrize(
    "export",
    [
        lambda view: view.to_numpy(["count"])["count"],
        lambda view: view.to_numpy(["count"])["count"][3:5],
        lambda view: np.from_dlpack(view["count"]),
        lambda view: view["count"].__dlpack__(),
        lambda view: view["count"].__dlpack__(max_version=(1, 0)),
        lambda view: view.to_arrow(["name"]).column("name"),
        lambda view: np.from_dlpack(view.matrix(ALL_FLOATS)),
    ],
)
def test_what_was_given_out_keeps_the_lease_to_its_end(pin, stub, export):
    with pin.latest() as view:
        kept = export(view)
    del view
    assert pin.close() is None
    assert not stub.wait(lambda: not stub.leases, 0.1)
    before = bytes(repr(kept), "utf-8") if isinstance(kept, np.ndarray) else None
    # Three more generations: the leased slot is left alone.
    for version in (1, 2, 3):
        assert stub.publish("users", users(version))
    assert before is None or before == bytes(repr(kept), "utf-8")
    del kept
    assert released(stub)
    assert stub.wait(lambda: not stub.mappings)


def test_each_latest_is_the_newest_generation_and_costs_one_message(pin, stub):
    for version in range(1, 6):
        stub.publish("users", users(version))
        stub.wait(lambda: not stub.leases)
        stub.requests.clear()
        with pin.latest() as view:
            assert view.generation == version + 1
            assert view.positions == {"events": {"0": version + 1}}
            assert view.to_numpy(["count"])["count"].tolist() == users(version).column("count").to_pylist()
            assert view.to_arrow(declared=True).equals(users(version))
        assert stub.requests[0] == 10 and set(stub.requests) <= {10, 4}


def test_two_views_of_one_generation_are_two_leases(pin, stub):
    with pin.latest() as one, pin.latest() as two:
        assert (one.generation, leased(stub)) == (two.generation, 2)
        assert list(pin.rows([10])) == [1]
    assert released(stub)


def test_a_reader_in_a_cycle_ends_its_lease_when_it_is_collected(pin, stub):
    class Cycle:
        pass

    cycle = Cycle()
    cycle.me = cycle
    with pin.latest() as view:
        cycle.array = view["count"].to_numpy()
    del view, cycle
    gc.collect()
    assert released(stub)


def test_leases_end_from_any_thread_and_in_the_middle_of_requests(pin, stub):
    """Arrays die while other threads hold the lane's lock: nothing may deadlock."""
    failures = []

    def reader(number):
        try:
            for _ in range(60):
                with pin.latest() as view:
                    kept = [view["count"].to_numpy() for _ in range(3)]
                assert kept[0][1] == 3
                view.info["me"] = view.info  # a cycle: collected at some later time
                if number == 0:
                    gc.collect()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    gc.collect()
    assert released(stub)


def test_a_client_that_closes_lets_what_was_given_out_live(stub):
    client = pinion.connect(stub.url)
    pin = client.pin("users")
    with pin.latest() as view:
        kept = view["count"].to_numpy()
    client.close()
    with pytest.raises(pinion.FailedPrecondition, match="closed"):
        pin.latest()
    assert leased(stub) == 1
    for version in (1, 2, 3):
        stub.publish("users", users(version))
    assert kept.tolist() == users().column("count").to_pylist()
    del view, kept
    assert released(stub) and stub.wait(lambda: not stub.mappings)
    assert stub.wait(lambda: all(c.fileno() == -1 for c in stub.connections))


def test_a_client_that_is_forgotten_leaves_no_thread_and_no_connection(stub):
    before = {thread.ident for thread in threading.enumerate()}
    client = pinion.connect(stub.url)
    pin = client.pin("users")
    with pin.latest() as view:
        view.to_numpy(["count"])
    del client, pin, view
    gc.collect()
    assert stub.wait(lambda: not stub.mappings and all(c.fileno() == -1 for c in stub.connections))
    started = [thread for thread in threading.enumerate() if thread.ident not in before]
    for thread in started:
        thread.join(5)
    assert not any(thread.name == "pinion-releases" and thread.is_alive() for thread in started)


def test_an_end_that_fails_is_kept_and_those_after_it_are_not(caplog):
    ended = threading.Event()

    class Ending(Work):
        def finish(self):
            raise pinion.DeviceError("cuMemFree_v2 failed with 700", "DEVICE")

    class Good(Work):
        def finish(self):
            ended.set()

    releaser = Releaser(None)
    for work in (Ending, Good):
        releaser.took()
        releaser.put(work(releaser, None))
    assert ended.wait(5)
    assert "cuMemFree_v2 failed with 700" in caplog.text


# -- requests that fail while something is leased


KINDS = {"latest": 138, "checksum": 140, "row_ids": 139, "pin": 137, "check": 136}
# What comes of a reply at once: nothing, half of a header, a header and some of what follows it.
PARTS = [(name, at_once) for name in KINDS for at_once in (0, 9, 20) if (name, at_once) != ("check", 20)]


def ask(name, client, pin, view):
    if name == "row_ids":
        view.row_ids([10, 20])
    elif name == "pin":
        client.pin("users")
    else:
        {"latest": pin.latest, "checksum": view.verify, "check": view.check}[name]()


def not_late(request):
    with contextlib.suppress(pinion.DeadlineExceeded):
        request()
        return True


def leased_once(stub):
    return stub.wait(lambda: len(stub.leases) == 1 and len(stub.mappings) == 1)


@contextlib.contextmanager
def held_view(stub, **options):
    """A client and an array of a view of it; the server cannot have written the array's slot when the block ends."""
    descriptors = len(os.listdir("/proc/self/fd"))
    client = pinion.connect(stub.url, **options)
    pin = client.pin("users")
    view = pin.latest()
    kept = view["count"].to_numpy()
    held = types.SimpleNamespace(client=client, pin=pin, view=view)
    yield held
    held.__dict__.clear()
    for version in range(1, 5):
        stub.publish("users", users(version))
    assert kept.tolist() == users().column("count").to_pylist()
    assert not any(c.fileno() == -1 for c in stub.connections)
    del view, kept
    assert released(stub)
    assert pin.latest().to_arrow(declared=True).equals(users(4))
    pin.close()
    client.close()
    del client, pin
    # Interruptions leave cycles of frames.
    gc.collect()
    assert stub.wait(lambda: not stub.mappings)
    until(lambda: all(c.fileno() == -1 for c in stub.connections), 5)
    until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, 5)


@pytest.mark.parametrize(("name", "at_once"), PARTS)
def test_a_reply_that_comes_too_late_ends_nothing(stub, name, at_once):
    with held_view(stub, timeout=0.2) as held:
        stub.slow = {KINDS[name]: (at_once, 0.45)}
        with pytest.raises(pinion.DeadlineExceeded):
            ask(name, **vars(held))
        stub.slow = {}
        # What the late reply gives to nobody is given back, and nobody needs to ask for that.
        assert leased_once(stub)
        until(lambda: not_late(held.view.check))
        assert len(stub.connections) == 2
        ask(name, **vars(held))
        assert leased_once(stub)


@pytest.mark.parametrize(("name", "at_once"), PARTS)
@pytest.mark.parametrize("timeout", [None, 20])
def test_a_request_that_is_interrupted_ends_nothing(stub, interrupts, name, at_once, timeout):
    with held_view(stub, timeout=timeout) as held, interrupted(after=0.1):
        stub.slow = {KINDS[name]: (at_once, 0.25)}
        with pytest.raises(KeyboardInterrupt):
            ask(name, **vars(held))
        stub.slow = {}
        assert leased_once(stub)
        held.view.check()
        assert len(stub.connections) == 2


@contextlib.contextmanager
def interrupted(after):
    """As by Ctrl-C, once, or by the end of the block."""

    def interrupt():
        time.sleep(after)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.fixture
def interrupts():
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_interruptions_at_any_moment_leave_the_connection_in_step(stub, interrupts):
    generator = random.Random(5)
    count = 0
    requests = [([10, 5, 190], [1, -1, 19]), ([0] * 3000, [0] * 3000)]
    with held_view(stub) as held:
        lease = held.view.hold().lease.id
        for _ in range(400):
            try:
                with interrupted(after=generator.uniform(1e-5, 1e-3)):
                    # Python loses an interruption that meets a finalizer.
                    for _ in range(100):
                        for keys, rows in requests:
                            batch = pa.record_batch({"user": pa.array(keys, pa.int64())})
                            found = held.view.mapping.row_ids(lease, batch)
                            assert np.frombuffer(found, np.int64).tolist() == rows
            except KeyboardInterrupt:
                count += 1
        held.view.check()
        assert count > 200 and len(stub.connections) == 2


def test_a_release_whose_reply_is_late_is_not_lost(stub):
    with held_view(stub, timeout=0.2) as held:
        stub.slow = {KINDS["checksum"]: (0, 0.5)}
        with held.pin.latest() as second, pytest.raises(pinion.DeadlineExceeded):
            second.verify()
        del second
        assert leased_once(stub)


@pytest.mark.parametrize("name", KINDS)
def test_a_reply_that_is_not_understood_ends_nothing(stub, name):
    """Later requests go over another connection, and what was leased is released on the old one."""
    client = pinion.connect(stub.url)
    pin = client.pin("users")
    view = pin.latest()
    kept = view["count"].to_numpy()
    stub.strange.add(KINDS[name])
    with pytest.raises(pinion.ProtocolError):
        ask(name, client, pin, view)
    with pytest.raises(pinion.LeaseGone, match="stays"):
        view.check()
    newer = pin.latest()
    assert newer.verify()["number"] == 1
    for version in (1, 2, 3):
        stub.publish("users", users(version))
    assert kept.tolist() == users().column("count").to_pylist()
    first = next(iter(stub.mappings))[0]
    del kept, view
    gc.collect()
    # With the mapping its connection goes too, and what was given there and not understood.
    assert stub.wait(lambda: not any(key[0] is first for book in (stub.leases, stub.mappings) for key in book))
    assert stub.wait(lambda: first.socket.fileno() == -1)
    newer.check()
    assert leased_once(stub)


# -- layouts, restarts, forks


def test_a_new_layout_is_mapped_and_the_old_one_let_go(pin, stub):
    with pin.latest() as view:
        kept = view["count"].to_numpy()
    double = stub.pins["users"]
    with stub.lock:
        double.lay_out(users().schema, 256)
        double.publish(users(7, rows=200))
    with pin.latest() as view:
        assert len(view) == 200
        assert view.to_arrow(declared=True).equals(users(7, rows=200))
    assert kept.tolist() == users().column("count").to_pylist()
    assert len(stub.mappings) == 2
    del view, kept
    assert stub.wait(lambda: len(stub.mappings) == 1)


def test_an_unpinned_pin_is_said_to_be_gone_and_its_views_stay(client, pin, stub):
    with pin.latest() as view:
        client.action("unpin", {"pin": pin.id})
        assert view.to_arrow(declared=True).equals(users())
    with pytest.raises(pinion.UnknownPin):
        pin.latest()


def test_unpin_takes_a_pin_or_a_name(client, stub):
    pin = client.pin("users")
    client.unpin(pin)
    assert stub.pins == {}
    assert stub.wait(lambda: not stub.mappings)
    with pytest.raises(pinion.UnknownPin):
        client.unpin("users")


def test_after_a_restart_old_numbers_are_not_believed(pin, stub):
    with pin.latest() as view:
        kept = view["count"].to_numpy()
        stub.restart({"users": TestPin(users(9), ["user"], slots=3)})
        with pytest.raises(pinion.LeaseGone):
            view.check()
    # The memory is still ours, and nobody writes it.
    assert kept.tolist() == users().column("count").to_pylist()
    with pin.latest() as view:
        view.check()
        assert view.to_arrow(declared=True).equals(users(9))
    assert [name for name, _ in stub.actions] == ["pin", "pin"]
    # The old lease ends beside a new one that has its number.
    with pin.latest() as newer:
        assert newer._hold.lease.id == kept.base.export.hold.lease.id + 1
        del view, kept
        assert not stub.wait(lambda: not stub.leases, 0.1)
        newer.verify()


def test_a_connection_that_broke_is_made_anew_for_the_same_pin(pin, stub):
    with pin.latest():
        pass
    stub.hang_up()
    with pin.latest() as view:
        assert view.to_arrow(declared=True).equals(users())
    assert [name for name, _ in stub.actions] == ["pin"]


def test_a_forked_child_is_told_and_the_parents_lease_is_not_touched(client, pin, stub):
    with pin.latest() as view:
        kept = view["count"].to_numpy()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for use in (pin.latest, view.to_arrow, lambda: pin.id):
                    try:
                        use()
                    except pinion.Forked:
                        code = 0
                    else:
                        os._exit(2)
                # A pin of its own, on the host.
                with client.pin("users").latest() as own:
                    if own.to_arrow(declared=True) != users():
                        code = 3
                del view, kept, pin
                gc.collect()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        # The child's own lease went with it; the parent's is there.
        assert stub.wait(lambda: len(stub.leases) == 1)
        assert kept.tolist() == users().column("count").to_pylist()
    del view, kept
    assert released(stub)


# -- the end of the interpreter


def test_tensors_may_outlive_the_interpreter(stub):
    """Capsules, arrays and an unfinished view at exit: no deleter runs Python, nothing is printed, nothing hangs."""
    said = in_child(
        """
        import sys, builtins
        import numpy as np, pinion
        client = pinion.connect(sys.argv[1])
        pin = client.pin("users")
        view = pin.latest().__enter__()
        builtins.kept = [np.from_dlpack(view["count"]), view["count"].__dlpack__(), view.to_arrow(["name"]), view]
        builtins.kept.append(builtins.kept)
        print(builtins.kept[0][:3].tolist())
        """,
        stub.url,
    )
    assert said == "[0, 3, 6]\n"
    assert stub.wait(lambda: not stub.leases and not stub.mappings)


def test_a_killed_client_leaves_nothing(stub):
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pinion; v = pinion.connect(sys.argv[1]).pin('users').latest();"
            " print(1, flush=True); time.sleep(60)",
            stub.url,
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "python")},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"1\n" and leased(stub) == 1
    process.kill()
    process.wait()
    process.stdout.close()
    assert stub.wait(lambda: not stub.leases and not stub.mappings)


def test_a_device_that_is_not_here_is_refused_and_nothing_stays_mapped(stub):
    stub.pins["users"].device = {"kind": "cuda", "uuid": "GPU-00000000-0000-0000-0000-000000000000", "ordinal": 0}
    with pinion.connect(stub.url) as client:
        with pytest.raises(pinion.DeviceUnavailable) as refused:
            client.pin("users")
        assert refused.value.error in ("NO_DRIVER", "OTHER_DEVICE") or refused.value.error == "DEVICE"
        assert stub.wait(lambda: not stub.mappings)
