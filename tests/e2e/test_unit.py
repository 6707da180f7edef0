"""The unit in deploy/ under systemd itself, set up by the commands of the lesson.

systemd is the first process of namespaces of its own. Its root is an overlay over that of this
machine, which keeps all that is written, so the machine is left as it was.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fvae_deploy.phantom.torso import write_phantom

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
BUILT = shutil.ignore_patterns(".*", "build", "demo", "dist", "*.egg-info", "__pycache__")

# Two shells: the first in a mount namespace, with the network for pip, the second with nothing.
OUTSIDE = """
mount -t tmpfs space root
mkdir root/upper root/work root/all
mount -t overlay all -o lowerdir=/,upperdir=root/upper,workdir=root/work root/all
cd root/all
mkdir -p given dev proc sys run tmp
mount --bind "$GIVEN" given
mount -t tmpfs tmp tmp
mount -t tmpfs run run
mount -t tmpfs dev dev
for node in null zero full random urandom tty ptmx; do
    touch dev/$node
    mount --bind /dev/$node dev/$node
done
mkdir dev/shm
chroot . /bin/sh -c "userdel fvae; rm -rf /opt/fvae /var/lib/fvae" 2>/dev/null || true
chroot . /bin/sh -ec "cd /given/source
$SET_UP"
mkdir old
exec unshare --mount --pid --net --uts --ipc --cgroup --fork /bin/sh -ec "
pivot_root . old
cd /
mount -t proc proc /proc
umount -l /old
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t sysfs sys /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -o remount,bind,ro /sys
exec env container=other /lib/systemd/systemd --unit=probe.service"
"""
PROBE = """
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
WorkingDirectory=/given
StandardOutput=append:/given/out.log
StandardError=inherit
ExecStart=/bin/sh /given/probe.sh
ExecStopPost=/bin/systemctl --force --force poweroff
"""
INSIDE = """
SERVER=http://127.0.0.1:8080
ready() { for i in $(seq 90); do curl -sf $SERVER/readyz && break; sleep 1; done; echo; }
ask() { curl -s -H "Authorization: Bearer $TOKEN" "$@"; }
@START@
ready
stat -c '%U %a' /var/lib/fvae /var/lib/fvae/store.db /var/log/fvae/audit.log
TOKEN=$(setpriv --reuid=fvae --regid=fvae --clear-groups \
    /opt/fvae/bin/fvae token add radiology --folder /var/lib/fvae)
ID=$(ask -X POST -T ct.nii.gz $SERVER/v1/reconstruct | grep -oE '[0-9a-f]{32}')
ask -N $SERVER/v1/jobs/$ID/events | grep ^event | tail -1
systemctl kill -s KILL fvae
sleep 3
ready
systemctl show fvae -p NRestarts
ask -o recon.nii.gz $SERVER/v1/jobs/$ID/result
systemctl stop fvae
systemctl show fvae -p Result -p ActiveState
tail -1 /var/log/fvae/audit.log
"""


def lesson():
    """Return the commands of the lesson's first step without sudo: before systemd, and in it."""
    text = (ROOT / "docs/tutorials/proxy.md").read_text(encoding="utf-8")
    step = text.partition("## 1.")[2].partition("## 2.")[0]
    commands = re.findall(r"^    (?:sudo )?(.*)", step, re.MULTILINE)
    assert [command.split()[0] for command in commands[-2:]] == ["systemctl", "curl"]
    before = "\n".join(commands[:-2]).replace("'fvae-deploy[", "'.[")
    return before, commands[-2]


def test_systemd_runs_the_server_of_the_lesson_and_starts_it_again(tmp_path):
    if os.geteuid() != 0 or not SYSTEMD.exists():
        pytest.skip("needs root and systemd")
    before, start = lesson()
    given = tmp_path / "given"
    shutil.copytree(ROOT, given / "source", symlinks=True, ignore=BUILT)
    write_phantom(given / "ct.nii.gz", (64, 64, 33))
    (given / "probe.service").write_text(PROBE)
    (given / "probe.sh").write_text(INSIDE.replace("@START@", start))
    (tmp_path / "root").mkdir()
    environment = {k: v for k, v in os.environ.items() if k.startswith("PIP_")} | {
        "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "GIVEN": str(given),
        "SET_UP": f"{before}\ncp /given/probe.service /etc/systemd/system/",
    }
    shell = ["unshare", "--mount", "/bin/sh", "-ec", OUTSIDE]
    done = subprocess.run(
        shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert (given / "out.log").exists(), done.stdout + done.stderr
    log = (given / "out.log").read_text()
    said = ("Created symlink", "Powering off")  # by systemctl
    found = [line for line in log.splitlines() if line and not line.startswith(said)]
    assert found[:-1] == [
        "ready",
        "fvae 700",
        "fvae 600",
        "fvae 600",
        "event: done",
        "ready",
        "NRestarts=1",
        "Result=success",
        "ActiveState=inactive",
    ], log
    assert '"event": "server stops"' in found[-1]
    assert (given / "recon.nii.gz").read_bytes()[:2] == b"\x1f\x8b"
