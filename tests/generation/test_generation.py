"""`fvae generate` as its users meet it, with random weights: grids, seeds, resuming, lists."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

for package in ("diffusers", "tokenizers", "torch", "openvino"):
    pytest.importorskip(package, reason="needs the dev extra")
import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.batch.generations import read_generations, run_generations  # noqa: E402
from fvae_deploy.cli import main as cli  # noqa: E402
from fvae_deploy.errors import (  # noqa: E402
    BundleError,
    ConditionError,
    FvaeError,
    StoppedError,
    UsageError,
    VolumeError,
)
from fvae_deploy.export.generator import GeneratorManifest  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402
from fvae_deploy.generation import pipeline as generation  # noqa: E402
from fvae_deploy.generation.denoiser import Denoiser  # noqa: E402
from fvae_deploy.generation.options import GenerationOptions  # noqa: E402
from fvae_deploy.stream.codec import BUILT_IN  # noqa: E402
from fvae_deploy.stream.options import RunOptions  # noqa: E402

TILTED = np.array([[-3, 0, 0.2, 5], [0, -2.5, 0, 7], [0.1, 0, 4, -9], [0, 0, 0, 1.0]])
SHAPE = (20, 26, 27)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """Two organs on an oblique grid whose plane is not the model's."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:10, 5:20], labels[12:18, 8:12, 4:] = 5, 52
    nibabel.save(nibabel.Nifti1Image(labels, TILTED), tmp_path / "organs.nii.gz")
    return tmp_path / "organs.nii.gz"


@pytest.fixture
def options(small_generator: Path) -> dict[str, Any]:
    return {"model": small_generator, "engine": "openvino"}


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_a_ct_comes_out_on_the_grid_of_the_mask(mask, options, tmp_path):
    stages: dict[str, list[int]] = {}

    def progress(stage: str, length: int) -> Any:
        stages[stage] = [length, 0]

        def advance(done: int) -> None:
            stages[stage][1] += done

        return advance

    report = fvae.generate(mask, tmp_path / "g.nii.gz", progress=progress, **options)
    made = nibabel.load(tmp_path / "g.nii.gz")
    assert made.shape == SHAPE
    np.testing.assert_allclose(made.affine, TILTED, atol=1e-5)
    assert made.get_data_dtype() == np.int16
    assert (
        -1000 <= voxels(tmp_path / "g.nii.gz").min() < voxels(tmp_path / "g.nii.gz").max() <= 1000
    )
    assert stages == {"mask": [27, 27], "denoise": [12, 12], "decode": [27, 27]}
    assert report["command"] == "generate"
    assert report["generator"]["findings"] == "No finding."
    assert report["generator"]["steps"] == 2
    assert {"mask", "denoise", "engine", "total"} <= report["seconds"].keys()
    json.dumps(report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.nii.gz", "organs.nii.gz"]


def test_what_is_asked_for_changes_the_volume_and_nothing_else_does(mask, options, tmp_path):
    disease = np.zeros(SHAPE, np.uint8)
    disease[5:8, 8:16] = 10
    nibabel.save(nibabel.Nifti1Image(disease, TILTED), tmp_path / "d.nii.gz")

    def made(**changes: Any) -> np.ndarray:
        fvae.generate(mask, tmp_path / "g.nii", overwrite=True, **{**options, **changes})
        return voxels(tmp_path / "g.nii")

    first = made()
    np.testing.assert_array_equal(made(), first)
    np.testing.assert_array_equal(made(memory="200MiB"), first)
    for changes in (
        {"seed": 1},
        {"findings": "left nodule"},
        {"disease_mask": tmp_path / "d.nii.gz"},
        {"steps": 3},
        {"sampler": "unipc", "steps": 3},
        {"eta": 0.0},
        {"guidance": 3.0},
        {"stitch": "reference"},
    ):
        assert (made(**changes) != first).mean() > 0.2, changes


@pytest.mark.parametrize("stitch", ["joint", "reference"])
def test_noise_is_centred_where_the_bundle_says_so(mask, options, tmp_path, stitch):
    centred = tmp_path / "centred"
    shutil.copytree(options["model"], centred)
    manifest = GeneratorManifest.load(centred)
    dataclasses.replace(manifest, centred_noise=not manifest.centred_noise).save(centred)
    made = []
    for model in (options["model"], centred):
        report = fvae.generate(
            mask,
            tmp_path / "g.nii",
            **{**options, "model": model, "stitch": stitch, "overwrite": True},
        )
        made.append((report["generator"]["centred_noise"], voxels(tmp_path / "g.nii")))
    assert [said for said, _ in made] == [False, True]
    assert (made[0][1] != made[1][1]).mean() > 0.2


def test_a_vae_with_another_hu_window_is_refused(mask, options, tmp_path):
    shutil.copytree(BUILT_IN / "tiny", tmp_path / "soft")
    manifest = Manifest.load(tmp_path / "soft")
    window = dataclasses.replace(manifest.intensity, hu_min=-175.0, hu_max=250.0)
    dataclasses.replace(manifest, intensity=window).save(tmp_path / "soft")
    with pytest.raises(BundleError, match="export it without --hu-window"):
        fvae.generate(mask, tmp_path / "g.nii", **{**options, "vae": tmp_path / "soft"})
    assert not (tmp_path / "g.nii").exists()


@pytest.mark.parametrize("name", ["hu_window", "published", "rounding"])
def test_options_of_reconstructions_are_refused(mask, options, tmp_path, name):
    given = {"hu_window": "soft", "rounding": "truncate", "published": True}
    with pytest.raises(UsageError, match=f"no {name} for generate"):
        fvae.generate(mask, tmp_path / "g.nii", RunOptions(**{name: given[name]}), **options)


@pytest.mark.parametrize("stitch", ["joint", "reference"])
@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_stopped_generation_goes_on_to_the_same_bytes(
    mask, options, tmp_path, monkeypatch, after, stitch
):
    options = {**options, "stitch": stitch, "steps": 4}
    fvae.generate(mask, tmp_path / "whole.nii", **options)
    denoise, calls = Denoiser.denoise, 0

    def stopping(self: Denoiser, *given: Any, **more: Any) -> Any:
        nonlocal calls
        if calls == after:
            raise KeyboardInterrupt
        calls += 1
        return denoise(self, *given, **more)

    monkeypatch.setattr(Denoiser, "denoise", stopping)
    with pytest.raises(KeyboardInterrupt):
        fvae.generate(mask, tmp_path / "g.nii", **options)
    assert not (tmp_path / "g.nii").exists()
    assert (tmp_path / "g.nii.partial").is_dir()
    monkeypatch.setattr(Denoiser, "denoise", denoise)
    with pytest.raises(UsageError, match="found seed 0 instead of 5"):
        fvae.generate(mask, tmp_path / "g.nii", seed=5, resume=True, **options)
    fvae.generate(mask, tmp_path / "g.nii", resume=True, **options)
    assert (tmp_path / "g.nii").read_bytes() == (tmp_path / "whole.nii").read_bytes()
    assert not (tmp_path / "g.nii.partial").exists()


def test_without_resume_a_stopped_generation_begins_anew(mask, options, tmp_path):
    (tmp_path / "g.nii.partial").mkdir()
    (tmp_path / "g.nii.partial" / "request.json").write_text("{}")
    (tmp_path / "g.nii.partial" / "step0.npy").write_bytes(b"of something else")
    fvae.generate(mask, tmp_path / "g.nii", **options)
    assert not (tmp_path / "g.nii.partial").exists()


def test_what_is_not_ours_is_never_removed(mask, options, tmp_path):
    (tmp_path / "g.nii.partial").mkdir()
    (tmp_path / "g.nii.partial" / "thesis.tex").write_text("precious")
    with pytest.raises(VolumeError, match="found something else"):
        fvae.generate(mask, tmp_path / "g.nii", **options)
    assert (tmp_path / "g.nii.partial" / "thesis.tex").read_text() == "precious"


def test_one_short_window_in_the_published_order_is_one_pass(mask, options, tmp_path):
    labels = voxels(mask)[..., :5]
    nibabel.save(nibabel.Nifti1Image(labels, TILTED), tmp_path / "short.nii")
    fvae.generate(tmp_path / "short.nii", tmp_path / "g.nii", stitch="reference", **options)
    assert voxels(tmp_path / "g.nii").shape == labels.shape


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        pytest.param({"stitch": "blend"}, UsageError, "joint or reference", id="stitch"),
        pytest.param({"sampler": "euler"}, UsageError, "a sampler among", id="scheduler"),
        pytest.param({"findings": " "}, ConditionError, "empty text", id="no words"),
        pytest.param({"findings": "no " * 30}, ConditionError, "at most 10 tokens", id="too long"),
        pytest.param({"vae": "nothing"}, BundleError, "found nothing", id="no vae"),
        pytest.param({"model": "tiny"}, BundleError, "kind generator", id="a vae as generator"),
        pytest.param({"labels": "absent.json"}, ConditionError, "or JSON", id="mapping"),
        pytest.param({"disease_mask": "absent.nii"}, VolumeError, "found nothing", id="disease"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    mask, options, tmp_path, changes, kind, words
):
    with pytest.raises(kind, match=words):
        fvae.generate(mask, tmp_path / "g.nii", overwrite=True, **{**options, **changes})
    assert [p.name for p in tmp_path.iterdir()] == ["organs.nii.gz"]


@pytest.mark.parametrize("stitch", ["joint", "reference"])
def test_a_dry_run_shows_the_plan_and_an_output_that_exists_is_kept(
    mask, small_generator, tmp_path, monkeypatch, capsys, stitch
):
    out = tmp_path / "g.nii"
    command = ["generate", "--mask", mask, "-o", out, "-m", small_generator, "--stitch", stitch]
    command += ["--findings", "right nodule", "--steps", "2"]
    assert run(monkeypatch, *command, "--dry-run") == 0
    assert "predicted memory" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["organs.nii.gz"]
    assert run(monkeypatch, *command) == 0
    before = out.read_bytes()
    assert run(monkeypatch, *command) == 3
    assert "pass --overwrite" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--resume") == 0
    assert "exists: skipped" in capsys.readouterr().out
    assert run(monkeypatch, *command, "--overwrite") == 0
    assert out.read_bytes() == before


def test_outputs_are_checked_before_the_work(mask, options, tmp_path):
    for output, words in (
        (tmp_path / "g.gipl", "named .nii"),
        (tmp_path / "absent" / "g.nii", "found none: create it"),
        (mask, "apart from the input"),
    ):
        with pytest.raises(FvaeError, match=words):
            fvae.generate(mask, output, **options)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["fvae", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_list_of_jobs_is_worked_through_and_taken_up_again(
    mask, small_generator, tmp_path, monkeypatch, capsys
):
    (tmp_path / "jobs.csv").write_text(
        "mask,output,findings,seed\n"
        "organs.nii.gz,a.nii.gz,left nodule,3\n"
        "absent.nii.gz,b.nii.gz,,\n"
        "organs.nii.gz,c.nii.gz,,\n"
    )
    command = ["generate", "--jobs", tmp_path / "jobs.csv", "-o", tmp_path / "out"]
    command += ["-m", small_generator]
    assert run(monkeypatch, *command) == 3
    err = capsys.readouterr().err
    assert "2 of 3" in err
    assert "found nothing" in err
    assert "1 failed" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]
    fvae.generate(
        mask, tmp_path / "a.nii.gz", findings="left nodule", seed=3, model=small_generator
    )
    np.testing.assert_array_equal(voxels(tmp_path / "a.nii.gz"), voxels(tmp_path / "out/a.nii.gz"))
    (tmp_path / "absent.nii.gz").write_bytes(mask.read_bytes())
    before = (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns
    report = tmp_path / "r.json"
    assert run(monkeypatch, *command, "--resume", "--json", report) == 0
    assert (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns == before
    assert [row.get("skipped", False) for row in json.loads(report.read_text())] == [
        True,
        False,
        True,
    ]


def test_a_job_whose_disk_fails_does_not_end_the_list(tmp_path):
    (tmp_path / "jobs.csv").write_text("mask,output\na.nii,taken/a.nii\nb.nii,b.nii\n")
    (tmp_path / "taken").write_text("no folder")
    jobs = read_generations(tmp_path / "jobs.csv", tmp_path)
    first, second = run_generations(
        jobs,
        RunOptions(),
        GenerationOptions(),
        lambda line: None,
        lambda stage, length: lambda done: None,
    )
    assert "taken" in first["error"]
    assert "found nothing" in second["error"]


def test_line_breaks_within_a_cell_stay(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'mask,findings\r\nx.nii,"nodule in the right\nlung"\r\n')
    (tmp_path / "a.jsonl").write_text('{"mask": "x.nii", "findings": "a\u2028b"}\n')
    (csv,), (jsonl,) = (
        read_generations(tmp_path / f"a.{end}", tmp_path) for end in ("csv", "jsonl")
    )
    assert (csv.findings, jsonl.findings) == ("nodule in the right\nlung", "a\u2028b")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "mask\n", "found none"),
        ("a.csv", "organ\nx.nii\n", "a mask or patient or like in row 1"),
        ("a.csv", "mask,colour\nx.nii,red\n", "found colour"),
        ("a.csv", "mask,seed\nx.nii,ten\n", "found 'ten'"),
        ("a.csv", "mask,seed\nx.nii,-1\n", "found '-1'"),
        ("a.csv", "mask\nx.nii\nx.nii\n", "found x.nii in rows 1 and 2"),
        ("a.jsonl", '{"mask": 1}\n{', "a list, CSV or JSONL, at"),
        ("a.jsonl", "[1]", "a mask or patient or like in row 1"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words):
        read_generations(tmp_path / name, tmp_path)


def test_the_command_line_says_what_it_made(mask, small_generator, tmp_path, monkeypatch, capsys):
    out = tmp_path / "g.nii.gz"
    command = ["generate", "--mask", mask, "-o", out, "-m", small_generator]
    assert run(monkeypatch, *command, "--findings", "right nodule") == 0
    assert "27 slices of 20x26" in capsys.readouterr().out
    for more, words in (
        (["--jobs", "x.csv"], "found --mask and --jobs"),
        (["--steps", "5000", "--overwrite"], "1 to 1000 steps"),
    ):
        assert run(monkeypatch, *command, *more) == 2
        assert words in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(mask, small_generator, tmp_path, monkeypatch):
    def stop(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate", stop)
    command = ["generate", "--mask", mask, "-o", tmp_path / "g.nii", "-m", small_generator]
    monkeypatch.setattr("sys.argv", ["fvae", *map(str, command), "--debug"])
    with pytest.raises(StoppedError, match="--resume"):
        cli.main()
