"""Many scans through one engine: found, run, failed, resumed; and on Ray, with a worker killed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from dicom_series import put, series, write_series

import fvae_deploy as fvae
from fvae_deploy.batch.run import run_scans
from fvae_deploy.batch.scans import find_scans, is_batch, search
from fvae_deploy.errors import UsageError
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.base import Primed
from fvae_deploy.volume.open import open_volume


@pytest.fixture
def scans(write_ct, tmp_path):
    """A folder in BIDS's layout, one in none, a DICOM series, and what is no scan."""
    folder = tmp_path / "scans"
    for n, name in enumerate(("sub-01/ct/sub-01_ct.nii.gz", "sub-02/ct/sub-02_ct.nii", "c.zarr")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_ct(folder / name, (20, 13, 9 + n), seed=n)
    write_series(folder / "patient3", (16, 24, 5))
    (folder / "participants.tsv").write_text("participant_id\n")
    return folder


@pytest.fixture
def fake(fake_bundle):
    return RunOptions(model=str(fake_bundle), engine="fake")


def command(*arguments):
    line = [sys.executable, "-m", "fvae_deploy", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def content(folder):
    """Bytes of all files that are results."""
    files = (path for path in folder.rglob("*") if path.is_file() and "fvae-" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_folder_is_searched_and_its_layout_kept(scans, tmp_path):
    found = find_scans("encode", scans, tmp_path / "out", ".zarr")
    named = {
        str(s.source.relative_to(scans)): str(s.output.relative_to(tmp_path / "out")) for s in found
    }
    assert named == {
        "c.zarr": "c.zarr",
        "patient3": "patient3.zarr",
        "sub-01/ct/sub-01_ct.nii.gz": "sub-01/ct/sub-01_ct.zarr",
        "sub-02/ct/sub-02_ct.nii": "sub-02/ct/sub-02_ct.zarr",
    }


def test_zarr_stores_are_known_by_their_files_too(tmp_path):
    folder, out = tmp_path / "scans", tmp_path / "out"
    zarr.create_group(str(folder / "a.ZARR")).create_array("0", data=np.zeros((3, 3, 3)))
    zarr.create_array(str(folder / "sub" / "b"), data=np.zeros((3, 3, 3)), zarr_format=2)
    for name in ("c.zarr.zip", "d.ozx"):
        (folder / name).write_bytes(b"")
    (folder / "sub" / "e").mkdir()
    found = find_scans("encode", folder, out, ".zarr")
    outputs = {str(s.source.relative_to(folder)): str(s.output.relative_to(out)) for s in found}
    assert outputs == {
        "a.ZARR": "a.zarr",
        "c.zarr.zip": "c.zarr",
        "d.ozx": "d.zarr",
        "sub/b": "sub/b.zarr",
    }
    assert is_batch(folder, out)
    for single in ("a.ZARR", "a.ZARR/0", "sub/b", "c.zarr.zip"):
        assert not is_batch(folder / single, out)


def test_results_within_the_folder_are_no_scans(scans, fake):
    again = dataclasses.replace(fake, overwrite=True)
    for options in (fake, again):
        found = find_scans("reconstruct", scans, scans / "out", ".nii")
        assert len(found) == 4
        assert [r.error for r in run_scans("reconstruct", found, options)] == 4 * [None]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "ct\n", "DICOM in .*a.csv, found none"),
        ("a.csv", "ct,voxels\na.nii,1\n", "columns among ct, output, series"),
        ("a.csv", "mask\na.nii\n", "a ct in row 1"),
        ("a.jsonl", '{"ct": "x/a.nii"}\n{"ct": "y/a.nii"}\n', "rows 1 and 2"),
        ("a.jsonl", '{"ct": "a.nii", "output": "a.txt"}\n', "output ending in"),
        ("a.jsonl", '{"ct": \n', "CSV or JSONL"),
    ],
)
def test_a_list_that_is_none_is_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        find_scans("encode", tmp_path / name, tmp_path / "out", ".nii")


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_many_are_what_each_is_by_itself(verb, scans, fake, fake_bundle, tmp_path):
    ending = ".zarr" if verb == "encode" else ".nii.gz"
    found = find_scans("encode", scans, tmp_path / "out", ending)
    results = run_scans(verb, found, fake)
    assert [set(result.to_dict()) for result in results] == 4 * [{"input", "output", "report"}]
    for n, scan in enumerate(found):
        alone = tmp_path / f"alone{n}{ending}"
        getattr(fvae, verb)(scan.source, alone, model=fake_bundle, engine="fake")
        if verb == "encode":
            assert content(alone) == content(scan.output)
        else:
            assert alone.read_bytes() == scan.output.read_bytes()


def test_one_that_fails_is_told_and_passed_and_the_rest_resumed(scans, fake_bundle, tmp_path):
    (scans / "b.nii.gz").write_bytes(b"no volume")
    out = tmp_path / "out"
    line = ["reconstruct", scans, "-o", out, "-m", fake_bundle, "-e", "fake"]
    done = command(*line)
    assert done.returncode == 3
    assert "expected 5 results, found 1 failed" in done.stderr
    assert "4 done, 0 skipped, 1 failed" in done.stdout
    first = content(out)
    found = json.loads((out / "fvae-reconstruct.json").read_text())
    assert (found["done"], found["failed"], found["slices"]) == (4, 1, 9 + 10 + 11 + 5)
    (out / "c.nii.gz").unlink()
    (scans / "b.nii.gz").unlink()
    done = command(*line, "--resume", "--json", tmp_path / "again.json", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = json.loads((tmp_path / "again.json").read_text())
    assert (found["done"], found["skipped"], found["failed"]) == (1, 3, 0)
    assert content(out) == first


def test_a_full_disk_within_one_is_that_ones_failure(scans, fake, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        if calls.append(1) or len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    calls, real = [], fvae.api.encode
    monkeypatch.setattr(fvae.api, "encode", full)
    found = run_scans("encode", find_scans("encode", scans, tmp_path / "out", ".zarr"), fake)
    assert [one.error is not None for one in found] == [False, True, False, False]
    assert (found[1].error_kind, "No space left" in found[1].error) == ("OSError", True)


def test_latents_of_another_run_are_not_passed_and_earlier_reports_stay(
    scans, fake_bundle, tmp_path
):
    line = ["encode", scans, "-o", tmp_path / "out", "-m", fake_bundle, "-e", "fake", "-q"]
    assert command(*line).returncode == 0
    noted = json.loads((tmp_path / "out" / "fvae-encode.json").read_text())
    assert command(*line, "--resume").returncode == 0
    again = json.loads((tmp_path / "out" / "fvae-encode.json").read_text())
    assert [one["earlier"] for one in again["scans"]] == [one["report"] for one in noted["scans"]]
    other = command(*line, "--resume", "--protocol", "windows")
    assert other.returncode == 3
    assert "protocol 'causal' instead of 'windows'" in other.stderr
    assert command(*line, "--resume").returncode == 0


def test_capital_endings_are_endings(write_ct, fake, tmp_path):
    write_ct(tmp_path / "a.nii.gz", (9, 11, 5))
    (tmp_path / "scans").mkdir()
    (tmp_path / "a.nii.gz").rename(tmp_path / "scans" / "A.NII.GZ")
    (found,) = run_scans(
        "encode", find_scans("encode", tmp_path / "scans", tmp_path / "out", ".zarr"), fake
    )
    assert found.report["volume"]["slices"] == 5
    assert (tmp_path / "out" / "A.zarr").is_dir()


def test_a_link_back_is_not_followed(scans, tmp_path):
    before = find_scans("encode", scans, tmp_path / "out", ".zarr")
    (scans / "sub-01" / "back").symlink_to(scans)
    (scans / "here").symlink_to(".")
    assert find_scans("encode", scans, tmp_path / "out", ".zarr") == before


def test_a_list_names_outputs_and_series(scans, fake_bundle, tmp_path):
    (scans / "list.csv").write_text("ct,output\nsub-02/ct/sub-02_ct.nii,a/b.zarr\npatient3,\n")
    line = ["encode", scans / "list.csv", "-o", tmp_path / "out", "-m", fake_bundle, "-e", "fake"]
    assert command(*line, "-q").returncode == 0
    stores = sorted(path.name for path in (tmp_path / "out").rglob("*.zarr"))
    assert stores == ["b.zarr", "patient3.zarr"]


def test_a_codec_that_stays_open_gives_the_same_on_other_sizes(write_ct, tmp_path):
    pytest.importorskip("openvino")
    for name, shape in (("a", (24, 16, 9)), ("b", (40, 32, 6))):
        write_ct(tmp_path / f"{name}.nii", shape)
    with fvae.open_codec("tiny") as codec:
        for n, name in enumerate("aba"):
            fvae.reconstruct(tmp_path / f"{name}.nii", tmp_path / f"{n}.out.nii", codec=codec)
    for n, name in enumerate("ab"):
        fvae.reconstruct(tmp_path / f"{name}.nii", tmp_path / "alone.nii", overwrite=True)
        assert (tmp_path / f"{n}.out.nii").read_bytes() == (tmp_path / "alone.nii").read_bytes()
    assert (tmp_path / "2.out.nii").read_bytes() == (tmp_path / "0.out.nii").read_bytes()


@pytest.mark.parametrize("depths", [(1, 4), (3,), (30,), (8, 1)])
@pytest.mark.parametrize("start", [0, 5])
def test_a_primed_reader_gives_what_the_reader_gives(depths, start, write_ct, tmp_path):
    write_ct(tmp_path / "ct.nii.gz", (6, 5, 19))
    plain, primed = open_volume(tmp_path / "ct.nii.gz"), Primed(open_volume(tmp_path / "ct.nii.gz"))
    for _ in range(2):  # once with what it holds, once without
        pairs = zip(
            plain.slabs(*depths, start=start), primed.slabs(*depths, start=start), strict=True
        )
        for wanted, found in pairs:
            np.testing.assert_array_equal(found, wanted)
    primed.close()


def untaken(scans, tmp_path):
    """What is not taken from a folder: whether the batch fails by it, and why."""
    _, found = search("encode", scans, tmp_path / "out", ".zarr")
    return {str(one.path.relative_to(scans)): (one.fails, one.reason) for one in found}


def test_all_that_is_not_taken_is_listed_with_a_reason(scans, fake_bundle, tmp_path):
    (scans / "preview.jpg").write_bytes(b"x")
    (scans / "sub-01" / "ct" / "seg.mgz").write_bytes(b"x")
    (scans / "patient3" / "notes.txt").write_text("x")  # the reader counts it
    found = untaken(scans, tmp_path)
    assert found == {
        "participants.tsv": (False, "it is no volume"),
        "preview.jpg": (False, "it is a picture, without HU and positions"),
        "sub-01/ct/seg.mgz": (False, "fvae does not read .mgz files here"),
    }
    line = ["encode", scans, "-o", tmp_path / "out", "-m", fake_bundle, "-e", "fake"]
    done = command(*line)
    assert done.returncode == 0, done.stderr
    assert "preview.jpg" in done.stdout
    report = json.loads((tmp_path / "out" / "fvae-encode.json").read_text())
    reasons = {one["input"]: one["reason"] for one in report["not_taken"]}
    assert reasons[str(scans / "preview.jpg")] == "it is a picture, without HU and positions"
    (remark,) = next(s for s in report["scans"] if "patient3" in s["input"])["report"]["remarks"]
    assert remark == "Passed over: 1 file of another kind."


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("p4.mgz", "fvae does not read .mgz", id="another format"),
        pytest.param("p4/ct/p4.mnc", "fvae does not read .mnc", id="another format below"),
        pytest.param("p4/IM0001", "1 files named like DICOM slices cannot be read", id="a slice"),
        pytest.param("p4.dcm", "1 files named like DICOM slices cannot be read", id="a file"),
    ],
)
def test_an_image_that_should_have_been_a_scan_makes_the_batch_fail(
    scans, fake_bundle, tmp_path, name, reason
):
    (scans / name).parent.mkdir(parents=True, exist_ok=True)
    (scans / name).write_bytes(b"<html>" * 90)
    out = tmp_path / "out"
    line = ["encode", scans, "-o", out, "-m", fake_bundle, "-e", "fake"]
    done = command(*line)
    assert done.returncode == 3
    assert "expected every image to be a scan that can be read, found 1 not taken" in done.stderr
    assert reason in done.stderr
    assert len(json.loads((out / "fvae-encode.json").read_text())["scans"]) == 4
    done = command(*line, "--dry-run", "--overwrite")
    assert done.returncode == 3


@pytest.mark.parametrize(
    "content", [{"a.jpg": b"x"}, {"a.mgz": b"x"}, {"p/1.dcm": b"", "p/2.dcm": b""}]
)
def test_a_folder_of_images_that_are_not_read_is_no_success(tmp_path, content):
    for name, data in content.items():
        (tmp_path / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scans" / name).write_bytes(data)
    with pytest.raises(UsageError, match=r"found none among 1 others, first .*scans"):
        find_scans("encode", tmp_path / "scans", tmp_path / "out", ".zarr")


@pytest.mark.parametrize("data", [b"", b"<html>" * 90])
def test_a_cut_slice_makes_its_scan_fail_and_the_others_go_on(scans, fake, tmp_path, data):
    (scans / "patient3" / "IM0001").write_bytes(data)
    found, _ = search("encode", scans, tmp_path / "out", ".zarr")
    results = run_scans("encode", found, fake)
    assert [r.scan.source.name for r in results if r.error] == ["patient3"]
    assert "IM0001" in next(r.error for r in results if r.error)
    passed = run_scans(
        "encode", found, dataclasses.replace(fake, resume=True, skip_unreadable=True)
    )
    assert not [r.error for r in passed if r.error]


def test_a_series_over_two_folders_is_never_half_a_scan(tmp_path):
    scans = tmp_path / "scans"
    for k in range(8):
        place = scans / "p1" / str(k // 4)
        place.mkdir(parents=True, exist_ok=True)
        put(place / f"{k}", k)
    series(scans / "p2" / "a", SeriesInstanceUID="1.2.2")
    series(scans / "p3" / "copy", SeriesInstanceUID="1.2.2")  # the same slices: a scan of its own
    found, others = search("encode", scans, tmp_path / "out", ".zarr")
    assert [scan.source for scan in found] == [scans / "p2" / "a", scans / "p3" / "copy"]
    assert [one.path for one in others if one.fails] == [scans / "p1" / "0", scans / "p1" / "1"]
    assert f"give {scans / 'p1'} alone, --series 1.2.840.1111" in others[0].reason


def test_a_series_within_the_folder_of_another_is_a_scan_too(tmp_path, fake):
    scans = tmp_path / "scans"
    series(scans / "p", 4)
    series(scans / "p" / "late", 5, SeriesInstanceUID="1.2.2")
    (scans / "p" / "more").mkdir()
    put(scans / "p" / "more" / "x", 4)
    found, others = search("encode", scans, tmp_path / "out", ".zarr")
    assert [(scan.source.name, scan.series) for scan in found] == [
        ("p", "1.2.840.1111"),
        ("late", None),
    ]
    assert [(one.path.name, one.fails) for one in others] == [("more", False)]
    results = run_scans("encode", found, fake)
    assert [r.report["volume"]["slices"] for r in results] == [5, 5]


def test_archives_of_dicom_are_scans(tmp_path, fake):
    scans = tmp_path / "scans"
    for name, kind, extension in (("a", "zip", ".zip"), ("b", "gztar", ".tar.gz")):
        write_series(tmp_path / name, (16, 24, 5))
        scans.mkdir(exist_ok=True)
        shutil.move(
            shutil.make_archive(tmp_path / f"x{name}", kind, tmp_path / name),
            scans / f"{name}{extension}",
        )
    with zipfile.ZipFile(scans / "code.zip", "w") as packed:
        packed.writestr("main.py", "pass")
    found, others = search("encode", scans, tmp_path / "out", ".zarr")
    assert [scan.output.name for scan in found] == ["a.zarr", "b.zarr"]
    assert [one.path.name for one in others] == ["code.zip"]
    assert not [r.error for r in run_scans("encode", found, fake) if r.error]


@pytest.mark.e2e  # Ray takes half a minute of a busy machine to come up
def test_ray_with_a_worker_killed_makes_the_same_bytes(write_ct, fake_bundle, tmp_path):
    pytest.importorskip("ray")
    folder = tmp_path / "scans"
    folder.mkdir()
    for n in range(6):
        write_ct(folder / f"{n}.nii.gz", (48, 48, 120), seed=n)
    line = ["-m", fake_bundle, "-e", "fake", "-q"]
    assert command("encode", folder, "-o", tmp_path / "one", *line).returncode == 0
    killed = []

    def kill():
        """Kill the first worker that is computing."""
        while not killed and not stop.is_set():
            workers = [pid for pid in map(str, Path("/proc").glob("[0-9]*")) if is_worker(pid)]
            if workers and any((tmp_path / "ray").glob("*.partial")):
                os.kill(int(workers[0].rsplit("/", 1)[1]), signal.SIGKILL)
                killed.append(workers[0])
            time.sleep(0.005)

    stop = threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    done = command("encode", folder, "-o", tmp_path / "ray", "--ray", "local:2", *line)
    stop.set()
    thread.join()
    assert done.returncode == 0, done.stderr
    assert killed
    assert content(tmp_path / "ray") == content(tmp_path / "one")
    again = command("encode", folder, "-o", tmp_path / "ray", "--ray", "local:2", *line)
    assert again.returncode == 3
    assert "expected 6 results, found 6 failed" in again.stderr
    assert "--overwrite" in again.stderr
    assert content(tmp_path / "ray") == content(tmp_path / "one")


def is_worker(folder):
    try:
        return (Path(folder) / "cmdline").read_bytes().startswith(b"ray::Worker.run")
    except OSError:
        return False


@pytest.mark.parametrize("name", ["scans", "cohort.dcm", "cohort.nii", "cohort.zarr"])
def test_what_a_folder_holds_decides_and_not_its_name(fake_bundle, write_ct, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    fake = ["-m", fake_bundle, "-e", "fake"]
    write_ct(folder / "a.nii.gz", (16, 24, 5))
    one = command("reconstruct", folder, "-o", tmp_path / "one.nii", *fake)
    assert one.returncode == (0 if name != "cohort.zarr" else 3), one.stderr
    if name == "cohort.zarr":  # a name that promises a store; what is there is none
        assert "expected a Zarr store" in one.stderr
        return
    write_ct(folder / "b.nii.gz", (16, 24, 5))
    two = command("reconstruct", folder, "-o", tmp_path / "two.nii", *fake)
    assert two.returncode == 2
    assert "found 2 in" in two.stderr
    both = command("reconstruct", folder, "-o", tmp_path / "both", *fake)
    assert both.returncode == 0, both.stderr
    assert {p.name for p in (tmp_path / "both").glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz"}


def test_a_dicom_folder_of_any_name_and_its_directory_are_one_scan(fake_bundle, tmp_path):
    series = tmp_path / "study.nii"
    write_series(series, (16, 24, 5))
    fake = ["-m", fake_bundle, "-e", "fake"]
    for number, source in enumerate((series, tmp_path)):
        found = command("reconstruct", source, "-o", tmp_path / f"r{number}.mha", *fake)
        assert found.returncode == 0, found.stderr
