"""A worker resumes a job of a dead worker, or restarts it if the version of fvae differs."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

import fvae_deploy as fvae
from fvae_deploy.server.settings import WorkerSettings
from fvae_deploy.server.store import Job, Store
from fvae_deploy.server.worker import run_job
from fvae_deploy.stream.codec import open_codec
from fvae_deploy.stream.options import RunOptions

OPTIONS = RunOptions(memory=300 << 20)


@pytest.fixture
def codec(fake_bundle):
    with open_codec(fake_bundle, engine="fake") as opened:
        yield opened


@pytest.fixture
def interrupted(tmp_path, write_ct, codec):
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
            codec=codec,
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
def test_a_job_resumes_or_restarts_after_an_update(interrupted, codec, tmp_path, version, computed):
    folder = interrupted.files / "a"
    if version:
        request = folder / "result.nii.partial" / "request.json"
        request.write_text(json.dumps(json.loads(request.read_text()) | {"fvae": version}))
    run_job(interrupted, interrupted.claim(), codec, WorkerSettings(OPTIONS, "tiny-ldm", 3))
    job = interrupted.get("a")
    assert (job.state, job.done, job.error) == ("done", 80, None)
    assert job.report["volume"]["slices"] in computed
    fvae.reconstruct(tmp_path / "ct.nii", tmp_path / "whole.nii", OPTIONS, codec=codec)
    assert (folder / "result.nii").read_bytes() == (tmp_path / "whole.nii").read_bytes()
    assert [path.name for path in folder.iterdir()] == ["result.nii"]
