"""Every attack of benchmarks/attacks.py gets the expected response."""

from __future__ import annotations

import attacks
import pytest
from live_server import LiveServer


@pytest.fixture(scope="module")
def guarded(fake_bundle, tmp_path_factory):
    live = LiveServer(
        tmp_path_factory.mktemp("server"), "-m", str(fake_bundle), "-e", "fake", *attacks.LIMITS
    )
    live.start()
    yield live
    live.kill()


@pytest.mark.parametrize("title", attacks.ATTACKS)
def test_the_server_withstands(title, guarded):
    response, expected = attacks.ATTACKS[title](guarded)
    assert expected, response
    assert guarded.process.poll() is None
