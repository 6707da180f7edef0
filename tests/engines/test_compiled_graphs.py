"""The cache of compiled graphs: it saves compiling, and never changes a result."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("openvino", reason="needs the cpu extra")

from fvae_deploy.engines import compiled, open_vino
from fvae_deploy.engines.compiled import BEGUN, SUFFIX, CompiledGraphs
from fvae_deploy.stream.codec import open_codec

CLIP = np.random.default_rng(0).random((1, 9, 24, 16), np.float32) - 0.5
PARTS = 4  # graphs of the small network: first and step, encode and decode


def run(bundle, **options):
    with open_codec(bundle, engine="openvino", **options) as codec:
        z = codec.encode(CLIP)
        return z, codec.decode(z)


def refuse(*arguments):
    raise AssertionError("compiled although the cache has the graph")


@pytest.fixture
def expected(small_bundle):
    """Results without the cache, which the tests' environment switches off."""
    return run(small_bundle)


@pytest.fixture
def folder(monkeypatch, tmp_path, expected):
    """The cache, switched on."""
    monkeypatch.setenv("FVAE_COMPILED", "on")
    monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/compiled"


def same(result, expected):
    for found, wanted in zip(result, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_second_run_compiles_nothing_and_gives_the_same_bits(
    small_bundle, folder, expected, monkeypatch
):
    same(run(small_bundle), expected)
    assert len(list(folder.iterdir())) == PARTS
    monkeypatch.setattr(open_vino.OpenVINOEngine, "_compile_anew", refuse)
    same(run(small_bundle), expected)


def test_what_a_graph_depends_on_is_in_its_key(small_bundle, folder, expected, monkeypatch):
    run(small_bundle)
    for count, (name, value) in enumerate(
        [
            ("__version__", "0"),
            ("processor", lambda: "another"),
            ("CODE", ("base.py",)),
        ],
        2,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(open_vino, name, value)
            same(run(small_bundle), expected)
        assert len(list(folder.iterdir())) == count * PARTS, name
    with monkeypatch.context() as patch:
        patch.setattr(open_vino.ov, "get_version", lambda: "another")
        same(run(small_bundle), expected)
    assert len(list(folder.iterdir())) == 5 * PARTS
    run(small_bundle, threads=1)
    assert len(list(folder.iterdir())) == 6 * PARTS
    with open_codec(small_bundle, engine="openvino") as codec:
        codec.encode(CLIP[:, :, :16])
    assert len(list(folder.iterdir())) == 6 * PARTS + 2


def test_another_precision_takes_graphs_of_its_own(small_bundle, folder, expected, monkeypatch):
    if "bf16" not in open_vino.precisions():
        pytest.skip("this CPU does not compute in bf16")
    run(small_bundle)
    first = run(small_bundle, precision="bf16")
    assert np.abs(first[1] - expected[1]).max() > 1e-5
    assert len(list(folder.iterdir())) == 2 * PARTS
    monkeypatch.setattr(open_vino.OpenVINOEngine, "_compile_anew", refuse)
    same(run(small_bundle, precision="bf16"), first)
    same(run(small_bundle), expected)


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "no graph"])
def test_a_damaged_file_is_compiled_anew_and_replaced(
    small_bundle, folder, expected, damage, monkeypatch
):
    run(small_bundle)
    good = {path: path.read_bytes() for path in folder.iterdir()}
    for path, content in good.items():
        if damage == "a bit":
            middle = len(content) // 2
            changed = bytes([content[middle] ^ 1])
            path.write_bytes(content[:middle] + changed + content[middle + 1 :])
        elif damage == "no graph":  # whole, but OpenVINO cannot read it
            rest = b'{"depths": {}}\nno graph'
            path.write_bytes(hashlib.sha256(rest).digest() + rest)
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    same(run(small_bundle), expected)
    assert set(folder.iterdir()) == set(good)
    monkeypatch.setattr(open_vino.OpenVINOEngine, "_compile_anew", refuse)
    same(run(small_bundle), expected)


def test_a_folder_that_cannot_be_made_does_no_harm(small_bundle, folder, expected):
    folder.parent.write_text("a file where the folder should be")
    same(run(small_bundle), expected)
    assert folder.parent.read_text() == "a file where the folder should be"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_does_no_harm(small_bundle, folder, expected):
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    same(run(small_bundle), expected)
    assert list(folder.iterdir()) == []


def test_a_full_disk_does_no_harm_and_leaves_nothing(small_bundle, folder, expected):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        same(run(small_bundle), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == []


def test_two_processes_at_once_share_the_folder(folder, tmp_path, write_ct):
    write_ct(tmp_path / "ct.nii", (16, 24, 9))
    command = [sys.executable, "-m", "fvae_deploy", "reconstruct", str(tmp_path / "ct.nii"), "-q"]
    outputs = [tmp_path / f"{number}.nii" for number in range(3)]
    both = [subprocess.Popen([*command, "-o", str(path)]) for path in outputs[:2]]
    assert [process.wait() for process in both] == [0, 0]
    assert [path.suffix for path in folder.iterdir()] == [SUFFIX] * PARTS
    off = {**os.environ, "FVAE_COMPILED": "off"}
    subprocess.run([*command, "-o", str(outputs[2])], env=off, check=True)
    assert len({path.read_bytes() for path in outputs}) == 1


def test_it_can_be_switched_off(small_bundle, folder, expected, monkeypatch):
    for value in ("off", "OFF", "0", "no", "false"):
        monkeypatch.setenv("FVAE_COMPILED", value)
        same(run(small_bundle), expected)
    assert not folder.exists()


def test_graphs_of_large_networks_are_not_kept(small_bundle, folder, expected, monkeypatch):
    weights = (small_bundle / "weights.safetensors").stat().st_size
    monkeypatch.setattr(open_vino, "SMALL", weights - 1)
    same(run(small_bundle), expected)
    assert not folder.exists()


def test_files_that_were_not_used_for_long_make_room(tmp_path):
    graphs = CompiledGraphs(tmp_path, limit=3500)
    for number in range(3):
        graphs.store({"n": number}, {}, lambda: bytes(1000))
        path = graphs._path({"n": number})
        os.utime(path, (time.time() - 100 + number,) * 2)
    assert graphs.load({"n": 0}) is not None  # used last
    graphs.store({"n": 3}, {}, lambda: bytes(1000))
    assert [graphs.load({"n": n}) is not None for n in range(4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3500


def test_files_of_processes_that_died_are_deleted(tmp_path):
    old, new = tmp_path / f"old{BEGUN}", tmp_path / f"new{BEGUN}"
    for path, age in ((old, 2 * compiled.ABANDONED), (new, 0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    CompiledGraphs(tmp_path).store({}, {}, bytes)
    assert not old.exists()
    assert new.exists()
