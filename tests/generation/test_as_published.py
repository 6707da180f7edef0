"""What is done as published, part by part: rules against torch, and effects on a generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvae_deploy.errors import BundleError, ConditionError, FvaeError, UsageError
from fvae_deploy.export.generator import PARTS, GeneratorManifest
from fvae_deploy.export.published import GENERATORS, HEALTHY, MULTI_DISEASE, SCHEDULE
from fvae_deploy.generation.fit import Fit, Stretched
from fvae_deploy.generation.noise import TorchNoise
from fvae_deploy.generation.options import GenerationOptions
from fvae_deploy.generation.sampler import Sampler
from fvae_deploy.generation.texts import text_of
from fvae_deploy.organs import ORGANS, PUBLISHED_FINDINGS

sizes = st.integers(1, 90)


@given(n=sizes, side=st.sampled_from([1, 2, 8, 64, 128, 512]))
def test_stretched_planes_are_those_of_torch(n, side):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    fit = Stretched((n, 3), (0.7, 5.0), (side, 3))
    ramp = np.arange(n, dtype=np.float32)
    wanted = functional.interpolate(torch.from_numpy(ramp)[None, None], size=side, mode="nearest")
    labels = fit.labels(np.repeat(ramp[:, None], 3, axis=1).astype(np.int64))
    np.testing.assert_array_equal(labels[:, 0], wanted[0, 0].numpy())
    linear = functional.interpolate(
        torch.from_numpy(ramp).double()[None, None], size=side, mode="linear"
    )[0, 0].numpy()
    np.testing.assert_allclose(fit._positions(0).clip(0, n - 1), linear, atol=1e-9)


@given(x=sizes, y=sizes, plane=st.sampled_from([(8, 8), (64, 64), (32, 48)]))
def test_an_image_that_was_stretched_comes_back_where_it_was(x, y, plane):
    fit = Stretched((x, y), (3.0, 0.5), plane)
    rows = fit._positions(0)[:, None] + np.zeros(plane[1])
    back = fit.volume(rows[None].astype(np.float32))[0]
    inner = np.arange(x).clip(rows.min(), rows.max())  # beyond the outer centres it is constant
    np.testing.assert_allclose(back, np.repeat(inner[:, None], y, axis=1), atol=2e-5 * max(x, 1))


@pytest.mark.parametrize("kind", [Fit, Stretched])
@given(shape=st.tuples(sizes, sizes), mm=st.tuples(st.floats(0.4, 4), st.floats(0.4, 4)))
def test_the_models_plane_lies_where_its_pixels_are(kind, shape, mm):
    affine = np.array([[0, -mm[1], 0.3, 4], [mm[0], 0, 0, -7], [0, 0.1, 2, 1], [0, 0, 0, 1.0]])
    fit = kind(shape, mm, (24, 40))
    made = fit.grid(affine)
    for i, j in ((0, 0), (23, 39), (5, 17)):
        voxel = [fit._positions(0)[i], fit._positions(1)[j], 3, 1]
        np.testing.assert_allclose(made @ [i, j, 3, 1], affine @ voxel, atol=1e-9)


@given(
    shape=st.sampled_from([(3, 16, 2, 2), (2, 4, 3, 3), (5, 16, 8, 8), (2, 17, 1, 1)]),
    seed=st.integers(0, 2**34),
)
def test_noise_is_that_of_torch_in_the_same_order(shape, seed):
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed & 0xFFFFFFFF)  # torch keeps these bits of a longer seed
    windows, steps = 2, 3
    noise = TorchNoise(shape, seed)
    later = TorchNoise(shape, seed, skipped=windows, steps=steps)
    for window in range(windows):
        for step in range(1 + steps):
            draws = [(window, step)] + [(window, step, 0)] * (window > 0)
            for use in draws:
                size = (1, *shape[1:]) if len(use) == 3 else shape
                np.testing.assert_allclose(noise(*use), torch.randn(size), atol=1e-6)
    np.testing.assert_allclose(later(0, 0), torch.randn(shape), atol=1e-6)


def test_frames_too_small_for_the_rule_of_torch_are_refused():
    with pytest.raises(UsageError, match=r"at least 16 numbers.*found 8"):
        TorchNoise((5, 2, 2, 2), 0)


@given(steps=st.integers(1, 999))
def test_strided_times_are_all_multiples_of_the_stride(steps):
    times = np.arange(0, 1000, 1000 // steps)[::-1] + 1
    if times[0] > 999:
        with pytest.raises(UsageError, match="found time 1000"):
            Sampler(SCHEDULE, "ddim", steps, 1.0, strided=True)
        return
    assert Sampler(SCHEDULE, "ddim", steps, 1.0, strided=True).timesteps == times.tolist()


def test_strided_times_need_ddim_and_leading_times():
    with pytest.raises(UsageError, match="--scheduler ddim"):
        Sampler(SCHEDULE, "unipc", 4, 1.0, strided=True)
    with pytest.raises(UsageError, match="found trailing spacing"):
        Sampler({**SCHEDULE, "timestep_spacing": "trailing"}, "ddim", 4, 1.0, strided=True)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Z"]), min_size=1)


@given(texts=st.lists(words.map(lambda word: f"a{word}"), min_size=1, max_size=4))
def test_findings_are_a_python_list_without_quotes_and_round_brackets(texts):
    wanted = "".join(c for c in str([*map(str, texts)]) if c not in "\"'()")
    assert text_of(texts, None, "n", published=True, listed=True) == wanted
    assert text_of(texts[0], None, "n", published=False, listed=True) == texts[0]


def test_texts_are_sentences_where_training_knew_no_list(tmp_path):
    (tmp_path / "r.txt").write_text('Heart "normal".\nLungs (clear).\n')
    plain = {"published": False, "listed": True}
    assert text_of(["a nodule.", "an effusion"], None, "n", **plain) == "a nodule. an effusion."
    assert text_of(None, None, "No finding.", **plain) == "No finding."
    assert text_of(None, str(tmp_path / "r.txt"), "n", **plain) == 'Heart "normal". Lungs (clear).'
    report = text_of(None, str(tmp_path / "r.txt"), "n", published=True, listed=True)
    assert report == "Heart normal. Lungs clear."
    with pytest.raises(UsageError, match="found both"):
        text_of("a", "b", "n", **plain)
    with pytest.raises(ConditionError, match="no such file"):
        text_of(None, str(tmp_path / "absent.txt"), "n", **plain)
    for empty in ("()", "''", '["]'):
        with pytest.raises(ConditionError, match="expected words"):
            text_of(empty, None, "n", published=True, listed=True)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"stretch", "text"}),
        ({"as_published": "none"}, set()),
        ({"as_published": ()}, set()),
        ({"as_published": "cut, noise"}, {"cut", "noise"}),
        ({"stitch": "reference"}, {"stretch", "text", "stitch"}),
        ({"published": True}, PARTS.keys() - {"affine"}),
        ({"published": True, "stitch": "joint"}, PARTS.keys() - {"affine", "stitch"}),
        ({"published": True, "as_published": ["affine"]}, PARTS.keys()),
    ],
)
def test_parts_are_the_bundles_or_those_asked_for(options, wanted):
    found = GenerationOptions(**options).parts(["stretch", "text"])
    assert set(found) == set(wanted)
    assert [*found] == [name for name in PARTS if name in wanted]


@pytest.mark.parametrize("names", ["stretched", "none,text", "", ["text", "all"]])
def test_unknown_parts_are_refused(names):
    with pytest.raises(UsageError, match="--as-published none, or some of stretch,text"):
        GenerationOptions(as_published=names)


@pytest.mark.parametrize(("generator", "divisor"), [(MULTI_DISEASE, 300), (HEALTHY, 400)])
def test_the_palette_is_the_published_rule(generator, divisor):
    facts = GENERATORS[generator]
    palette = {int(n): hu for n, hu in facts["palette"].items()}
    for label, hu in palette.items():
        assert hu == pytest.approx(label / divisor * 2000 - 1000, abs=2e-4)
    findings = {n + 100 for n in PUBLISHED_FINDINGS} if generator == MULTI_DISEASE else set()
    assert {n for n in palette if n >= 250} == findings
    assert palette.keys() >= {0, *ORGANS}
    if findings:
        assert (min(findings), max(findings)) == (250, 262)
        assert (round(palette[250]), round(palette[262])) == (667, 747)


SHAPE = (20, 26, 27)
AFFINE = np.diag([-3.0, -2.5, 4.0, 1.0])


@pytest.fixture
def desk(tmp_path: Path, small_generator: Path) -> Path:
    """Masks, and a bundle of a published generator as far as its manifest tells."""
    organs = np.zeros(SHAPE, np.uint8)
    organs[4:10, 5:20], organs[12:18, 8:12, 4:] = 5, 52
    lesions = np.zeros((2, *SHAPE), np.uint8)
    lesions[0, 5:8, 8:16], lesions[1, 6:9, 8:16] = 1, 1
    for name, array in (("organs", organs), ("lesions", lesions)):
        nibabel.save(nibabel.Nifti1Image(array, AFFINE), tmp_path / f"{name}.nii.gz")
    shutil.copytree(small_generator, tmp_path / "bundle")
    change(tmp_path)
    return tmp_path


def change(desk: Path, generator: str = MULTI_DISEASE, **fields: Any) -> None:
    """Let the bundle be a published generator, on a small plane."""
    content = json.loads((desk / "bundle" / "manifest.json").read_text())
    facts = GENERATORS[generator]
    content["masks"] = {
        "palette": facts["palette"],
        "offset": 100,
        "orientation": "",
        "findings": [{"number": int(n), "name": name} for n, name in facts["classes"].items()],
        "body": True,
    }
    content |= {"trained_without_text": False, "as_published": ["stretch", "text"]}
    content |= {"schedule": SCHEDULE, "eta": 1.0} | fields
    (desk / "bundle" / "manifest.json").write_text(json.dumps(content))


def generate(desk: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    import fvae_deploy as fvae

    given = {"model": desk / "bundle", "engine": "openvino", "findings": "nodule"} | options
    given.setdefault("overwrite", not given.get("resume", False))
    report = fvae.generate(desk / "organs.nii.gz", desk / "g.nii", **given)
    return report, nibabel.load(desk / "g.nii")


def test_each_part_changes_what_it_says_and_the_report_names_it(desk):
    report, first = generate(desk, stitch="reference", as_published="none", findings="no (nodule)")
    assert report["generator"]["as_published"] == ["stitch"]
    base = np.asarray(first.dataobj)
    for part in ("stretch", "text", "noise", "truncate", "grid"):
        report, image = generate(desk, as_published=["stitch", part], findings="no (nodule)")
        assert set(report["generator"]["as_published"]) == {"stitch", part}
        made = np.asarray(image.dataobj)
        if part == "grid":
            assert made.shape == (32, 32, SHAPE[2])
            corners = [image.affine @ [n, n, 0, 1] for n in (-0.5, 31.5)]
            side = max(SHAPE[0] * 3, SHAPE[1] * 2.5)  # mm, the square that the mask lies in
            np.testing.assert_allclose(np.abs(corners[1] - corners[0])[:2], side, rtol=1e-5)
        elif part == "truncate":
            off = np.abs(made) - np.abs(base)
            assert set(np.unique(off)) <= {-1, 0}
            assert 0.2 < (off < 0).mean() < 0.8
        else:
            assert (made != base).mean() > 0.2, part
    report, image = generate(desk, as_published="stitch,grid,affine")
    np.testing.assert_allclose(image.affine, AFFINE)
    report, _ = generate(desk, as_published="truncate", dtype="float32")
    assert report["generator"]["as_published"] == []  # nothing to truncate


@pytest.mark.parametrize("stitch", ["joint", "reference"])
def test_truncation_and_the_grid_are_the_same_however_windows_are_stitched(desk, stitch):
    """float32 on the model's plane, then truncated, is what int16 holds."""
    options = {"stitch": stitch, "as_published": "stretch,noise,truncate,grid"}
    _, image = generate(desk, **options, dtype="float32")
    whole = np.trunc(np.asarray(image.dataobj)).astype(np.int16)
    assert whole.shape == (32, 32, SHAPE[2])
    _, image = generate(desk, **options)
    np.testing.assert_array_equal(np.asarray(image.dataobj), whole)


@pytest.mark.parametrize("stitch", ["joint", "reference"])
def test_a_generation_as_published_can_be_resumed(desk, monkeypatch, stitch):
    from fvae_deploy.generation.denoiser import Denoiser

    parts = "stretch,text,steps,noise,truncate,grid"
    options = {"stitch": stitch, "as_published": parts, "steps": 7}
    _, image = generate(desk, **options)
    whole = np.asarray(image.dataobj).copy()
    denoise, left = Denoiser.denoise, 5

    def stopping(self: Denoiser, *given: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return denoise(self, *given, **more)

    (desk / "g.nii").unlink()
    monkeypatch.setattr(Denoiser, "denoise", stopping)
    with pytest.raises(KeyboardInterrupt):
        generate(desk, **options)
    monkeypatch.setattr(Denoiser, "denoise", denoise)
    _, image = generate(desk, **options, resume=True)
    np.testing.assert_array_equal(np.asarray(image.dataobj), whole)


def test_what_differs_from_training_is_remarked(desk):
    disease = f"{desk / 'lesions.nii.gz'}=0:nodules,1:150"
    report, _ = generate(desk, guidance=2.0, findings=None, report="left lung")
    assert ["outside training" in line for line in report["remarks"]] == [True, False]
    assert "--body-label" in report["remarks"][1]
    report, _ = generate(desk, findings=None, report="lung " * 40, as_published="cut")
    assert "The text has 42 tokens: those after the first 10" in report["remarks"][0]
    change(desk, findings="no finding")
    report, _ = generate(desk, findings=None, disease_mask=disease)
    assert "text of a normal scan" in report["remarks"][0]
    report, _ = generate(desk, disease_mask=disease)
    assert not any("normal scan" in line for line in report["remarks"])
    assert report["generator"]["disease_mask"] == [disease]
    assert report["generator"]["findings"] == "[nodule]"


def test_a_label_of_the_body_is_painted_by_the_published_rule(desk):
    organs = nibabel.load(desk / "organs.nii.gz")
    labels = np.asarray(organs.dataobj).copy()
    _, without = generate(desk)
    with pytest.raises(ConditionError, match=r"expected the label 201.*found none"):
        generate(desk, body_label=201)
    before = np.asarray(without.dataobj).copy()
    labels[labels == 0] = 200
    nibabel.save(nibabel.Nifti1Image(labels, AFFINE), desk / "organs.nii.gz")
    with pytest.raises(ConditionError, match=r"found 200.*--body-label"):
        generate(desk)
    report, made = generate(desk, body_label=200)
    assert report["remarks"] == []
    assert (np.asarray(made.dataobj) != before).mean() > 0.2
    for label, words in ((201, "found 200"), (5, "from 118 to 249"), (250, "from 118 to 249")):
        with pytest.raises(ConditionError, match=words):
            generate(desk, body_label=label)
    (desk / "map.json").write_text('{"5": "liver", "52": 52}')
    again = np.asarray(generate(desk, body_label=200, labels=desk / "map.json")[1].dataobj)
    np.testing.assert_array_equal(again, np.asarray(made.dataobj))


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"published": True}, BundleError, "three channels.*--channels published"),
        ({"as_published": "steps", "sampler": "unipc"}, UsageError, "--scheduler ddim"),
        ({"as_published": "steps", "steps": 3}, UsageError, "found time 1000"),
        ({"findings": "lung " * 40}, ConditionError, "--as-published cut"),
        ({"findings": ["a", ""]}, ConditionError, "empty text"),
        ({"report": "a"}, UsageError, "found both"),
    ],
)
def test_what_cannot_be_done_as_published_is_refused(desk, options, kind, words):
    with pytest.raises(kind, match=words):
        generate(desk, **options)
    assert not (desk / "g.nii").exists()


def test_the_healthy_generator_takes_no_disease_mask_and_makes_no_list(desk):
    change(desk, HEALTHY)
    with pytest.raises(ConditionError, match="trained without findings"):
        generate(desk, disease_mask=f"{desk / 'lesions.nii.gz'}=1,2")
    report, _ = generate(desk, findings=["(left) nodule", "right lung."])
    assert report["generator"]["findings"] == "left nodule. right lung."


def test_a_bundle_whose_findings_are_numbered_as_organs_is_refused(desk):
    """Bundles of published generators from before had CT-RATE's numbers."""
    content = json.loads((desk / "bundle" / "manifest.json").read_text())
    del content["masks"]["findings"]
    (desk / "bundle" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"apart from those of organs.*export the bundle again"):
        GeneratorManifest.load(desk / "bundle")


def test_a_list_of_jobs_may_have_reports_several_findings_and_several_masks(desk):
    from fvae_deploy.batch.generations import read_generations, run_generations
    from fvae_deploy.stream.options import RunOptions

    rows: list[dict[str, Any]] = [
        {"mask": "organs.nii.gz", "output": "a.nii", "findings": ["left nodule", "lung"]},
        {"mask": "organs.nii.gz", "output": "b.nii", "report": "no finding"},
        {"mask": "organs.nii.gz", "output": "c.nii", "findings": "nodule",
         "disease_mask": ["lesions.nii.gz=1:150", "lesions.nii.gz=0:161"]},
    ]  # fmt: skip
    (desk / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (desk / "jobs.csv").write_text(
        "mask,output,findings,disease_mask\n"
        "organs.nii.gz,d.nii,nodule,lesions.nii.gz=1:150; lesions.nii.gz=0:161\n"
    )
    options = RunOptions(model=desk / "bundle", engine="openvino")
    reports = []
    for name in ("jobs.jsonl", "jobs.csv"):
        jobs = read_generations(desk / name, desk)
        reports += run_generations(
            jobs, options, GenerationOptions(), lambda line: None, lambda *stage: lambda done: None
        )
    assert [report["generator"]["findings"] for report in reports] == [
        "[left nodule, lung]", "no finding", "[nodule]", "[nodule]"
    ]  # fmt: skip
    made = [nibabel.load(desk / f"{name}.nii").get_fdata() for name in "cd"]
    np.testing.assert_array_equal(*made)
    (desk / "bad.jsonl").write_text('{"mask": "organs.nii.gz", "findings": [1]}')
    with pytest.raises(UsageError, match="a list of texts in row 1"):
        read_generations(desk / "bad.jsonl", desk)


def test_the_command_line_takes_all_of_it(desk, monkeypatch, capsys):
    from fvae_deploy.cli import main as cli

    command = ["generate", "--mask", desk / "organs.nii.gz", "-o", desk / "g.nii"]
    command += ["--model", desk / "bundle", "--findings", "nodule", "--findings", "left lung"]
    command += ["--disease-mask", f"{desk / 'lesions.nii.gz'}=1:150", "--steps", "2"]
    command += ["--disease", f"{desk / 'lesions.nii.gz'}=0:nodule", "--json", desk / "r.json"]
    command += ["--as-published", "stretch,text,stitch,truncate"]

    def run(*more: str) -> int:
        monkeypatch.setattr("sys.argv", ["fvae", *map(str, command), *more])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert run("--dry-run") == 0
    plan = json.loads((desk / "r.json").read_text())
    assert plan["sampling"]["as_published"] == ["stretch", "text", "stitch", "truncate"]
    assert "--body-label" in plan["remarks"][0]
    assert "--body-label" in capsys.readouterr().out
    assert run() == 0
    assert "--body-label" in capsys.readouterr().out
    report = json.loads((desk / "r.json").read_text())
    assert report["generator"]["findings"] == "[nodule, left lung]"
    assert report["generator"]["as_published"] == ["stretch", "text", "stitch", "truncate"]
    assert report["generator"]["stitch"] == "reference"
    assert run("--overwrite", "--as-published", "all") == 2
    assert "found 'all'" in capsys.readouterr().err


def test_a_file_of_findings_is_never_replaced(desk):
    import fvae_deploy as fvae

    with pytest.raises(FvaeError, match="apart from the input"):
        fvae.generate(
            desk / "organs.nii.gz",
            desk / "lesions.nii.gz",
            disease_mask=f"{desk / 'lesions.nii.gz'}=0:161",
            model=desk / "bundle",
            overwrite=True,
        )


def test_a_text_that_is_cut_keeps_its_first_tokens_and_the_last_mark(small_generator):
    from fvae_deploy.generation.denoiser import open_denoiser

    with open_denoiser(small_generator, engine="openvino") as denoiser:
        assert denoiser.length("lung " * 40) == 42  # with the marks of begin and end
        cut, whole = denoiser.context("lung " * 40, cut=True), denoiser.context("lung " * 8)
        np.testing.assert_array_equal(cut, whole)
        np.testing.assert_array_equal(denoiser.context("left lung", cut=True),
                                      denoiser.context("left lung"))  # fmt: skip
