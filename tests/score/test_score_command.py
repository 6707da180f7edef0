"""fvae score from the command line: the whole path, bad input, interruption, the ranking."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from phantom_sets import SHAPE, changed, noisy, phantoms, write_i3d, write_picture_network

from fvae_deploy.cli import main as cli
from fvae_deploy.organs import FINDINGS
from fvae_deploy.report.cases import Case
from fvae_deploy.score import run as scoring
from fvae_deploy.score.cases import find_beside
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume

pytest.importorskip("openvino")


@pytest.fixture
def fvae(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fvae", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return (code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Sets of phantoms with their labels: real, made (of other patients) and noisy."""
    folder = tmp_path_factory.mktemp("sets")
    phantoms(folder / "real", range(5))
    phantoms(folder / "made", range(100, 104))
    changed(folder / "made", folder / "noisy", noisy(60))
    return folder


@pytest.fixture
def score(fvae, shelf, tmp_path):
    """Score two sets of the shelf with 20 draws; return the content of the JSON."""

    def run(real, made, *options):
        output = tmp_path / "score.html"
        given = (shelf / real, shelf / made, "-o", output, "--bootstrap", 20, "--overwrite")
        code, out, err = fvae("score", *given, *options)
        assert code == 0, err
        return json.loads(output.with_suffix(".json").read_text()) | {"out": out}

    return run


def value(content, metric, part=""):
    (row,) = [
        row
        for row in content["metrics"]
        if row["metric"].startswith(metric) and row["part"] == part
    ]
    return row["value"]


LATENTS = "Fréchet distance of latents"


def test_two_sets_give_page_json_and_csv_with_the_same_numbers(score, shelf, tmp_path):
    labels = ("--real-labels", shelf / "real_labels", "--masks", shelf / "made_labels")
    content = score("real", "made", *labels)
    whole = [row for row in content["metrics"] if not row["part"]]
    assert [row["metric"] for row in whole] == [
        "Fréchet distance of latents (tiny)", "kernel distance of latents (tiny)",
        "HU by organ: Wasserstein distance", "HU by tissue: Wasserstein distance",
        "noise: difference of means", "noise: distance of spectra", "mask adherence: Dice",
        "mask adherence: NSD at 2 mm", "mask adherence: HU that fit", "diversity",
        "distance to the nearest real CT", "share near a real CT",
    ]  # fmt: skip
    for row in content["metrics"]:
        assert row["low"] <= row["value"] <= row["high"], row
    rows = list(csv.DictReader((tmp_path / "score.csv").read_text().splitlines()))
    assert [row["metric"] for row in rows] == [row["metric"] for row in content["metrics"]]
    for row, one in zip(rows, content["metrics"], strict=True):
        assert float(row["value"]) == pytest.approx(one["value"], rel=1e-5)
        assert float(row["95 % to"]) == pytest.approx(one["high"], rel=1e-5, abs=1e-5)
    page = (tmp_path / "score.html").read_text()
    for name in ("summary", "pictures", "features", "hounsfield", "adherence", "nearest", "scans"):
        assert f'<section id="{name}">' in page
    assert not re.search(r'(src|href)="?(https?:)?//', page)
    assert page.count("data:image/png") == 2 + 2 * 4  # two sheets, and two planes of each pair
    assert "mask adherence" in content["out"]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"score.{n}" for n in ("html", "json", "csv")
    }
    assert len(content["left_out"]) == 4
    assert any("only 4 CTs" in remark for remark in content["remarks"])


def test_the_networks_of_a_user_add_fvd_fid_clip_and_auc(score, shelf, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="needs the export extra")

    class Adapter:
        def image(self, hu, spacing):
            return [1.0, hu.std()]

        def text(self, text):
            return [1.0, float(len(text))]

        def findings(self, hu, spacing):
            assert hu.shape == SHAPE
            return np.full(18, (hu > 0).mean())

    module = types.ModuleType("their_network")
    module.make = Adapter
    monkeypatch.setitem(sys.modules, "their_network", module)
    lines = ["ct,text,Emphysema", "m0.nii.gz,nodule,1", "m1.nii.gz,normal,0", "m2.nii.gz,normal,1",
             "r0.nii.gz,normal,"]  # fmt: skip
    (tmp_path / "texts.csv").write_text("\n".join(lines))
    i3d = write_i3d(tmp_path / "i3d.pt")
    content = score(
        "real", "made", "--i3d", i3d, "--features", write_picture_network(tmp_path / "net.pt"),
        "--clip", "their_network:make", "--classifier", "their_network:make",
        "--texts", tmp_path / "texts.csv",
    )  # fmt: skip
    for metric in ("FVD (i3d.pt)", "kernel video distance", "FID in three planes (net.pt)",
                   "KID in three planes", "CLIP score", "AUC of findings"):  # fmt: skip
        assert np.isfinite(value(content, metric))
    assert value(content, "AUC of findings") == value(content, "AUC of findings", "Emphysema")
    (row,) = [row for row in content["metrics"] if row["metric"] == "CLIP score"]
    assert (row["generated_cases"], row["real_cases"]) == (3, 1)
    assert len(content["networks"]["clip"]["sha256"]) == 64
    assert any("lacks rank" in remark and "FVD" in remark for remark in content["remarks"])
    assert content["left_out"] == ["Mask adherence: give the masks that the CTs were made from "
                                   "with --masks."]  # fmt: skip


def test_the_features_of_a_set_do_not_depend_on_its_orientation(score, shelf, tmp_path):
    turned = tmp_path / "turned"
    turned.mkdir()
    for path in (shelf / "made").iterdir():
        reader = open_volume(path)
        voxels = np.concatenate([*reader.slabs(8)]).transpose(1, 2, 0)
        affine = reader.geometry.affine.copy()
        affine[:3, 3] += affine[:3, 1] * (voxels.shape[1] - 1)
        affine[:3, 1] *= -1
        voxels, affine = voxels[:, ::-1].transpose(1, 0, 2), affine[:, [1, 0, 2, 3]]
        with create_volume(turned / path.name, Geometry(voxels.shape, affine)) as writer:
            writer.write(np.ascontiguousarray(voxels.transpose(2, 0, 1)))
    plain, again = score("real", "made"), score("real", turned)
    assert value(again, LATENTS) == pytest.approx(value(plain, LATENTS), rel=1e-6)
    assert value(again, "diversity") == pytest.approx(value(plain, "diversity"), rel=1e-6)
    assert not any("resampled" in remark for remark in again["remarks"])


def test_every_format_gives_the_same_score(score, shelf, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    formats = (".nrrd", ".zarr", ".dcm", ".mha")
    for path, suffix in zip(sorted((shelf / "made").iterdir()), formats, strict=True):
        reader = open_volume(path)
        target = mixed / path.name.replace(".nii.gz", suffix)
        with create_volume(target, Geometry(SHAPE, reader.geometry.affine)) as writer:
            writer.write(np.concatenate([*reader.slabs(8)]))
        reader.close()
    plain, again = score("real", "made"), score("real", mixed)
    for metric in (LATENTS, "HU by tissue: Wasserstein", "diversity"):
        assert value(again, metric) == pytest.approx(value(plain, metric), rel=1e-5)


def test_another_spacing_is_brought_to_the_coarser_one_and_told(score, shelf, tmp_path):
    phantoms(tmp_path / "fine", range(100, 103), (128, 128, 30))
    content = score("real", tmp_path / "fine")
    assert content["spacing_mm"] == pytest.approx([3.75, 3.75, 22.5])
    assert any("3 of 3 CTs of GENERATED were resampled" in r for r in content["remarks"])
    given = score("real", "made", "--spacing", "8,8,30")
    assert given["spacing_mm"] == [8, 8, 30]
    assert all(case["resampled"] for case in given["real"])


def test_copies_of_real_cts_are_told_and_found_with_noise_too(score, shelf, tmp_path):
    made = tmp_path / "copies"
    made.mkdir()
    shutil.copy(shelf / "real" / "r3.nii.gz", made / "x.nii.gz")
    shutil.copy(shelf / "made" / "m0.nii.gz", made / "y.nii.gz")
    content = score("real", made)
    assert "x of GENERATED has the same voxels as r3 of REAL." in content["remarks"]
    assert content["nearest"]["pairs"][0] == {"generated": "x", "real": "r3", "distance_hu": 0}
    assert value(content, "share near a real CT") >= 0.5
    copies = changed(shelf / "real", tmp_path / "noisy_copies", noisy(40))
    content = score("real", copies)
    assert value(content, "share near a real CT") == 1
    assert value(content, "distance to the nearest real CT") < 0.3


def test_short_cts_are_left_out_of_fvd(score, shelf, tmp_path):
    pytest.importorskip("torch", reason="needs the export extra")
    phantoms(tmp_path / "short", range(100, 103), (96, 96, 12))
    i3d = write_i3d(tmp_path / "i3d.pt")
    content = score("real", tmp_path / "short", "--i3d", i3d, "--spacing", "3.75,3.75,37.5")
    assert not any(row["metric"].startswith("FVD") for row in content["metrics"])
    assert any("8 CTs have fewer than 17 slices" in remark for remark in content["remarks"])
    assert any("fewer than 2 CTs of a set have 17 slices" in line for line in content["left_out"])


def test_label_maps_of_the_generated_are_compared_with_their_masks(score, shelf):
    maps = ("--masks", shelf / "made_labels", "--generated-labels", shelf / "made_labels")
    content = score("real", "made", *maps, "--real-labels", shelf / "real_labels")
    assert value(content, "mask adherence: Dice") == 1
    assert value(content, "mask adherence: NSD", "liver") == 1
    (row,) = [
        r for r in content["metrics"] if r["metric"] == "mask adherence: Dice" and not r["part"]
    ]
    assert row["real"] is None


def test_masks_are_matched_by_name_and_nnunets_channel_is_no_part_of_it(tmp_path):
    cases = [Case(name, Path(name)) for name in ("a_0000", "b_0000", "c", "d")]
    (tmp_path / "masks").mkdir()
    for name in ("a.nii.gz", "b.nii", "b_0000.nii", "c.nrrd"):
        (tmp_path / "masks" / name).touch()
    found = find_beside(tmp_path / "masks", cases, "--masks")
    assert {name: path.name for name, path in found.items()} == {
        "a_0000": "a.nii.gz", "b_0000": "b_0000.nii", "c": "c.nrrd",
    }  # fmt: skip


def test_cts_without_a_label_map_are_not_judged_by_thresholds_beside_others(score, shelf, tmp_path):
    (tmp_path / "maps").mkdir()
    for name in ("m0.nii.gz", "m2.nii.gz"):
        shutil.copy(shelf / "made_labels" / name, tmp_path / "maps" / name)
    maps = ("--masks", shelf / "made_labels", "--generated-labels", tmp_path / "maps")
    content = score("real", "made", *maps)
    dice = [row for row in content["metrics"] if row["metric"] == "mask adherence: Dice"]
    assert {row["generated_cases"] for row in dice} == {2}
    assert not {"bones", "lungs and trachea"} & {row["part"] for row in dice}
    assert "2 of 4 CTs of GENERATED have a label map or mask." in content["remarks"]


def test_totalsegmentator_labels_both_sets(score, shelf, monkeypatch):
    """With a stand-in: what is dense is bone, and what is not air is liver."""
    import nibabel

    def totalsegmentator(source, output, ml, quiet):
        image = nibabel.load(source)
        hu = np.asarray(image.dataobj)
        labels = np.where(hu > 200, 25, np.where(hu > -20, 5, 0)).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(labels, image.affine), output)

    module = types.ModuleType("totalsegmentator.python_api")
    module.totalsegmentator = totalsegmentator
    parent = types.ModuleType("totalsegmentator")
    parent.__spec__ = types.SimpleNamespace(name="totalsegmentator")
    monkeypatch.setitem(sys.modules, "totalsegmentator", parent)
    monkeypatch.setitem(sys.modules, "totalsegmentator.python_api", module)
    maps = ("--real-labels", shelf / "real_labels", "--masks", shelf / "made_labels")
    content = score("real", "made", "--segment", *maps)
    rows = {row["part"]: row for row in content["metrics"] if row["metric"].endswith("Dice")}
    assert 0 < rows["liver"]["value"] < 1
    assert 0 < rows["liver"]["real"] < 1
    assert rows["spleen"]["value"] == 0
    assert {case["labels"] for case in content["generated"]} == {"TotalSegmentator"}
    assert np.isfinite(value(content, "HU by organ: Wasserstein", "liver"))


def test_a_damaged_ct_is_passed_over_and_told(fvae, shelf, tmp_path):
    made = shutil.copytree(shelf / "made", tmp_path / "made")
    (made / "m1.nii.gz").write_bytes((made / "m1.nii.gz").read_bytes()[:3000])
    nan = np.full(SHAPE, np.nan, np.float32)
    import nibabel

    nibabel.save(nibabel.Nifti1Image(nan, np.diag([-3.75, -3.75, 22.5, 1])), made / "n.nii.gz")
    output = tmp_path / "score.html"
    code, _, err = fvae("score", shelf / "real", made, "-o", output, "--bootstrap", 20)
    assert code == 3
    assert "found 2 that failed" in err
    content = json.loads(output.with_suffix(".json").read_text())
    assert [one["name"] for one in content["failed"]] == ["m1", "n"]
    assert len(content["generated"]) == 3
    assert "NaN" in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["real", "empty"], 2, "found none"),
        (["real", "none"], 2, "expected CTs at none, found nothing: check the path"),
        (["real", "made/none*.nii.gz"], 2, "check the pattern"),
        (["real", "made/m1.nii.gz"], 2, "fvae report judges single CTs"),
        (["real", "real"], 2, "found 5 in both"),
        (["real", "made_labels"], 3, "expected a CT in HU"),
        (["real", "made", "--masks", "real_labels"], 2, "rename them or correct --masks"),
        (["real", "made", "--texts", "real"], 2, "give both"),
        (["real", "made", "--clip", "a:b", "--texts", "other.csv"], 2, "named as the CTs"),
        (["real", "made", "--clip", "a:b", "--texts", "wrong.csv"], 2, "expected 0 or 1"),
        (["real", "made", "--clip", "a:b", "--texts", "twice.csv"], 2, "two for m0"),
        (["real", "made", "--clip", "no_module:b", "--texts", "right.csv"], 4, "correct --clip"),
        (["real", "made", "--i3d", "right.csv"], 4, "expected a TorchScript file"),
        (["real", "made", "--features", "right.csv"], 4, "expected a TorchScript file"),
        (["real", "made", "--spacing", "1,2"], 2, "write it like"),
        (["real", "made", "--spacing", "1,2,0"], 2, "write it like"),
        (["real", "made", "--segment"], 5, "pip install TotalSegmentator"),
        (["real", "made", "--bootstrap", "3"], 2, "20"),
        (["real", "made", "--masks", "fractions"], 3, "expected whole label numbers"),
        (["real", "made", "--masks", "small"], 3, "expected mask of shape"),
    ],
)
def test_what_cannot_be_scored_is_told_in_one_line(
    fvae, shelf, tmp_path, monkeypatch, arguments, code, words
):
    desk = tmp_path / "desk"
    desk.mkdir()
    monkeypatch.chdir(desk)
    for name in ("real", "made", "real_labels", "made_labels"):
        (desk / name).symlink_to(shelf / name)
    for name in ("empty", "fractions", "small"):
        (desk / name).mkdir()
    reader = open_volume(shelf / "made" / "m0.nii.gz")
    for number in range(4):
        for name, shape in (("fractions", SHAPE), ("small", (32, 96, 20))):
            geometry = Geometry(shape, reader.geometry.affine)
            with create_volume(desk / name / f"m{number}.nii", geometry, "float32") as writer:
                writer.write(
                    np.full((20, *shape[:2]), 0.5 if name == "fractions" else 5, np.float32)
                )
    table = {"other": "x,a,1", "wrong": "m0,a,yes", "twice": "m0,a,1\nm0,b,0", "right": "m0,a,1"}
    for name, rows in table.items():
        (desk / f"{name}.csv").write_text(f"ct,text,Emphysema\n{rows}\n")
    assert "Emphysema" in FINDINGS.values()
    before = set(desk.iterdir())
    found, _, err = fvae("score", *arguments, "-o", "score.html")
    assert found == code, err
    assert words in err
    assert "Traceback" not in err
    assert set(desk.iterdir()) == before


def test_an_interruption_leaves_nothing(fvae, shelf, tmp_path, monkeypatch):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        (arguments[3] / "copy.nii").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "examine", interrupted)
    output = tmp_path / "score.html"
    code, _, err = fvae("score", shelf / "real", shelf / "made", "-o", output)
    assert code == 130
    assert "Interrupted." in err
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_older_score_and_the_inputs_are_protected(fvae, shelf, tmp_path):
    (tmp_path / "score.csv").write_text("older")
    sets = (shelf / "real", shelf / "made")
    code, _, err = fvae("score", *sets, "-o", tmp_path / "score.html")
    assert (code, "pass --overwrite" in err) == (3, True)
    assert (tmp_path / "score.csv").read_text() == "older"
    lines = ["ct", *(str(path) for path in sorted((shelf / "made").iterdir()))]
    (tmp_path / "score.csv").write_text("\n".join(lines))
    output = ("-o", tmp_path / "score.html", "--overwrite")
    for arguments in (
        (*sets, *output, "--clip", "a:b", "--texts", tmp_path / "score.csv"),
        (*sets, *output, "--masks", tmp_path / "score.csv"),
        (shelf / "real", tmp_path / "score.csv", *output),
    ):
        code, _, err = fvae("score", *arguments)
        assert (code, "apart from the input" in err) == (2, True), arguments
    assert (tmp_path / "score.csv").read_text() == "\n".join(lines)


RANKED = {  # metric -> whether more is better; spectra need larger planes
    LATENTS: False,
    "kernel distance of latents": False,
    "HU by organ: Wasserstein": False,
    "HU by tissue: Wasserstein": False,
    "noise: difference of means": False,
    "mask adherence: Dice": True,
    "mask adherence: NSD": True,
    "mask adherence: HU that fit": True,
}


def test_phantoms_rank_before_generated_cts_and_these_before_noisier_ones(score, shelf, tmp_path):
    """A small version of benchmarks/score_ranking.py, with the built-in generator."""
    import fvae_deploy

    made = tmp_path / "generated"
    made.mkdir()
    masks: Path = shelf / "made_labels"
    for seed, mask in enumerate(sorted(masks.iterdir())):
        fvae_deploy.generate(mask, made / mask.name, seed=seed)
    noisier = changed(made, tmp_path / "noisier", noisy(60))
    maps = ("--real-labels", shelf / "real_labels", "--masks", masks)
    contents = [score("real", one, *maps) for one in ("made", made, noisier)]
    for metric, more in RANKED.items():
        values = [abs(value(content, metric)) for content in contents]
        assert values == sorted(values, reverse=more), metric
