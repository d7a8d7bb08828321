"""The README's five-minute tour, run as it is printed."""

import os
import re
import socket
import subprocess
import sys
import time

from support.process import REPOSITORY, binary, environment


def blocks(section):
    """(language, text) of every code block in a section of the README."""
    text = (REPOSITORY / "README.md").read_text()
    body = text.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```(\w+)\n(.*?)```", body, re.DOTALL)


def test_the_five_minute_tour_works_as_printed(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = environment({"PINION_DATA": tmp_path / "features"})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pinion").symlink_to(binary().resolve())
    env["PYTHONPATH"] = str(REPOSITORY / "python")
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    printed = []
    server = None
    tour = blocks("Five minutes")
    (tmp_path / "weather.toml").write_text(next(text for language, text in tour if language == "toml"))
    try:
        for language, text in tour:
            text = text.replace("127.0.0.1:8815", f"127.0.0.1:{port}").replace(
                "/tmp/pinion.sock", str(tmp_path / "p.sock")
            )
            text = text.replace("/tmp/pinion-lane.sock", str(tmp_path / "l.sock"))
            if language == "sh" and "cargo build" in text:
                continue
            if language == "sh" and "pinion serve" in text:
                server = subprocess.Popen(["bash", "-c", f"exec {text}"], env=env, cwd=tmp_path)
                wait_for(port)
                continue
            command = {"sh": ["bash", "-euc", text], "python": [sys.executable, "-c", text]}.get(language)
            if command is None:
                continue
            done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    finally:
        if server is not None:
            server.terminate()
            assert server.wait(30) == 0
    said = "\n".join(printed)
    assert "21.9" in said and "40.1" in said
    assert "'temp': 40.1" in said and "'wind_gust__status': 2" in said and "'temp__status': 3" in said, said
    assert "'temp': 41.5" in said, said


def wait_for(port):
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the server of the tour does not listen"
            time.sleep(0.05)
