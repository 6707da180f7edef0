"""Pages of read-only mappings are dropped, and read again on use."""

from __future__ import annotations

import mmap
import platform
import subprocess
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


# What threads allocate together and the main thread frees, as the tiles of a network in segments.
THREADS = """
import sys, threading
import numpy as np
from fvae_deploy.engines.pages import share_heap, trim
from fvae_deploy.stream.rss import current_rss
if sys.argv[1] == "shared":
    share_heap()
np.ones(30 << 18, np.float32)  # freed: memory of up to 30 MiB comes from heaps from now on
before = current_rss()
for turn in range(12):
    arrays, together = [], threading.Barrier(4)
    def work():
        arrays.append([np.ones((3 + turn % 5) << 18, np.float32) for _ in range(3)])
        together.wait()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    arrays.clear()
    trim()
print((current_rss() - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of the GNU library")
def test_no_free_memory_is_left_where_threads_share_a_heap() -> None:
    left = {
        case: int(subprocess.check_output([sys.executable, "-c", THREADS, case]))
        for case in ("apart", "shared")
    }
    assert left["shared"] < 8  # MiB
    assert left["apart"] > 24
