"""Pages of read-only mappings are dropped, and read again on use."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from fvae_deploy.engines.pages import unmap
from fvae_deploy.stream.rss import current_rss

SIZE = 32 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists mapped files")
def test_pages_are_dropped_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        resident = current_rss()
        unmap(path)
        assert resident - current_rss() > SIZE // 2
        assert mapped[255::256] == b"\xff" * (SIZE // 256)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists mapped files")
def test_changed_pages_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:4096] = b"\x01" * 4096
        unmap(path)
        assert mapped[:4096] == b"\x01" * 4096
