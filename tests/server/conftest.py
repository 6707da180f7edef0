from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from live_server import LiveServer


@pytest.fixture(scope="session")
def serve_fake(fake_bundle: Path) -> list[str]:
    """Command-line options for a server with the fake engine."""
    return ["-m", str(fake_bundle), "-e", "fake", "--memory", "300MiB"]


@pytest.fixture(scope="module")
def server(serve_fake: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A running server with the fake engine, shared by the tests of one file."""
    from live_server import LiveServer

    live = LiveServer(tmp_path_factory.mktemp("server"), *serve_fake)
    live.start()
    yield live
    live.kill()
