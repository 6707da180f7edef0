"""A worker resumes a job of a dead worker, or restarts it if the version of fvae differs."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import threading

import pytest
import zarr

import fvae_deploy as fvae
from fvae_deploy.generation.networks import Networks
from fvae_deploy.server.settings import WorkerSettings
from fvae_deploy.server.store import Job, Store
from fvae_deploy.server.worker import Engines, run_job
from fvae_deploy.stream.codec import open_codec
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.nifti import NiftiWriter

OPTIONS = RunOptions(memory=300 << 20)


@pytest.fixture
def engines(fake_bundle):
    with open_codec(fake_bundle, engine="fake") as codec, Networks() as networks:
        yield Engines(codec, networks)


@pytest.fixture
def interrupted(tmp_path, write_ct, engines):
    """Return a store with a reconstruct job whose worker died after 41 of 80 slices."""
    store = Store(tmp_path / "server")
    folder = store.files / "a"
    folder.mkdir()
    write_ct(folder / "input.nii", (9, 11, 80))
    shutil.copy(folder / "input.nii", tmp_path / "ct.nii")
    options = {"format": "nii"}
    store.add(Job("a", "me", None, "reconstruct", "nii", options, 1, "queued", 1.0))
    store.claim()
    done = []

    def die(slices):
        done.append(slices)
        if sum(done) >= 41:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fvae.reconstruct(
            folder / "input.nii",
            folder / "result.nii",
            dataclasses.replace(OPTIONS, resume=True),
            codec=engines.codec,
            progress=die,
        )
    assert (folder / "result.nii.partial").is_dir()
    store.recover(3)
    return store


@pytest.mark.parametrize(
    ("version", "computed"),
    [
        pytest.param(None, range(39, 60), id="same"),  # some computed slabs were not yet written
        pytest.param("0.0.1", range(80, 81), id="other"),
    ],
)
def test_a_job_resumes_or_restarts_after_an_update(
    interrupted, engines, tmp_path, version, computed
):
    folder = interrupted.files / "a"
    if version:
        request = folder / "result.nii.partial" / "request.json"
        request.write_text(json.dumps(json.loads(request.read_text()) | {"fvae": version}))
    run_job(interrupted, interrupted.claim(), engines, WorkerSettings(OPTIONS, "tiny-ldm", 3))
    job = interrupted.get("a")
    assert (job.state, job.done, job.error) == ("done", 80, None)
    assert job.report["volume"]["slices"] in computed
    fvae.reconstruct(tmp_path / "ct.nii", tmp_path / "whole.nii", OPTIONS, codec=engines.codec)
    assert (folder / "result.nii").read_bytes() == (tmp_path / "whole.nii").read_bytes()
    assert [path.name for path in folder.iterdir()] == ["result.nii"]


def full_until(monkeypatch, writer, calls, times):
    """Let the writer fail as on a full disk, in its first `times` runs, after a few slices."""
    real, failed = writer._append, []

    def append(self, frame):
        calls.append(self._count)
        if len(failed) < times and self._count >= 45:
            failed.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, frame)

    monkeypatch.setattr(writer, "_append", append)


@pytest.fixture
def job(tmp_path, write_ct):
    """Return a store with a queued reconstruct job of 80 slices."""
    store = Store(tmp_path / "server")
    folder = store.files / "a"
    folder.mkdir()
    write_ct(folder / "input.nii", (9, 11, 80))
    shutil.copy(folder / "input.nii", tmp_path / "ct.nii")
    store.add(Job("a", "me", None, "reconstruct", "nii", {"format": "nii"}, 1, "queued", 1.0))
    return store


@pytest.mark.parametrize("times", [1, 3])
def test_a_full_disk_costs_a_job_only_time(job, engines, tmp_path, monkeypatch, times):
    calls = []
    monkeypatch.setattr("fvae_deploy.server.worker.PAUSES", (0.01, 0.01, 0.01))
    full_until(monkeypatch, NiftiWriter, calls, times)
    run_job(job, job.claim(), engines, WorkerSettings(OPTIONS, "tiny-ldm", 3))
    done = job.get("a")
    assert (done.state, done.error) == ("done", None)
    assert done.report["volume"]["resumed"] >= 45
    fvae.reconstruct(tmp_path / "ct.nii", tmp_path / "whole.nii", OPTIONS, codec=engines.codec)
    result = job.files / "a" / "result.nii"
    assert result.read_bytes() == (tmp_path / "whole.nii").read_bytes()
    assert [path.name for path in result.parent.iterdir()] == ["result.nii"]


def test_a_disk_that_stays_full_fails_the_job_and_frees_its_space(job, engines, monkeypatch):
    monkeypatch.setattr("fvae_deploy.server.worker.PAUSES", (0.01, 0.01))
    full_until(monkeypatch, NiftiWriter, [], 99)
    run_job(job, job.claim(), engines, WorkerSettings(OPTIONS, "tiny-ldm", 3))
    assert job.get("a").state == "failed"
    assert "No space left" in job.get("a").error
    assert list((job.files / "a").iterdir()) == []


def test_a_job_that_waits_for_space_can_be_cancelled(job, engines, monkeypatch):
    monkeypatch.setattr("fvae_deploy.server.worker.PAUSES", (30,))
    full_until(monkeypatch, NiftiWriter, [], 99)
    threading.Timer(0.5, job.cancel, ("a",)).start()
    run_job(job, job.claim(), engines, WorkerSettings(OPTIONS, "tiny-ldm", 3))
    assert job.get("a").state == "cancelled"


def test_a_full_disk_does_not_cost_an_encode_its_frames(job, engines, tmp_path, monkeypatch):
    folder, failed = job.files / "b", []
    folder.mkdir()
    shutil.copy(tmp_path / "ct.nii", folder / "input.nii")
    job.claim()
    job.add(Job("b", "me", None, "encode", "nii", {}, 1, "queued", 2.0))
    real = zarr.Array.__setitem__

    def write(self, where, values):
        if not failed and where[1].start >= 11:
            failed.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, where, values)

    monkeypatch.setattr(zarr.Array, "__setitem__", write)
    monkeypatch.setattr("fvae_deploy.server.worker.PAUSES", (0.01,))
    run_job(job, job.claim(), engines, WorkerSettings(OPTIONS, "tiny-ldm", 3))
    done = job.get("b")
    assert (done.state, done.error, failed) == ("done", None, [1])
    assert done.report["volume"]["resumed"] > 0
