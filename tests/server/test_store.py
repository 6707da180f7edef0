"""The store's promises: no job twice, none lost, an end counted once; what a worker may take."""

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

REPORT = {"seconds": {"read": 1.0, "total": 2.0}, "volume": {"slices": 7}}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def job(ident, key=None, **more):
    return Job(ident, "me", key, "encode", "nii", {"k": 1}, 10, "queued", float(len(ident)), **more)


def test_a_job_comes_back_as_it_went_in(store):
    assert store.add(job("a")) == job("a") == store.get("a")


def test_one_key_is_one_job_however_many_come_at_once(store):
    found = []

    def add(n):
        found.append(store.add(job(f"job{n}", key="k")).id)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(store.owned("me", 99)) == 1
    other = Job("b", "you", "k", "encode", "nii", {}, 1, "queued", 1.0)
    assert store.add(other).id == "b"  # another's key is another's


def test_no_two_workers_get_one_job(store):
    for n in range(20):
        store.add(job(f"job{n:02}"))
    taken = []

    def work():
        while (found := store.claim()) is not None:
            taken.append(found.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [f"job{n:02}" for n in range(20)]


def test_an_end_is_counted_once_and_stays(store):
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


def test_a_job_that_kills_its_worker_is_tried_again_and_then_given_up(store):
    store.add(job("a"))
    for attempt in (1, 2):
        assert store.claim().attempts == attempt
        assert [found.state for found in store.recover(3)] == ["queued"]
    store.claim()
    (found,) = store.recover(3)
    assert (found.state, found.error_kind) == ("failed", "worker")
    assert "found the worker dead 3 times" in found.error


def test_a_job_that_waits_is_cancelled_at_once_and_once(store):
    store.add(job("a"))
    assert store.cancel("a")  # its files are the caller's to clear
    assert not store.cancel("a")
    assert store.claim() is None
    assert (store.get("a").state, store.get("a").error) == (
        "cancelled",
        "cancelled before it began",
    )


def test_a_job_cancelled_while_its_worker_died_is_not_tried_again(store):
    store.add(job("a"))
    store.claim()
    assert not store.cancel("a")  # its worker clears its files
    assert store.tick("a", "encode", 1, 9)  # told to stop
    assert [found.state for found in store.recover(3)] == ["cancelled"]


def test_what_ended_long_ago_is_forgotten_with_its_files(store, tmp_path):
    for ident in ("old", "waits", "stray"):
        (store.files / ident).mkdir()
        (store.files / ident / "result.nii").write_bytes(b"x")
    store.add(job("old"))
    store.claim()
    store.finish("old", "result.nii", REPORT)
    store.add(job("waits"))
    Supervisor(store, Settings(tmp_path, 1, keep_hours=1), Audit())._forget()
    assert store.get("old") is not None
    supervisor = Supervisor(store, Settings(tmp_path, 1, keep_hours=0), Audit())
    supervisor._forget()
    supervisor._sweep_strays()
    assert store.get("old") is None
    assert [path.name for path in store.files.iterdir()] == ["waits"]


def test_tokens_are_kept_as_hashes_and_compared_whole(store):
    token = make_token(store, "me")
    assert owner_of(store, token) == "me"
    assert owner_of(store, token[:-1]) is None
    assert owner_of(store, "") is None
    assert owner_of(store, "\udcff") is None
    assert token not in str(store.tokens())


def test_a_worker_that_takes_more_than_its_budget_is_ended_and_its_job_told(store, tmp_path):
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
            supervisor = Supervisor(store, Settings(tmp_path, memory), Audit())
            supervisor._check_memory(worker)
            assert store.get("a").state == state
        assert (worker.poll(), store.get("a").error_kind) == (-9, "memory")
        assert list((store.files / "a").iterdir()) == []
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
