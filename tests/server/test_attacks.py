"""Every attack of benchmarks/attacks.py is answered as its table says."""

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
def test_held(title, guarded):
    text, good = attacks.ATTACKS[title](guarded)
    assert good, text
    assert guarded.process.poll() is None
