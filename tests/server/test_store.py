"""The store loses and duplicates no job and counts each end once; the memory limit holds."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from fvae_deploy.server.audit import Audit
from fvae_deploy.server.auth import make_token, owner_of
from fvae_deploy.server.settings import Settings
from fvae_deploy.server.store import Job, Store
from fvae_deploy.server.supervisor import Supervisor
from fvae_deploy.stream.options import RunOptions

REPORT = {"seconds": {"read": 1.0, "total": 2.0}, "volume": {"slices": 7}}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def job(ident, key=None, **more):
    return Job(ident, "me", key, "encode", "nii", {"k": 1}, 10, "queued", float(len(ident)), **more)


def test_a_stored_job_is_read_back_unchanged(store):
    assert store.add(job("a")) == job("a") == store.get("a")


def test_concurrent_uploads_with_one_key_create_one_job(store):
    ids = []

    def add(n):
        ids.append(store.add(job(f"job{n}", key="k")).id)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 1
    assert len(store.jobs_of("me", 99)) == 1
    other = Job("b", "you", "k", "encode", "nii", {}, 1, "queued", 1.0)
    assert store.add(other).id == "b"  # the same key of another owner


def test_no_job_is_claimed_twice(store):
    for n in range(20):
        store.add(job(f"job{n:02}"))
    claimed = []

    def claim_all():
        while (job := store.claim()) is not None:
            claimed.append(job.id)

    threads = [threading.Thread(target=claim_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == [f"job{n:02}" for n in range(20)]


def test_the_end_of_a_job_is_counted_once_and_final(store):
    store.add(job("a"))
    store.claim()
    store.finish("a", "result.nii", REPORT)
    store.fail("a", "worker", "too late")
    store.finish("a", "other.nii", REPORT)
    store.cancel("a")
    assert (store.get("a").state, store.get("a").result) == ("done", "result.nii")
    assert {(name, label): value for name, label, value in store.totals()} == {
        ("done_jobs", "encode"): 1,
        ("stage", "read"): 1.0,
        ("slices", ""): 7,
        ("busy", ""): 2.0,
    }


def test_a_job_that_kills_its_worker_is_retried_and_then_fails(store):
    store.add(job("a"))
    for attempt in (1, 2):
        assert store.claim().attempts == attempt
        assert [recovered.state for recovered in store.recover(3)] == ["queued"]
    store.claim()
    (recovered,) = store.recover(3)
    assert (recovered.state, recovered.error_kind) == ("failed", "worker")
    assert "its worker died 3 times" in recovered.error


def test_a_queued_job_is_cancelled_at_once_and_only_once(store):
    store.add(job("a"))
    assert store.cancel("a")  # True: the caller must clear its files
    assert not store.cancel("a")
    assert store.claim() is None
    assert (store.get("a").state, store.get("a").error) == (
        "cancelled",
        "cancelled before it started",
    )


def test_a_cancelled_job_of_a_dead_worker_is_not_retried(store):
    store.add(job("a"))
    store.claim()
    assert not store.cancel("a")  # False: its worker clears its files
    assert store.tick("a", "encode", 1, 9)  # True: the job must stop
    assert [recovered.state for recovered in store.recover(3)] == ["cancelled"]


def test_expired_jobs_are_deleted_with_their_files(store, tmp_path):
    for ident in ("old", "waits", "stray"):
        (store.files / ident).mkdir()
        (store.files / ident / "result.nii").write_bytes(b"x")
    store.add(job("old"))
    store.claim()
    store.finish("old", "result.nii", REPORT)
    store.add(job("waits"))
    Supervisor(
        store, Settings(tmp_path, RunOptions(memory=1), keep_hours=1), Audit()
    )._delete_expired()
    assert store.get("old") is not None
    supervisor = Supervisor(store, Settings(tmp_path, RunOptions(memory=1), keep_hours=0), Audit())
    supervisor._delete_expired()
    supervisor._remove_strays()
    assert store.get("old") is None
    assert [path.name for path in store.files.iterdir()] == ["waits"]


def test_tokens_are_stored_as_hashes_and_compared_in_full(store):
    token = make_token(store, "me")
    assert owner_of(store, token) == "me"
    assert owner_of(store, token[:-1]) is None
    assert owner_of(store, "") is None
    assert owner_of(store, "\udcff") is None
    assert token not in str(store.tokens())


def test_a_worker_above_its_memory_limit_is_killed_and_its_job_fails(store, tmp_path):
    eater = "import time; x = bytearray(300 << 20); print('ate', flush=True); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", eater], stdout=subprocess.PIPE)
    try:
        assert worker.stdout.readline() == b"ate\n"
        store.set_worker({"pid": worker.pid, "baseline": 20 << 20})
        store.add(job("a"))
        (store.files / "a").mkdir()
        (store.files / "a" / "input.nii").write_bytes(b"x")
        store.claim()
        for memory, state in ((400 << 20, "running"), (100 << 20, "failed")):
            supervisor = Supervisor(store, Settings(tmp_path, RunOptions(memory=memory)), Audit())
            supervisor._check_memory(worker)
            assert store.get("a").state == state
        assert (worker.poll(), store.get("a").error_kind) == (-9, "memory")
        assert list((store.files / "a").iterdir()) == []
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
