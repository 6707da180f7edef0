"""What was killed is continued, and the bytes are those of a run that nobody disturbed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy import api
from fvae_deploy.errors import LatentError, UsageError, VolumeError
from fvae_deploy.storage.fingerprint import fingerprint_of
from fvae_deploy.storage.latents import partial_path

SHAPE = (96, 96, 330)
FRAMES = 1 + -(-(SHAPE[2] - 1) // 4)
# Whoever runs the tests in the background has Ctrl-C ignored, and children inherit that.
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
LISTEN += "; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # so does nohup with this one
MAIN = f"{LISTEN}; from fvae_deploy.cli.main import main; main()"


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def chunk(store, t):
    return store / "c" / "0" / str(t) / "0" / "0"


def stopped(whole, store, ct):
    """Leave at a store's place what a run on this CT leaves that was killed at its end."""
    left = shutil.copytree(whole, partial_path(store))
    content = json.loads((left / "zarr.json").read_text())
    content["attributes"] |= {"complete": False, "input": fingerprint_of(ct)}
    (left / "zarr.json").write_text(json.dumps(content))
    return left


def start(ct, store, *options):
    arguments = ["encode", str(ct), "-o", str(store), *options]
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], stderr=subprocess.PIPE, text=True
    )


def stop(running, store, frames, number):
    """Send a signal once so many latent frames are there; return exit code and message."""
    until = time.monotonic() + 60
    while not chunk(partial_path(store), frames - 1).exists():
        assert running.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < until
        time.sleep(0.002)
    running.send_signal(number)
    _, message = running.communicate(timeout=60)
    return running.returncode, message


@pytest.fixture(scope="module", params=["causal", "windows"])
def undisturbed(request, write_ct, tmp_path_factory):
    """A CT, the options of its encode, and the store of a run that nobody disturbed."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("undisturbed")
    write_ct(folder / "ct.nii.gz", SHAPE)
    options = {"engine": "openvino", "protocol": request.param}
    api.encode(folder / "ct.nii.gz", folder / "z.zarr", **options)
    return folder / "ct.nii.gz", options, folder / "z.zarr"


@pytest.mark.parametrize("frames", [1, 25])
def test_a_killed_encode_is_resumed_to_the_same_bytes(undisturbed, tmp_path, frames):
    ct, options, whole = undisturbed
    store = tmp_path / "z.zarr"
    flags = [f"--{name}={value}" for name, value in options.items()]
    code, _ = stop(start(ct, store, *flags), store, frames, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not store.exists()
    left = partial_path(store)
    assert frames <= sum(chunk(left, t).exists() for t in range(FRAMES)) < FRAMES
    running = start(ct, store, "--resume", *flags)
    _, message = running.communicate(timeout=100)
    assert running.returncode == 0, message
    assert files(store) == files(whole)
    assert not left.exists()


def test_an_interrupted_encode_says_how_to_go_on_and_does(undisturbed, tmp_path):
    ct, options, whole = undisturbed
    store = tmp_path / "z.zarr"
    flags = [f"--{name}={value}" for name, value in options.items()]
    code, message = stop(start(ct, store, *flags), store, 10, signal.SIGINT)
    assert code == 130
    assert message == "fvae: Interrupted. Run again with --resume to continue.\n"
    assert not store.exists()
    done = []
    api.encode(ct, store, resume=True, progress=done.append, **options)
    assert done[0] >= 33  # slices that were not encoded again
    assert sum(done) == SHAPE[2]
    assert files(store) == files(whole)


@pytest.mark.parametrize("t", [0, 1, 18, 40])
def test_a_damaged_frame_and_all_after_it_are_computed_again(undisturbed, tmp_path, t):
    ct, options, whole = undisturbed
    store = tmp_path / "z.zarr"
    left = stopped(whole, store, ct)
    chunk(left, FRAMES - 1).unlink()
    data = bytearray(chunk(left, t).read_bytes())
    data[20] ^= 1
    chunk(left, t).write_bytes(data)
    done = []
    api.encode(ct, store, resume=True, progress=done.append, **options)
    assert files(store) == files(whole)
    assert sum(done) == SHAPE[2]
    assert len(done) > FRAMES - t


@given(st.integers(2, 150), st.sampled_from(["causal", "windows"]), st.integers(1, 4), st.data())
@settings(max_examples=20)
def test_any_number_of_frames_is_resumed_to_the_same_bytes(
    fake_bundle, write_ct, slices, protocol, k, data
):
    with tempfile.TemporaryDirectory() as name:
        ct, whole, store = Path(name, "ct.nii"), Path(name, "whole.zarr"), Path(name, "z.zarr")
        write_ct(ct, (9, 11, slices))
        options = {"model": fake_bundle, "engine": "fake", "protocol": protocol, "step": k}
        api.encode(ct, whole, **options)
        left = stopped(whole, store, ct)
        frames = len(list((left / "c" / "0").iterdir()))
        for t in range(data.draw(st.integers(0, frames)), frames):
            chunk(left, t).unlink()
        api.encode(ct, store, resume=True, **options)
        assert files(store) == files(whole)


def test_an_interrupted_reconstruct_leaves_only_what_can_be_resumed(undisturbed, tmp_path):
    ct, options, _ = undisturbed
    shutil.copy(ct, tmp_path / "ct.nii.gz")
    out = tmp_path / "out.nii"
    command = [sys.executable, "-c", MAIN, "reconstruct", str(tmp_path / "ct.nii.gz")]
    command += ["-o", str(out), "--engine", options["engine"]]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list(partial_path(out).glob("*.npy"))) < 20:
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    _, message = running.communicate(timeout=60)
    assert running.returncode == 130
    assert message == "fvae: Interrupted. Run again with --resume to continue.\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii.gz", "out.nii.partial"]


def stopped_after(slices):
    """A progress that stops the run, as Ctrl-C does, once so many slices are done."""
    done = []

    def progress(count):
        done.append(count)
        if sum(done) >= slices:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_run_leaves_nothing_and_says_so(tmp_path, number):
    command = [sys.executable, "-c", MAIN, "phantom", "-o", str(tmp_path / "ct.nii")]
    running = subprocess.Popen([*command, "--shape", "512,512,300"], stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".ct.nii.*")):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    _, message = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert message == b"fvae: Interrupted.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_of_two_runs_to_one_output_the_later_is_refused(verb, fake_bundle, write_ct, tmp_path):
    run = getattr(api, verb)
    ct, other, out = tmp_path / "ct.nii", tmp_path / "other.nii", tmp_path / "out.zarr"
    write_ct(ct, (9, 11, 80))
    write_ct(other, (9, 11, 80), seed=1)
    options = {"model": fake_bundle, "engine": "fake", "resume": True}
    refused = []

    def progress(slices):
        with pytest.raises(VolumeError, match="for this run alone, found another") as found:
            run(other, out, **(options | {"resume": bool(len(refused) % 2 or verb != "encode")}))
        refused.append(found)

    run(ct, out, progress=progress, **options)
    assert len(refused) > 10
    run(ct, tmp_path / "whole.zarr", **options)
    assert files(out) == files(tmp_path / "whole.zarr")
    run(other, out, **(options | {"resume": False, "overwrite": True}))  # now it may be replaced


def test_a_run_that_ends_well_removes_what_an_earlier_one_kept(fake_bundle, write_ct, tmp_path):
    ct, out = tmp_path / "ct.nii", tmp_path / "out.nii"
    write_ct(ct, (9, 11, 80))
    options = {"model": fake_bundle, "engine": "fake"}
    with pytest.raises(KeyboardInterrupt):
        api.reconstruct(ct, out, progress=stopped_after(41), **options)
    assert partial_path(out).is_dir()
    api.reconstruct(ct, out, **options)
    assert not partial_path(out).exists()


@given(
    st.integers(2, 150),
    st.sampled_from(["causal", "windows"]),
    st.integers(1, 4),
    st.sampled_from([".nii", ".nii.gz", ".zarr"]),
    st.sampled_from(["int16", "float32"]),
    st.data(),
)
@settings(max_examples=30)
def test_a_volume_stopped_anywhere_and_twice_is_resumed_to_the_same_bytes(
    fake_bundle, write_ct, slices, protocol, k, ending, dtype, data
):
    with tempfile.TemporaryDirectory() as name:
        ct, store = Path(name, "ct.nii"), Path(name, "z.zarr")
        write_ct(ct, (9, 11, slices))
        fake = {"model": fake_bundle, "engine": "fake"}
        api.encode(ct, store, protocol=protocol, step=k, **fake)
        a = data.draw(st.integers(0, slices - 1))
        b = data.draw(st.integers(a + 1, slices))
        runs = {
            "r": (api.reconstruct, ct, slices, {"protocol": protocol, "step": k}),
            "d": (api.decode, store, b - a, {"slices": (a, b)}),
        }
        for verb, (run, source, count, options) in runs.items():
            options |= {"dtype": dtype, **fake}
            whole, out = Path(name, f"whole{verb}{ending}"), Path(name, f"out{verb}{ending}")
            run(source, whole, **options)
            for number in range(2):
                stop = stopped_after(data.draw(st.integers(1, count)))
                with pytest.raises(KeyboardInterrupt):
                    run(source, out, resume=number > 0, progress=stop, **options)
                assert not out.exists()
            done = []
            report = run(source, out, resume=True, progress=done.append, **options)
            assert sum(done) == count
            assert report["volume"]["slices"] == count - done[0]
            assert files(out) == files(whole) if out.is_dir() else same(out, whole)
            assert not partial_path(out).exists()


def same(one, other):
    return one.read_bytes() == other.read_bytes()


def test_a_killed_reconstruct_goes_on_to_the_same_bytes(undisturbed, tmp_path):
    ct, options, _ = undisturbed
    out, whole = tmp_path / "out.nii.gz", tmp_path / "whole.nii.gz"
    api.reconstruct(ct, whole, **options)
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-c", MAIN, "reconstruct", str(ct), "-o", str(out), *flags]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list(partial_path(out).glob("*.npy"))) < 20:
        assert running.poll() is None, "it ended before it could be stopped"
        time.sleep(0.002)
    running.kill()
    running.communicate(timeout=60)
    assert not out.exists()
    done = []
    report = api.reconstruct(ct, out, resume=True, progress=done.append, **options)
    assert done[0] >= 65  # slices that were not computed again
    assert report["volume"]["slices"] == SHAPE[2] - done[0]
    assert same(out, whole)
    assert not partial_path(out).exists()


def test_slices_of_another_input_or_request_are_refused_and_kept(fake_bundle, write_ct, tmp_path):
    ct, other, out = tmp_path / "ct.nii", tmp_path / "other.nii", tmp_path / "out.nii"
    write_ct(ct, (9, 11, 80))
    write_ct(other, (9, 11, 80), seed=1)
    options = {"model": fake_bundle, "engine": "fake", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        api.reconstruct(ct, out, progress=stopped_after(41), **options)
    before = files(partial_path(out))
    with pytest.raises(UsageError, match=r"changed since .*\(\d+ bytes in 1 files, .* now \d+"):
        api.reconstruct(other, out, **options)
    with pytest.raises(UsageError, match=r"found protocol 'causal' instead of 'windows'"):
        api.reconstruct(ct, out, protocol="windows", **options)
    with pytest.raises(UsageError, match=r"found dtype 'int16' instead of 'float32'"):
        api.reconstruct(ct, out, dtype="float32", **options)
    api.encode(ct, tmp_path / "z.zarr", model=fake_bundle, engine="fake")
    with pytest.raises(UsageError, match=r"found command 'reconstruct' instead of 'decode'"):
        api.decode(tmp_path / "z.zarr", out, **options)
    assert files(partial_path(out)) == before
    assert not out.exists()


def test_a_damaged_slab_and_all_after_it_are_computed_again(fake_bundle, write_ct, tmp_path):
    ct, out, whole = (tmp_path / name for name in ("ct.nii", "out.nii", "whole.nii"))
    write_ct(ct, (9, 11, 80))
    options = {"model": fake_bundle, "engine": "fake"}
    api.reconstruct(ct, whole, **options)
    with pytest.raises(KeyboardInterrupt):
        api.reconstruct(ct, out, resume=True, progress=stopped_after(41), **options)
    (partial_path(out) / "slab3.npy").write_bytes(b"")
    done = []
    api.reconstruct(ct, out, resume=True, progress=done.append, **options)
    assert done[0] == 9  # slices of steps 0, 1 and 2
    assert same(out, whole)


@pytest.mark.parametrize(
    ("hu", "words"),
    [
        pytest.param(np.nan, "NaN", id="fails at once"),
        pytest.param(100, "any-range", id="no CT, as the last slice shows"),
    ],
)
def test_a_reconstruct_of_a_bad_volume_leaves_nothing_to_resume(fake_bundle, tmp_path, hu, words):
    volume = nibabel.Nifti1Image(np.full((9, 11, 30), hu, np.float32), np.eye(4))
    volume.to_filename(tmp_path / "bad.nii")
    options = {"model": fake_bundle, "engine": "fake", "resume": True}
    for _ in range(2):
        with pytest.raises(VolumeError, match=words):
            api.reconstruct(tmp_path / "bad.nii", tmp_path / "out.nii", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["bad.nii"]


@pytest.fixture
def left(undisturbed, tmp_path):
    """What a stopped run left: the first half of the frames."""
    ct, _, whole = undisturbed
    store = tmp_path / "z.zarr"
    stopped(whole, store, ct)
    for t in range(FRAMES // 2, FRAMES):
        chunk(partial_path(store), t).unlink()
    return store


@pytest.mark.parametrize(
    ("other", "words"),
    [
        pytest.param({"protocol": "windows"}, "protocol 'causal' instead of", id="protocol"),
        pytest.param({"step": 2}, "--step 1 instead of 2", id="step"),
        pytest.param({"engine": "torch"}, "engine 'openvino' instead of", id="engine"),
        pytest.param({"engine": "torch", "precision": "bf16"}, "engine", id="precision"),
        pytest.param({"engine": "fake", "model": "fake"}, "model 'tiny' instead of", id="model"),
        pytest.param({"ct": (96, 96, 331)}, "slices 330 instead of 331", id="number of slices"),
        pytest.param({"ct": (96, 95, 330)}, "shape", id="plane"),
    ],
)
@pytest.mark.parametrize("undisturbed", ["causal"], indirect=True)
def test_what_another_run_left_is_refused_and_kept(
    undisturbed, left, tmp_path, write_ct, fake_bundle, other, words
):
    ct, options, _ = undisturbed
    options = options | {name: value for name, value in other.items() if name != "ct"}
    if "ct" in other:
        ct = tmp_path / "other.nii"
        write_ct(ct, other["ct"])
    if options["engine"] == "torch":
        pytest.importorskip("safetensors", reason="needs the export extra")
    if "model" in options:
        options["model"] = fake_bundle
    before = files(partial_path(left))
    with pytest.raises(LatentError, match=f"{words}.*without --resume"):
        api.encode(ct, left, resume=True, **options)
    assert files(partial_path(left)) == before
    assert not left.exists()


@pytest.mark.parametrize("undisturbed", ["causal"], indirect=True)
def test_what_another_scan_of_the_same_geometry_left_is_refused_and_kept(
    undisturbed, left, tmp_path, write_ct
):
    _, options, _ = undisturbed
    write_ct(tmp_path / "other.nii.gz", SHAPE, seed=1)
    before = files(partial_path(left))
    with pytest.raises(LatentError, match=r"found an input that changed since.*without --resume"):
        api.encode(tmp_path / "other.nii.gz", left, resume=True, **options)
    assert files(partial_path(left)) == before
    assert not left.exists()


@pytest.mark.parametrize("undisturbed", ["causal"], indirect=True)
def test_a_damaged_ct_does_not_cost_what_an_earlier_run_left(undisturbed, left, tmp_path):
    ct, options, whole = undisturbed
    data = ct.read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(data[: 3 * len(data) // 4])
    with pytest.raises(LatentError, match="found an input that changed since"):
        api.encode(tmp_path / "cut.nii.gz", left, resume=True, **options)
    api.encode(ct, left, resume=True, **options)
    assert files(left) == files(whole)


def test_a_file_in_the_place_of_a_partial_output_is_kept(fake_bundle, write_ct, tmp_path):
    write_ct(tmp_path / "ct.nii", (9, 11, 8))
    (tmp_path / "out.nii.partial").write_text("precious")
    with pytest.raises(VolumeError, match="found something else at"):
        api.reconstruct(tmp_path / "ct.nii", tmp_path / "out.nii", model=fake_bundle, engine="fake")
    assert (tmp_path / "out.nii.partial").read_text() == "precious"


def test_to_resume_what_never_began_is_to_begin(undisturbed, tmp_path):
    ct, options, whole = undisturbed
    api.encode(ct, tmp_path / "z.zarr", resume=True, **options)
    assert files(tmp_path / "z.zarr") == files(whole)
