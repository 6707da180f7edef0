"""Ctrl-C in the terminal of a server ends it and its worker without a traceback."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from live_server import LiveServer


def test_ctrl_c_in_a_terminal_ends_the_server_with_events_alone(serve_fake, tmp_path):
    server = LiveServer(tmp_path, *serve_fake, within=["setsid"])
    server.start()
    worker = server.store.worker()["pid"]
    os.killpg(server.process.pid, signal.SIGINT)  # a terminal interrupts all of a program
    assert server.process.wait(30) == 0
    lines = (tmp_path / "stderr.log").read_text().splitlines()
    assert [line for line in lines if "make page" not in line] == []  # the viewer may be absent
    end = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.05)  # it ends by itself when the server has
    assert not Path(f"/proc/{worker}").exists()
