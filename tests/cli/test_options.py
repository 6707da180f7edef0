"""Options that many verbs share: overwrite, resume, dry run, reports, environment, batch mode."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from fvae_deploy.errors import UsageError
from fvae_deploy.storage.latents import partial_path
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.open import open_volume


def voxels(path):
    return np.concatenate([*open_volume(path).slabs(16)])


@pytest.fixture
def store(fvae, fake, ct, tmp_path):
    assert fvae("encode", ct, "-o", tmp_path / "z.zarr", *fake)[0] == 0
    return tmp_path / "z.zarr"


def content(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return {str(file): file.read_bytes() for file in sorted(files) if file.is_file()}


@pytest.mark.parametrize("verb", ["encode", "decode", "reconstruct", "compare", "phantom"])
def test_an_output_that_exists_is_kept_unless_overwrite_is_given(
    fvae, fake, ct, store, tmp_path, verb
):
    output = tmp_path / {"encode": "o.zarr", "compare": "o.png"}.get(verb, "o.nii")
    command = {
        "encode": ["encode", ct, "-o", output, *fake],
        "decode": ["decode", store, "-o", output, *fake],
        "reconstruct": ["reconstruct", ct, "-o", output, *fake],
        "compare": ["compare", ct, ct, "--png", output],
        "phantom": ["phantom", "-o", output, "--shape", "16,16,8"],
    }[verb]
    assert fvae(*command)[0] == 0
    before = content(output)
    code, _, err = fvae(*command)
    assert (code, err.count("\n")) == (3, 1)
    assert f"found that {output} exists: choose another name or pass --overwrite" in err
    assert content(output) == before
    assert fvae(*command, "--overwrite")[0] == 0
    assert content(output) == before  # the same bytes, written again


@pytest.mark.parametrize("verb", ["encode", "decode", "reconstruct"])
def test_resume_skips_an_output_that_exists(fvae, fake, ct, store, tmp_path, verb):
    output = tmp_path / ("o.zarr" if verb == "encode" else "o.nii")
    source = store if verb == "decode" else ct
    command = [verb, source, "-o", output, *fake, "--resume"]
    assert fvae(*command)[0] == 0
    before = output.stat().st_mtime_ns
    code, out, err = fvae(*command, "--json", tmp_path / "r.json")
    assert (code, out, err) == (0, f"{output} exists: skipped\n", "")
    assert json.loads((tmp_path / "r.json").read_text())["skipped"] is True
    assert output.stat().st_mtime_ns == before
    code, _, err = fvae(*command, "--overwrite")
    assert code == 2
    assert "either --resume or --overwrite, found both" in err


def test_resume_does_not_accept_latents_of_other_options(fvae, fake, ct, store):
    code, _, err = fvae("encode", ct, "-o", store, *fake, "--resume", "--protocol", "windows")
    assert code == 3
    assert "protocol 'causal' instead of 'windows'" in err


@pytest.mark.parametrize("verb", ["encode", "decode", "reconstruct"])
def test_a_dry_run_shows_the_plan_and_writes_nothing(fvae, fake, ct, store, tmp_path, verb):
    output = tmp_path / ("o.zarr" if verb == "encode" else "o.nii")
    source = store if verb == "decode" else ct
    before = content(tmp_path)
    code, out, err = fvae(verb, source, "-o", output, *fake, "--dry-run", "--memory", "1GiB")
    assert (code, err) == (0, "")
    for words in ("20x13x30 voxels", "tiles:", "predicted memory:", "of 1.00 GiB", "100 GFLOP/s"):
        assert words in out
    assert content(tmp_path) == before
    code, out, _ = fvae(verb, source, "-o", output, *fake, "--dry-run", "--json", "-", "-q")
    plan = json.loads(out)
    assert plan["dry_run"] is True
    assert plan["plan"]["predicted_bytes"] > 0
    assert fvae(verb, source, "-o", output, *fake, "--dry-run", "--memory", "1MiB")[0] == 6


def test_the_plan_of_a_dry_run_is_that_of_the_run(fvae, fake, ct, tmp_path):
    command = [
        "reconstruct",
        ct,
        "-o",
        tmp_path / "o.nii",
        *fake,
        "--memory",
        "1GiB",
        "--json",
        "-",
    ]
    plan = json.loads(fvae(*command, "--dry-run")[1])["plan"]
    assert json.loads(fvae(*command)[1])["plan"] == plan


def test_a_report_on_stdout_leaves_stdout_to_it(fvae, fake, ct, tmp_path):
    code, out, err = fvae("reconstruct", ct, "-o", tmp_path / "o.nii", *fake, "--json", "-")
    assert code == 0
    assert json.loads(out)["command"] == "reconstruct"
    assert "30 slices of 20x13" in err  # the summary for people


def test_verbose_logs_engine_and_plan_to_stderr(fvae, fake, ct, tmp_path):
    code, _, err = fvae("encode", ct, "-o", tmp_path / "o.zarr", *fake, "--verbose")
    assert code == 0
    assert "engine: fake fp32 on cpu (asked for)" in err
    assert "plan: encode whole" in err


def test_environment_variables_set_options(fvae, fake, ct, tmp_path, monkeypatch):
    command = ["encode", ct, "-o", tmp_path / "o.zarr", *fake, "--json", "-", "-q"]
    monkeypatch.setenv("FVAE_PRECISION", "bf16")  # which the test's engine does not have
    code, _, err = fvae(*command)
    assert (code, "bf16" in err) == (5, True)
    monkeypatch.delenv("FVAE_PRECISION")
    monkeypatch.setenv("FVAE_MEMORY", "512MiB")
    code, out, _ = fvae(*command)
    assert code == 0
    assert json.loads(out)["plan"]["budget_bytes"] == 512 << 20


def test_debug_may_stand_before_the_verb(fvae, tmp_path):
    from fvae_deploy.errors import VolumeError

    with pytest.raises(VolumeError):
        fvae("--debug", "reconstruct", tmp_path / "none.nii", "-o", tmp_path / "o.nii")


def test_a_folder_of_latents_is_decoded(fvae, fake, store, tmp_path):
    (tmp_path / "latents" / "sub").mkdir(parents=True)
    shutil.copytree(store, tmp_path / "latents" / "a.zarr")
    shutil.copytree(store, tmp_path / "latents" / "sub" / "b.zarr")
    command = ["decode", tmp_path / "latents", "-o", tmp_path / "cts", *fake]
    code, out, err = fvae(*command, "--dry-run")
    assert (code, err) == (0, "")
    assert out.count("predicted memory") == 2
    assert not (tmp_path / "cts").exists()
    code, out, _ = fvae(*command)
    assert code == 0
    assert "2 done, 0 skipped, 0 failed" in out
    assert fvae("decode", store, "-o", tmp_path / "alone.nii.gz", *fake)[0] == 0
    for name in ("a.nii.gz", "sub/b.nii.gz"):
        assert (tmp_path / "cts" / name).read_bytes() == (tmp_path / "alone.nii.gz").read_bytes()
    code, out, _ = fvae(*command, "--resume")
    assert code == 0
    assert "0 done, 2 skipped, 0 failed" in out
    code, _, err = fvae(*command, "-q")
    assert code == 3
    assert "pass --overwrite" in err
    assert fvae(*command, "--slices", "0:3")[0] == 2


def test_a_list_of_latents_is_decoded(fvae, fake, store, tmp_path):
    (tmp_path / "list.csv").write_text("latents,output\nz.zarr,x/y.nii\n")
    assert fvae("decode", tmp_path / "list.csv", "-o", tmp_path / "cts", *fake)[0] == 0
    assert voxels(tmp_path / "cts" / "x" / "y.nii").shape == (30, 20, 13)


def test_auto_refuses_a_precision_that_no_engine_computes_in(fvae, ct, tmp_path, monkeypatch):
    from fvae_deploy.engines import base

    monkeypatch.setattr(base, "precisions", lambda name, device="cpu": ["fp32"])
    code, _, err = fvae("encode", ct, "-o", tmp_path / "o.zarr", "-p", "fp16")
    assert code == 5
    assert "found none: openvino does not compute in fp16 on device cpu, only in fp32" in err


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_threads_reach_the_engine(fvae, ct, tmp_path, engine):
    pytest.importorskip({"onnxruntime": "onnxruntime"}.get(engine, engine))
    outputs = []
    for threads in (1, 2):
        output = tmp_path / f"{threads}.nii"
        command = ["reconstruct", ct, "-o", output, "-e", engine, "--threads", threads]
        assert fvae(*command, "--dtype", "float32")[0] == 0
        outputs.append(voxels(output))
    np.testing.assert_allclose(*outputs, atol=0.01)
    assert fvae("encode", ct, "-o", tmp_path / "o.zarr", "--threads", "0")[0] == 2


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"dtype": "int8"}, "dtype int16 or float32"),
        ({"step": 0}, "step of at least 1"),
        ({"threads": 0}, "threads of at least 1"),
        ({"memory": "lots"}, "expected a memory size"),
        ({"resume": True, "overwrite": True}, "found both"),
    ],
)
def test_run_options_refuse_what_cannot_be(keywords, words):
    with pytest.raises(UsageError, match=words):
        RunOptions(**keywords)


def test_options_that_a_verb_does_not_take_are_refused(store, ct, tmp_path):
    import fvae_deploy as fvae

    with pytest.raises(UsageError, match="no protocol for decode"):
        fvae.decode(store, tmp_path / "o.nii", protocol="windows")
    with pytest.raises(UsageError, match="no dtype for encode"):
        fvae.encode(ct, tmp_path / "o.zarr", dtype="float32")
    with pytest.raises(TypeError, match="colour"):
        fvae.encode(ct, tmp_path / "o.zarr", colour="red")


def test_an_interrupted_run_that_is_not_resumed_starts_over(fvae, fake, ct, tmp_path):
    import fvae_deploy as api

    done = []

    def stop(slices):
        done.append(slices)
        if sum(done) > 12:
            raise KeyboardInterrupt

    options = {"model": fake[1], "engine": "fake"}
    with pytest.raises(KeyboardInterrupt):
        api.reconstruct(ct, tmp_path / "o.nii", progress=stop, **options)
    assert partial_path(tmp_path / "o.nii").is_dir()
    report = api.reconstruct(ct, tmp_path / "o.nii", protocol="windows", **options)
    assert report["volume"] == {"shape": [20, 13, 30], "slices": 30, "resumed": 0}
    assert not partial_path(tmp_path / "o.nii").exists()
