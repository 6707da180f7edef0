"""The memory that a process may still take, from trees as machines and containers have them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvae_deploy.stream.limits import available_bytes

FREE = 10 << 30
V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 23 0:31 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
CPU = "34 23 0:30 / /sys/fs/cgroup/cpu rw shared:8 - cgroup cgroup rw,cpu,cpuacct\n"
UNLIMITED = 9223372036854771712  # what version 1 says without a limit
UNSET = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture(autouse=True)
def _no_limits_of_this_process(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: UNSET)


def write(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(f"{content}\n")


def machine(root, cgroup="", mountinfo=""):
    write(root / "proc", meminfo=f"MemTotal: 99 kB\nMemFree: 7 kB\nMemAvailable: {FREE >> 10} kB")
    write(root / "proc/self", cgroup=cgroup, mountinfo=mountinfo)
    write(root / "proc/self", status="VmPeak:\t 9 kB\nVmSize:\t  2048 kB\nVmData:\t  1024 kB")
    return root


def group(path, limit, used=0, cached=0, high="max"):
    stat = f"anon {used - cached}\nfile {cached}\ninactive_file {cached}\nactive_file 0"
    files = {"memory__max": limit, "memory__current": used, "memory__high": high}
    write(path, **files, memory__stat=stat)


def group1(path, limit, used=0, cached=0):
    stat = f"cache 9\nactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0"
    files = {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": used}
    write(path, **files, memory__stat=stat)


def test_without_groups_the_machine_counts(tmp_path):
    assert available_bytes(machine(tmp_path)) == FREE


def test_the_group_of_a_container_counts_without_its_cached_files(tmp_path):
    root = machine(tmp_path, "0::/", V2)
    group(root / "sys/fs/cgroup", 300_000_000, used=280_000_000, cached=220_000_000)
    assert available_bytes(root) == 300_000_000 - 60_000_000
    group(root / "sys/fs/cgroup", "max", used=280_000_000)
    assert available_bytes(root) == FREE


LIMITS = st.lists(st.one_of(st.just("max"), st.integers(1, 2 * FREE)), min_size=5, max_size=5)


@given(LIMITS, LIMITS, st.lists(st.integers(0, 1 << 30), min_size=5, max_size=5))
def test_the_least_of_all_groups_above_counts(tmp_path_factory, limits, highs, used):
    root = machine(tmp_path_factory.mktemp("m"), "0::/system.slice/slurmd/job_7/step_0", V2)
    folder, left = root / "sys/fs/cgroup", [FREE]
    parts = ["", "system.slice", "slurmd", "job_7", "step_0"]
    for part, limit, high, now in zip(parts, limits, highs, used, strict=True):
        folder = folder / part
        group(folder, limit, used=now, high=high)
        left += [n - now for n in (limit, high) if n != "max"]
    assert available_bytes(root) == max(min(left), 0)


@pytest.mark.parametrize(
    ("seen", "mounted", "folder"),
    [
        pytest.param("/slurm/uid_1/job_7", "/", "slurm/uid_1/job_7", id="of the host"),
        pytest.param("/docker/4fe", "/docker/4fe", "", id="a container that mounts its own part"),
        pytest.param("/docker/4fe/in", "/docker/4fe", "in", id="a group within such a container"),
        pytest.param("/docker/4fe", "/", "", id="a container with a mount that hides the path"),
    ],
)
def test_groups_of_version_1_are_found_by_their_mount(tmp_path, seen, mounted, folder):
    mounts = CPU + V1.replace(" / ", f" {mounted} ", 1)
    root = machine(tmp_path, f"5:cpu,cpuacct:/other\n4:memory:{seen}\n0::/", mounts)
    group1(root / "sys/fs/cgroup/memory" / folder, 500_000_000, used=300_000_000, cached=100_000)
    write(root / "sys/fs/cgroup/cpu", memory__limit_in_bytes=1, memory__usage_in_bytes=0)
    assert available_bytes(root) == 200_100_000


def test_a_version_1_group_without_a_limit_does_not_limit(tmp_path):
    root = machine(tmp_path, "4:memory:/a/b", V1)
    for folder in ("", "a", "a/b"):
        group1(root / "sys/fs/cgroup/memory" / folder, UNLIMITED, used=5)
    assert available_bytes(root) == FREE
    group1(root / "sys/fs/cgroup/memory/a", 1 << 20, used=5)
    assert available_bytes(root) == (1 << 20) - 5


def test_a_mount_at_an_unusual_place_is_found(tmp_path):
    root = machine(tmp_path, "0::/a", V2.replace("/sys/fs/cgroup", "/mnt/my\\040groups"))
    group(root / "mnt/my groups/a", 1 << 20)
    assert available_bytes(root) == 1 << 20


@pytest.mark.parametrize("content", ["", "garbage", "0::", "4:memory", ":::::", "0::/../../x"])
def test_other_content_is_no_error(tmp_path, content):
    assert available_bytes(machine(tmp_path, content, content)) == FREE


@pytest.mark.parametrize(
    ("kind", "used"), [(resource.RLIMIT_AS, 2048), (resource.RLIMIT_DATA, 1024)]
)
def test_limits_of_the_process_count(tmp_path, monkeypatch, kind, used):
    limit = 1 << 30
    monkeypatch.setattr(
        resource, "getrlimit", lambda asked: (limit, limit) if asked == kind else UNSET
    )
    assert available_bytes(machine(tmp_path)) == limit - used * 1024


@pytest.mark.parametrize("option", ["-v", "-d"])
def test_ulimit_is_seen(option):
    code = "from fvae_deploy.stream.limits import available_bytes; print(available_bytes())"
    line = f"ulimit {option} 3000000 && exec '{sys.executable}' -c '{code}'"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 3_000_000 * 1024


def test_the_free_memory_is_known():
    assert 2**20 < available_bytes() < 2**50


def test_where_the_system_does_not_tell_what_is_free_all_memory_is_taken(monkeypatch, tmp_path):
    real = os.sysconf

    def as_on_macos(name):
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return real(name)

    monkeypatch.setattr("os.sysconf", as_on_macos)
    assert 2**20 < available_bytes(tmp_path) < 2**50
