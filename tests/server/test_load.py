"""The load of benchmarks/load.py, briefly: two minutes of it are a command, not a test."""

from __future__ import annotations

import load


def test_no_job_is_lost_or_doubled_while_the_server_is_killed(serve_fake, fake_bundle, tmp_path):
    model = {"model": fake_bundle, "engine": "fake"}
    of = load.Load(tmp_path, [*serve_fake, "--queue", "4"], model)
    try:
        figures = load.run(of, clients=4, seconds=5)
    finally:
        of.server.kill()
    # A busy machine may take its time over a status call; that says nothing about the code.
    assert load.held(figures, p95=2000, mib=400), figures
