"""A short run of the load test in benchmarks/load.py."""

from __future__ import annotations

import load


def test_no_job_is_lost_or_doubled_while_the_server_is_killed(serve_fake, fake_bundle, tmp_path):
    model = {"model": fake_bundle, "engine": "fake"}
    state = load.Load(tmp_path, [*serve_fake, "--queue", "4"], model)
    try:
        figures = load.run(state, clients=4, seconds=5)
    finally:
        state.server.kill()
    # A generous latency limit, because a busy machine answers status calls slowly.
    assert load.passed(figures, p95=2000, mib=400), figures
