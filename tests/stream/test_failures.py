"""What a run checks and keeps when its input is bad, or when the disk or the network fails."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest

from fvae_deploy import api
from fvae_deploy.errors import EngineError, FvaeError, OutputError, VolumeError
from fvae_deploy.storage.journal import Journal, journal_of
from fvae_deploy.storage.latent_info import LatentInfo
from fvae_deploy.storage.latents import LatentReader, LatentWriter, partial_path
from fvae_deploy.storage.lock import Lock
from fvae_deploy.volume.base import FrameWriter, Geometry
from fvae_deploy.volume.nifti import NiftiReader
from fvae_deploy.volume.open import create_volume

VERBS = pytest.mark.parametrize("verb", ["encode", "reconstruct"])
SHAPE = (9, 11, 80)


@pytest.fixture
def fake(fake_bundle):
    return {"model": fake_bundle, "engine": "fake"}


def write(path, values):
    """Write a volume [z, x, y]."""
    z, x, y = values.shape
    with create_volume(path, Geometry((x, y, z), np.eye(4))) as writer:
        writer.write(values.astype(np.int16))


def stop_after(slices):
    done = []

    def progress(count):
        done.append(count)
        if sum(done) >= slices:
            raise KeyboardInterrupt

    return progress


def mask(kind):
    values = np.random.default_rng(0).integers(0, 5, (80, 9, 11))
    if kind == "empty at the start":
        values[:40] = 0
    if kind == "one voxel":
        values[:] = 0
        values[-1, -1, -1] = 1
    return values


KINDS = pytest.mark.parametrize("kind", ["full", "empty at the start", "one voxel"])


@VERBS
@KINDS
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".zarr"])
def test_a_mask_is_refused_before_anything_is_computed(verb, kind, suffix, fake, tmp_path):
    write(tmp_path / f"mask{suffix}", mask(kind))
    done = []
    for resume in (False, True):
        with pytest.raises(VolumeError, match="--any-range"):
            getattr(api, verb)(
                tmp_path / f"mask{suffix}",
                tmp_path / "out.zarr",
                progress=done.append,
                resume=resume,
                **fake,
            )
    assert sum(done) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"mask{suffix}"]


@VERBS
@KINDS
def test_a_mask_is_refused_also_when_its_run_is_resumed(verb, kind, fake, tmp_path):
    run, out = getattr(api, verb), tmp_path / "out.zarr"
    write(tmp_path / "mask.nii", mask(kind))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "mask.nii", out, any_range=True, progress=stop_after(70), **fake)
    note = partial_path(out) / "request.json"
    if note.exists():  # as if begun without the option, by a version without the early check
        note.write_text(json.dumps(json.loads(note.read_text()) | {"any_range": False}))
    with pytest.raises(VolumeError, match="--any-range"):
        run(tmp_path / "mask.nii", out, resume=True, **fake)
    assert not out.exists()


@VERBS
@pytest.mark.parametrize("first", [1, 41, 79])
@pytest.mark.parametrize("stop", [None, 3, 70])
def test_a_ct_whose_first_slices_show_no_air_is_accepted(verb, first, stop, fake, tmp_path):
    values = np.random.default_rng(0).integers(0, 900, (80, 9, 11))
    values[first:, 0, 0] = -1000
    write(tmp_path / "ct.nii", values)
    run, out = getattr(api, verb), tmp_path / "out.zarr"
    if stop:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "ct.nii", out, progress=stop_after(stop), **fake)
    assert run(tmp_path / "ct.nii", out, resume=True, **fake)["volume"]["shape"] == [9, 11, 80]


@VERBS
@pytest.mark.parametrize("stop", [1, 30, 79])
def test_the_report_of_a_resumed_run_counts_clipped_voxels_of_the_whole_volume(
    verb, stop, fake, write_ct, tmp_path
):
    values = write_ct(tmp_path / "ct.nii", SHAPE)
    run, out = getattr(api, verb), tmp_path / "out.zarr"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ct.nii", out, progress=stop_after(stop), **fake)
    clipped = run(tmp_path / "ct.nii", out, resume=True, **fake)["clipped"]
    assert (clipped["below"], clipped["above"]) == ((values < -1000).sum(), (values > 1000).sum())
    assert (clipped["minimum_hu"], clipped["maximum_hu"]) == (values.min(), values.max())


def failing_reader(monkeypatch, code, after):
    """Let every reader of NIfTI fail with this error once it has read so many slabs."""
    real = NiftiReader.slabs

    def slabs(self, *depths, start=0):
        for number, slab in enumerate(real(self, *depths, start=start)):
            if number == after:
                error = OSError(code, "it failed")
                raise VolumeError(f"expected to read {self.path}, found it failed") from error
            yield slab

    monkeypatch.setattr(NiftiReader, "slabs", slabs)


READING = [errno.ESTALE, errno.EIO, errno.ENOENT, errno.ENOTCONN, errno.EACCES]


@VERBS
@pytest.mark.parametrize("code", READING)
def test_a_first_run_whose_input_goes_away_can_be_resumed(
    verb, code, fake, write_ct, tmp_path, monkeypatch
):
    write_ct(tmp_path / "ct.nii", SHAPE)
    run, out, done = getattr(api, verb), tmp_path / "out.zarr", []
    with monkeypatch.context() as patch:
        failing_reader(patch, code, 15)
        with pytest.raises(VolumeError):
            run(tmp_path / "ct.nii", out, **fake)
    run(tmp_path / "ct.nii", out, resume=True, progress=done.append, **fake)
    assert done[0] >= 20  # slices that were not computed again
    run(tmp_path / "ct.nii", tmp_path / "whole.zarr", **fake)
    assert content(out) == content(tmp_path / "whole.zarr")


def content(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@VERBS
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_first_run_whose_disk_fails_can_be_resumed(
    verb, code, fake, write_ct, tmp_path, monkeypatch
):
    write_ct(tmp_path / "ct.nii", SHAPE)
    run, out, done, calls = getattr(api, verb), tmp_path / "out.zarr", [], []

    def broken(real):
        def write(self, *arguments):
            calls.append(1)
            if len(calls) > 12:
                raise OSError(code, "it failed")
            return real(self, *arguments)

        return write

    with monkeypatch.context() as patch:
        if verb == "encode":
            import zarr

            patch.setattr(zarr.Array, "__setitem__", broken(zarr.Array.__setitem__))
        else:
            from fvae_deploy.volume.zarr_writer import ZarrWriter

            patch.setattr(ZarrWriter, "_append", broken(ZarrWriter._append))
        with pytest.raises(OutputError, match="it failed"):
            run(tmp_path / "ct.nii", out, **fake)
    assert partial_path(out).is_dir()
    run(tmp_path / "ct.nii", out, resume=True, progress=done.append, **fake)
    assert done[0] > 0
    run(tmp_path / "ct.nii", tmp_path / "whole.zarr", **fake)
    assert content(out) == content(tmp_path / "whole.zarr")


@VERBS
def test_an_input_that_changes_during_a_run_is_refused_and_leaves_nothing(
    verb, fake, write_ct, tmp_path
):
    write_ct(tmp_path / "ct.nii", SHAPE)

    def progress(slices):
        if not slices:
            write_ct(tmp_path / "other.nii", SHAPE, seed=7)
            (tmp_path / "other.nii").replace(tmp_path / "ct.nii")

    with pytest.raises(VolumeError, match="found a change"):
        getattr(api, verb)(tmp_path / "ct.nii", tmp_path / "out.zarr", progress=progress, **fake)
    assert [path.name for path in tmp_path.iterdir()] == ["ct.nii"]


@VERBS
def test_a_zarr_input_that_vanishes_is_not_read_as_zeros(verb, fake, write_ct, tmp_path):
    write_ct(tmp_path / "ct.zarr", (9, 11, 300))
    seen = []

    def progress(slices):
        seen.append(slices)
        if sum(seen) > 20 and (tmp_path / "ct.zarr").exists():
            (tmp_path / "ct.zarr").rename(tmp_path / "away.zarr")

    run, out = getattr(api, verb), tmp_path / "out.zarr"
    with pytest.raises(FvaeError):
        run(tmp_path / "ct.zarr", out, progress=progress, **fake)
    (tmp_path / "away.zarr").rename(tmp_path / "ct.zarr")
    run(tmp_path / "ct.zarr", out, resume=True, **fake)
    run(tmp_path / "ct.zarr", tmp_path / "whole.zarr", **fake)
    assert content(out) == content(tmp_path / "whole.zarr")


def compete(folder, number, barrier, results):
    """Use one journal as a run does, at the same moment as another process; again and again."""
    for turn in range(60):
        barrier.wait()
        try:
            with journal_of(folder / f"{turn}.nii", {"run": number}, resume=False) as journal:
                for n in range(4):
                    journal.keep(f"slab{n}", np.full(50, number, np.float32))
                found = [journal.found(f"slab{n}") for n in range(4)]
                fine = all(slab is not None and (slab == number).all() for slab in found)
                results.put("done" if fine else "mixed")
        except VolumeError as error:
            results.put("refused" if "for this run alone" in str(error) else str(error))


def compete_for_latents(folder, number, barrier, results):
    geometry = Geometry((16, 32, 21), np.eye(4))
    settings = ("0" * 16, "fake", "fp32", "causal", 1, 21, geometry, (-1000.0, 1000.0), "0.1.0")
    for turn in range(40):
        barrier.wait()
        try:
            info = LatentInfo(str(number), *settings)
            writer = LatentWriter(folder / f"{turn}.zarr", info, (3, 6, 2, 4))
            for t in range(6):
                writer.write(t, np.full((3, 1, 2, 4), number, np.float32))
            writer.commit()
            results.put("done")
        except VolumeError as error:
            results.put("refused" if "for this run alone" in str(error) else str(error))


@pytest.mark.parametrize("competitor", [compete, compete_for_latents])
def test_runs_that_start_at_the_same_moment_never_mix(competitor, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=competitor, args=(tmp_path, number, barrier, results))
        for number in range(3)
    ]
    for process in processes:
        process.start()
    turns = 60 if competitor is compete else 40
    found = [results.get(timeout=120) for _ in range(3 * turns)]
    for process in processes:
        process.join()
    assert set(found) <= {"done", "refused"}
    assert found.count("done") >= turns
    if competitor is compete:
        assert list(tmp_path.iterdir()) == []
        return
    for path in tmp_path.iterdir():
        reader = LatentReader(path)
        np.testing.assert_array_equal(reader.read(0, 6), int(reader.info.model))


def fails(folder, error, during=lambda journal: None):
    """Run until a slab is stored and fail then."""
    with journal_of(folder / "a.nii", {}, resume=False) as journal:
        journal.keep("slab0", np.zeros(3, np.float32))
        during(journal)
        raise error


@pytest.mark.parametrize("error", [VolumeError("bad input"), OutputError("full"), EngineError("")])
def test_a_run_that_ends_does_not_remove_the_journal_of_the_next(error, tmp_path):
    later = []

    def replace(journal):
        shutil.rmtree(journal.folder)  # as a user would
        later.append(Journal(journal.folder, {}, resume=False))

    with pytest.raises(type(error)):
        fails(tmp_path, error, replace)
    assert later[0].held
    later[0].keep("slab0", np.ones(3, np.float32))
    assert later[0].found("slab0") is not None


def test_a_journal_half_removed_by_a_kill_is_taken_over(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fails(tmp_path, KeyboardInterrupt())
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.partial"]
    (tmp_path / "a.nii.partial" / "slab0.npy").unlink()
    with journal_of(tmp_path / "a.nii", {}, resume=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_follows_its_folder(tmp_path):
    lock = Lock(tmp_path / "a")
    assert lock.held
    (tmp_path / "a").rename(tmp_path / "b")
    assert not lock.held
    other = Lock(tmp_path / "a")
    assert other.held
    lock.close()


def take_and_leave(folder, results):
    found = set()
    for _ in range(2000):
        try:
            lock = Lock(folder)
            folder.rmdir()
            lock.close()
            found.add("done")
        except VolumeError:
            found.add("refused")
    results.put(found)


def test_a_folder_that_vanishes_while_it_is_locked_is_made_again(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=take_and_leave, args=(tmp_path / "a", results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert set().union(*(results.get(timeout=9) for _ in processes)) == {"done", "refused"}


def test_what_is_no_folder_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(OSError, match="directory"):
            Lock(tmp_path / name)


def test_a_codec_in_two_threads_at_once_is_an_error(fake_codec, write_ct, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    write_ct(tmp_path / "ct.nii", SHAPE)
    clip = np.zeros((fake_codec.manifest.geometry.channels, 5, 16, 16), np.float32)
    with ThreadPoolExecutor(1) as pool:

        def progress(slices):
            for use in (
                lambda: fake_codec.encode(clip),
                lambda: api.encode(tmp_path / "ct.nii", tmp_path / "o.zarr", codec=fake_codec),
            ):
                with pytest.raises(EngineError, match="one codec per thread"):
                    pool.submit(use).result()

        api.reconstruct(
            tmp_path / "ct.nii", tmp_path / "out.nii", codec=fake_codec, progress=progress
        )
        # One after the other is allowed, in any thread, and after an error too.
        pool.submit(fake_codec.encode, clip).result()
        fake_codec.encode(clip)
    api.reconstruct(tmp_path / "ct.nii", tmp_path / "again.nii", codec=fake_codec)
    assert (tmp_path / "out.nii").read_bytes() == (tmp_path / "again.nii").read_bytes()


def test_frame_writers_close_their_lock(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a.nii", "a.nii.gz", "a.zarr", "a.dcm"):
        for _ in range(3):
            write(tmp_path / name, np.full((3, 4, 5), -9))
            writer = create_volume(tmp_path / name, Geometry((5, 4, 3), np.eye(4)))
            assert isinstance(writer, FrameWriter)
            writer.abort()
    assert len(os.listdir("/proc/self/fd")) == before
