"""Memory: bounded by the plan, and the same for a scan of any length. Real runs, real RSS."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from fvae_deploy.bench.worker import in_process
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.make.bundle import memory_lines
from fvae_deploy.parse import parse_bytes
from fvae_deploy.stream.codec import bundle_path
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume

MIB = 1 << 20


def scan(path, shape):
    """A CT of any length, quickly: one noisy slab over and over."""
    x, y, z = shape
    slab = np.random.default_rng(0).integers(-1000, 800, (10, x, y)).astype(np.int16)
    with create_volume(path, Geometry(shape, np.diag([-1.0, -1.0, 2.0, 1.0]))) as writer:
        for start in range(0, z, 10):
            writer.write(slab[: min(10, z - start)])
    return path


def fvae(verb, source, *options):
    """The run report of one verb in a process of its own, and what it said."""
    report = source.parent / "report.json"
    command = [sys.executable, "-m", "fvae_deploy", verb, source, "-q"]
    command += ["--json", report, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(report.read_text()) if done.returncode == 0 else None
    return done, found


def reconstruct(source, *options):
    return fvae("reconstruct", source, "-o", source.parent / "out.nii", "--overwrite", *options)


def beyond(report):
    found = report["memory"]["beyond_baseline_bytes"]
    assert found > 4 << 20, "nothing was measured"
    return found


@pytest.mark.parametrize(("suffix", "side"), [(".nii.gz", 256), (".nii", 96)])
def test_ten_times_the_slices_take_no_more_memory(suffix, side, tmp_path):
    peaks = []
    for slices in (130, 1300):
        source = scan(tmp_path / f"ct{suffix}", (side, side, slices))
        done, report = reconstruct(source)
        assert done.returncode == 0, done.stderr
        assert report["volume"]["slices"] == slices
        peaks.append(report["memory"]["peak_rss_bytes"])
    assert 32 << 20 < peaks[1] <= 1.05 * peaks[0]


def test_ten_times_the_slices_take_no_more_memory_with_a_bound(tmp_path):
    peaks = []
    for slices in (65, 650):
        source, store = scan(tmp_path / "ct.nii", (96, 96, slices)), tmp_path / "z.zarr"
        options = ("-o", store, "--overwrite", "--max-error", "20")
        done, encoded = fvae("encode", source, *options)
        assert done.returncode == 0, done.stderr
        done, decoded = fvae("decode", store, "-o", tmp_path / "out.nii", "--overwrite")
        assert done.returncode == 0, done.stderr
        peaks.append([r["memory"]["peak_rss_bytes"] for r in (encoded, decoded)])
    for before, after in zip(*peaks, strict=True):
        assert 32 << 20 < after <= 1.05 * before


@pytest.mark.parametrize("budget", ["700MiB", "450MiB"])
def test_an_encode_with_a_bound_stays_within_its_budget(budget, tmp_path):
    source = scan(tmp_path / "ct.nii.gz", (512, 512, 14))
    options = ("-o", tmp_path / "z.zarr", "--max-error", "20", "--memory", budget)
    done, report = fvae("encode", source, *options)
    assert done.returncode == 0, done.stderr
    assert beyond(report) <= parse_bytes(budget)


@pytest.mark.parametrize("budget", ["700MiB", "450MiB"])
def test_a_run_stays_within_its_budget(budget, tmp_path):
    done, report = reconstruct(scan(tmp_path / "ct.nii.gz", (512, 512, 14)), "--memory", budget)
    assert done.returncode == 0, done.stderr
    assert beyond(report) <= parse_bytes(budget)
    assert report["plan"]["predicted_bytes"] <= parse_bytes(budget)


def test_a_small_budget_is_met_by_tiles(tmp_path):
    done, report = reconstruct(scan(tmp_path / "ct.nii", (512, 512, 6)), "--memory", "450MiB")
    assert done.returncode == 0, done.stderr
    assert max(report["plan"]["tiles"].values()) > 1


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_what_small_planes_tell_of_a_stage_holds_on_large_ones(direction):
    # On the small ones compiling takes more than the steps: it must not hide how those grow.
    bundle = bundle_path("tiny")
    manifest = Manifest.load(bundle)
    (line,) = memory_lines(bundle, manifest, "openvino", "fp32", direction, (8, 16))
    job = {"task": "stages", "bundle": str(bundle), "engine": "openvino", "precision": "fp32"}
    found = in_process(**job, direction=direction, side=64)[direction]["most"]
    assert found / 1.15 < line.bytes(64 * 64) < 1.3 * found


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_the_least_budget_of_one_direction_is_kept_too(verb, tmp_path):
    source, store = scan(tmp_path / "ct.nii", (256, 256, 10)), tmp_path / "z.zarr"
    assert fvae("encode", source, "-o", store)[0].returncode == 0
    arguments = [source, "-o", tmp_path / "new.zarr"]
    if verb == "decode":
        arguments = [store, "-o", tmp_path / "out.nii"]
    done, _ = fvae(verb, *arguments, "--memory", "1MiB")
    assert done.returncode == 6
    least = re.search(r"at least (\d+ MiB|[\d.]+ GiB)", done.stderr).group(1)
    done, report = fvae(verb, *arguments, "--memory", least)
    assert done.returncode == 0, done.stderr
    assert beyond(report) <= parse_bytes(least)


def test_an_impossible_budget_is_refused_with_the_least_that_would_do(tmp_path):
    source = scan(tmp_path / "ct.nii", (256, 256, 6))
    done, _ = reconstruct(source, "--memory", "50MiB")
    assert done.returncode == 6
    least = re.search(r"at least (\d+ MiB|[\d.]+ GiB)", done.stderr).group(1)
    done, report = reconstruct(source, "--memory", least)
    assert done.returncode == 0, done.stderr
    assert beyond(report) <= parse_bytes(least)


def test_the_peak_of_a_second_run_in_a_process_is_its_own(tmp_path):
    for name, side in (("large", 384), ("small", 48)):
        scan(tmp_path / f"{name}.nii", (side, side, 30))
    code = """
import json, sys, fvae_deploy as fvae
reports = [fvae.reconstruct(f"{sys.argv[1]}/{name}.nii", f"{sys.argv[1]}/out{n}.nii")
           for n, name in enumerate(("small", "large", "small"))]
print(json.dumps([report["memory"] for report in reports]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    first, second, third = (m["beyond_baseline_bytes"] for m in json.loads(run.stdout))
    assert second > 100 * MIB
    assert third < second / 2
    assert third < first + 50 * MIB
