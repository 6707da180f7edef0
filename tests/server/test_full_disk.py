"""A server with a full disk still serves results, and runs jobs again once there is space."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from live_server import LiveServer

# Puts the server's folder on its own small file system, in a private mount namespace.
MOUNT = """
cp -a "$0" "$0.before" && mount -t tmpfs -o size=24m none "$0" &&
cp -a "$0.before/." "$0" && exec "$@"
"""


def can_mount():
    if shutil.which("unshare") is None:
        return False
    trial = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this system does not allow mounts in a user namespace")
def test_a_full_disk_stops_jobs_but_not_the_server(serve_fake, write_ct, tmp_path):
    ct, long_ct = tmp_path / "ct.nii.gz", tmp_path / "long.nii.gz"
    write_ct(ct, (20, 24, 21))
    write_ct(long_ct, (32, 32, 1000))
    folder = tmp_path / "server"
    within = ["unshare", "-rm", "sh", "-c", MOUNT, str(folder)]
    server = LiveServer(folder, *serve_fake, "--max-upload", "4MiB", within=within)
    server.start()
    try:
        first = server.wait(server.post("reconstruct", ct.read_bytes()).json()["id"])
        assert first["state"] == "done"
        second = server.post("reconstruct", long_ct.read_bytes(), format="nii").json()["id"]
        folder_seen_from_here = Path(f"/proc/{server.process.pid}/root{folder}")
        for _ in range(20):  # again, because the failing worker frees some space
            with (
                contextlib.suppress(OSError),
                (folder_seen_from_here / "fill").open("ab", 0) as file,
            ):
                while True:
                    file.write(bytes(4096))
            time.sleep(0.2)
        assert server.process.poll() is None
        assert server.get(f"{first['id']}/result").ok
        assert server.post("reconstruct", ct.read_bytes()).status_code == 507
        (folder_seen_from_here / "fill").unlink()
        assert server.wait(second)["state"] in ("done", "failed")
        again = server.wait(server.post("reconstruct", ct.read_bytes()).json()["id"])
        assert again["state"] == "done"
    finally:
        server.kill()
