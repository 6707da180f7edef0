"""fvae report from the command line: scans, pairs, lists, cohorts with damage, outputs."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import types

import numpy as np
import pytest
from volumes import AFFINE, ball, body, store, surveyed

from fvae_deploy.cli import main as cli
from fvae_deploy.quality.fidelity import compare
from fvae_deploy.report import radiomics
from fvae_deploy.report.jpegls import JpegLs
from fvae_deploy.report.pair import run_sections
from fvae_deploy.report.perceptual import Lpips
from fvae_deploy.report.verdict import verdicts

QUICK = (8, 96, 80)


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


@pytest.fixture
def fake(fake_bundle):
    return ["-m", fake_bundle, "-e", "fake"]


@pytest.fixture(autouse=True)
def _no_radiomics(monkeypatch):
    monkeypatch.setattr(radiomics, "find_spec", lambda name: None)


def test_a_scan_through_a_model_gives_page_json_and_csv(fvae, fake, tmp_path):
    store(tmp_path / "ct.nii.gz", body((20, 200, 180)))
    code, _, err = fvae("report", tmp_path / "ct.nii.gz", *fake, "-o", tmp_path / "r.html")
    assert code == 0, err
    content = json.loads((tmp_path / "r.json").read_text())
    (scan,) = content["scans"]
    (method,) = scan["methods"]
    assert scan["shape"] == [200, 180, 20]
    sections = {"errors", "organs", "agreement", "structure", "surfaces", "texture", "edges",
                "seams", "cost", "low_contrast", "radiomics"}  # fmt: skip
    assert sections <= set(method)
    assert method["cost"]["bits_per_voxel"] > 0
    assert "pip install" in method["radiomics"]["reason"]
    assert len(method["low_contrast"]["conditions"]) == 32
    page = (tmp_path / "r.html").read_text()
    for name in ("summary", "verdicts", "pictures", "errors", "organs", "structure", "surfaces",
                 "low-contrast", "texture", "radiomics", "seams", "cost", "scans"):  # fmt: skip
        assert f'<section id="{name}">' in page
    assert not re.search(r'(src|href)="?(https?:)?//', page)
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    mae = next(row for row in rows if row["measure"] == "MAE")
    assert float(mae["mean"]) == pytest.approx(method["errors"]["mae"], rel=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_given_pair_is_judged_without_a_model(fvae, tmp_path):
    a = body(QUICK)
    store(tmp_path / "a.nii", a)
    b = (a + np.random.default_rng(0).normal(3, 4, a.shape)).clip(-1000, 1000)
    store(tmp_path / "b.nii", b.astype(np.float32))
    r = tmp_path / "r.html"
    code, _, err = fvae("report", tmp_path / "a.nii", "-r", tmp_path / "b.nii", "-o", r)
    assert code == 0, err
    (method,) = json.loads((tmp_path / "r.json").read_text())["scans"][0]["methods"]
    e = b.astype(np.float32).astype(float) - a
    assert method["method"] == "given"
    assert method["errors"]["bias"] == pytest.approx(e.mean())
    assert method["errors"]["rmse"] == pytest.approx(np.sqrt((e**2).mean()))
    assert "cost" not in method
    code, _, err = fvae("report", tmp_path / "a.nii", "-r", tmp_path / "b.nii", "-o", r)
    assert code == 3
    assert "pass --overwrite" in err


def test_another_window_reaches_the_network_and_all_numbers(fvae, fake, tmp_path):
    a = body(QUICK)
    a[:, 20:30, 20:30] = 2500
    store(tmp_path / "a.nii", a)
    made = []
    for window, arguments in (([-1000, 1000], []), ([-1024, 3071], ["--hu-window", "wide"])):
        code, _, err = fvae("report", tmp_path / "a.nii", *fake, *arguments, "--overwrite",
                            "-o", tmp_path / "r.html")  # fmt: skip
        assert code == 0, err
        content = json.loads((tmp_path / "r.json").read_text())
        assert content["window_hu"] == window
        (scan,) = content["scans"]
        errors = scan["methods"][0]["errors"]
        assert errors["data_range_hu"] == window[1] - window[0]
        assert scan["clipped"] == pytest.approx((a > window[1]).mean())
        latents, made_again = tmp_path / "z.zarr", ["-o", tmp_path / "b.nii", "--overwrite"]
        run = [*fake, *arguments, "--overwrite"]
        assert fvae("encode", tmp_path / "a.nii", "-o", latents, *run)[0] == 0
        assert fvae("decode", latents, *fake, *made_again)[0] == 0
        quick = compare(tmp_path / "a.nii", tmp_path / "b.nii",
                        hu_window=f"{window[0]}:{window[1]}")  # fmt: skip
        assert errors["mae"] == pytest.approx(quick.mae)
        assert errors["psnr"] == pytest.approx(quick.psnr)
        made.append(scan["methods"][0]["cost"]["jpeg_ls"])
    assert made[1]["lossless_bits_per_voxel"] > made[0]["lossless_bits_per_voxel"]


def test_a_list_names_reconstructions_of_several_methods_and_labels(fvae, tmp_path):
    a = body(QUICK)
    labels = np.zeros(QUICK, np.int16)
    labels[:, 40:56, 30:50] = 5
    moved = np.roll(labels, 1, axis=1)
    for name, frames in (("a", a), ("near", a + 1), ("far", a - 9)):
        store(tmp_path / f"{name}.nii", frames.clip(-1000, 1000).astype(np.int16))
    store(tmp_path / "labels.nii", labels)
    store(tmp_path / "moved.nii", moved)
    lines = ["ct,reconstruction,method,labels,reconstruction_labels"]
    lines += [f"a.nii,{name}.nii,{name},labels.nii,moved.nii" for name in ("near", "far")]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    code, _, err = fvae("report", tmp_path / "list.csv", "-o", tmp_path / "r.html")
    assert code == 0, err
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["methods"] == ["near", "far"]
    (scan,) = content["scans"]
    liver = scan["methods"][0]["organs"][0]
    assert (liver["name"], liver["voxels"]) == ("liver", int((labels == 5).sum()))
    surface = next(s for s in scan["methods"][0]["surfaces"] if s["name"] == "liver")
    assert surface["after"]["dice"] == pytest.approx(15 / 16)
    levels = {m: content["verdicts"][m][0]["bias_hu"] for m in ("near", "far")}
    assert levels["near"] == pytest.approx(1, abs=0.05)
    assert levels["far"] == pytest.approx(-9, abs=0.05)


def test_a_cohort_of_20_scans_with_one_damaged_is_judged_and_says_so(fvae, fake, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for n in range(20):
        frames = body((6, 64, 56), noise=4 + n, seed=n)
        store(folder / f"s{n:02}.nii.gz", frames)
    damaged = folder / "s07.nii.gz"
    packed = gzip.compress(gzip.decompress(damaged.read_bytes())[:9000])
    damaged.write_bytes(packed)
    code, _, err = fvae("report", folder, *fake, "-o", tmp_path / "r.html")
    assert code == 3
    assert "1 of 20 that failed" in err
    assert "s07" in err
    content = json.loads((tmp_path / "r.json").read_text())
    failed = [scan for scan in content["scans"] if "error" in scan]
    assert [scan["name"] for scan in failed] == ["s07"]
    (measures,) = content["cohort"].values()
    judged = [s["methods"][0]["errors"]["mae"] for s in content["scans"] if "methods" in s]
    assert len(judged) == 19
    assert measures["MAE"]["mean"] == pytest.approx(np.mean(judged))
    assert measures["MAE"]["deviation"] == pytest.approx(np.std(judged, ddof=1))
    assert measures["MAE"]["worst"] == max(judged)
    page = (tmp_path / "r.html").read_text()
    assert measures["MAE"]["worst_scan"] in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert [picture["scan"] for picture in data["pictures"]] == [measures["MAE"]["worst_scan"]]


def test_a_cohort_in_which_all_are_damaged_still_gets_its_report(fvae, fake, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    store(folder / "a.nii", body(QUICK))
    (folder / "a.nii").write_bytes((folder / "a.nii").read_bytes()[:5000])
    code, _, _ = fvae("report", folder / "a.nii", *fake, "-o", tmp_path / "r.html")
    assert code == 3
    assert "1 could not be, and passed over" in (tmp_path / "r.html").read_text()


def test_names_from_files_cannot_break_the_page(fvae, tmp_path):
    name = "<script>alert(1)<!--"
    store(tmp_path / f"{name}.nii", body(QUICK))
    source = tmp_path / f"{name}.nii"
    code, _, err = fvae("report", source, "-r", source, "-o", tmp_path / "r.html")
    assert code == 0, err
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;!--" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.nii", "-r", "a.nii", "-r", "a.nii", "-o", "r.html"], "one --reconstruction for each"),
        (["a.nii", "-r", "small.nii", "-o", "r.html"], "reconstruction of shape 96x80x8"),
        (["a.nii", "-r", "moved.nii", "-o", "r.html"], "instead of"),
        (["a.nii", "--reconstruction-labels", "a.nii", "-o", "r.html"], "give both label maps"),
        (["a.nii", "-o", "r.pdf"], "named .html"),
        (["a.nii", "-o", "nowhere/r.html"], "create it first"),
        (["a.nii", "-m", "tiny", "-m", "tiny", "-o", "r.html"], "name it once"),
        (["a.nii", "--hu-window", "soft", "-o", "r.html"], "from -900 HU or less"),
        (["a.nii", "a.nii", "-o", "r.html"], "name them in a column method"),
        (["none.nii", "-o", "r.html"], "check the path"),
        (["a.nii", "--segment", "-o", "r.html"], "pip install TotalSegmentator"),
    ],
)
def test_what_cannot_be_judged_is_told_in_one_line(fvae, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "a.nii", body(QUICK))
    store(tmp_path / "small.nii", body((8, 64, 64)))
    moved = AFFINE.copy()
    moved[2, 3] += 5
    store(tmp_path / "moved.nii", body(QUICK), moved)
    code, _, err = fvae("report", *arguments)
    assert code > 1
    assert words in err


def test_the_report_replaces_no_input(fvae, fake, tmp_path):
    store(tmp_path / "a.nii", body(QUICK))
    (tmp_path / "scan.html").symlink_to(tmp_path / "a.nii")
    code, _, err = fvae(
        "report", tmp_path / "a.nii", *fake, "-o", tmp_path / "scan.html", "--overwrite"
    )
    assert code == 2
    assert "apart from the input" in err


def stand_in(monkeypatch, function):
    """Install a module that is called as TotalSegmentator is."""
    module = types.ModuleType("totalsegmentator.python_api")
    module.totalsegmentator = function
    parent = types.ModuleType("totalsegmentator")
    parent.__spec__ = types.SimpleNamespace(name="totalsegmentator")
    monkeypatch.setitem(sys.modules, "totalsegmentator", parent)
    monkeypatch.setitem(sys.modules, "totalsegmentator.python_api", module)


@pytest.mark.parametrize("error", [ValueError("no weights\nat all"), SystemExit("no network")])
def test_a_segmenter_that_fails_gives_one_line(fvae, tmp_path, monkeypatch, error):
    def totalsegmentator(source, output, ml, quiet):
        raise error

    stand_in(monkeypatch, totalsegmentator)
    for name in ("a.nii", "b.nii"):
        store(tmp_path / name, body(QUICK))
    r = tmp_path / "r.html"
    code, _, err = fvae(
        "report", tmp_path / "a.nii", "-r", tmp_path / "b.nii", "--segment", "-o", r
    )
    assert code == 3  # no scan could be judged
    assert f"found {type(error).__name__} no " in err
    assert "Traceback" not in err
    assert (
        type(error).__name__ in json.loads(r.with_suffix(".json").read_text())["scans"][0]["error"]
    )


def test_segment_lets_totalsegmentator_label_both_volumes(fvae, tmp_path, monkeypatch):
    """With a stand-in that labels what exceeds 20 HU; the original is labelled twice."""
    import nibabel

    seen = []

    def totalsegmentator(source, output, ml, quiet):
        image = nibabel.load(source)
        hu = np.asarray(image.dataobj)
        seen.append(hu.std())
        labels = ((hu > 20) & (hu < 300)).astype(np.uint8) * 5
        nibabel.save(nibabel.Nifti1Image(labels, image.affine), output)

    stand_in(monkeypatch, totalsegmentator)
    a = body(QUICK)
    store(tmp_path / "a.nii", a)
    store(tmp_path / "b.nii", (a + 30 * ball(QUICK, (4, 50, 30), 9)).astype(np.int16))
    r = tmp_path / "r.html"
    code, _, err = fvae(
        "report", tmp_path / "a.nii", "-r", tmp_path / "b.nii", "--segment", "-o", r
    )
    assert code == 0, err
    (scan,) = json.loads((tmp_path / "r.json").read_text())["scans"]
    assert scan["labels"] == "TotalSegmentator"
    surface = next(s for s in scan["methods"][0]["surfaces"] if s["name"] == "liver")
    assert 0.5 < surface["again"]["dice"] < 1
    assert surface["after"]["dice"] > 0.99
    assert len(seen) == 3


def test_verdicts_follow_their_rules():
    def scan(bias, rmse, found, noise=10.0):
        organ = {"name": "liver", "voxels": 10, "bias": bias, "rmse": rmse, "p99": 9}
        structure = {"by_organ": {"liver": found}}
        return {"noise_hu": noise, "methods": [
            {"method": "m", "organs": [organ], "structure": structure}
        ]}  # fmt: skip

    for facts, level in (
        ((2.0, 10.0, 0), "good"), ((2.1, 1, 0), "care"), ((-2.1, 1, 0), "care"),
        ((0, 10.1, 0), "care"), ((0, 1, 1), "care"), ((10.1, 1, 0), "poor"),
        ((-10.1, 1, 0), "poor"), ((0, 30.1, 0), "poor"), ((0, 10.0, 0, None), "good"),
    ):  # fmt: skip
        (verdict,) = verdicts([scan(*facts)], ["m"])["m"]
        assert verdict["level"] == level, facts
    both = [scan(1.0, 3, 0), scan(-12.0, 4, 2)]
    (verdict,) = verdicts(both, ["m"])["m"]
    assert (verdict["level"], verdict["worst_bias_hu"], verdict["found"]) == ("poor", -12.0, 2)
    assert verdict["rmse_hu"] == pytest.approx(np.sqrt((9 + 16) / 2))


def test_lpips_is_measured_on_even_slices_where_it_is_installed(tmp_path, monkeypatch):
    """With a stand-in that returns the mean difference of what it is shown."""
    torch = pytest.importorskip("torch", reason="needs the export extra")
    module = types.ModuleType("lpips")
    module.__spec__ = types.SimpleNamespace(name="lpips")

    class Network:
        def __init__(self, net, verbose):
            assert net == "alex"

        def __call__(self, a, b):
            assert a.shape == (1, 3, 96, 80)
            assert float(torch.maximum(a.abs().max(), b.abs().max())) <= 1
            return (b - a).mean()

    module.LPIPS = Network
    a = body((30, 96, 80))
    found = surveyed(store(tmp_path / "a.nii", a))
    made = store(tmp_path / "b.nii", a.clip(-1000, 900) + np.int16(50))
    section = Lpips(found.geometry)
    run_sections(found, made, {}, [section], lambda done: None)
    assert "pip install lpips" in section.result()["reason"]
    monkeypatch.setitem(sys.modules, "lpips", module)
    section = Lpips(found.geometry)
    run_sections(found, made, {}, [section], lambda done: None)
    result = section.result()
    assert result["slices"] == 24
    assert result["lpips"] == pytest.approx(0.05, abs=0.005)


def test_jpegls_is_compared_at_the_least_bound_that_fits(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs", reason="needs the report extra")
    a = body((6, 64, 56))
    found = surveyed(store(tmp_path / "a.nii", a))
    coder = JpegLs(found)

    def bits(bound):
        streams = [
            imagecodecs.jpegls_encode(np.ascontiguousarray((f.T + 1000).astype(np.uint16)),
                                      level=bound) for f in a
        ]  # fmt: skip
        return 8 * sum(map(len, streams)) / a.size

    for target in (0.1, 1.0, 2.5, 4.0, 16.0):
        result = coder.beside(target)
        bound = result["bound_hu"]
        assert result["lossless_bits_per_voxel"] == pytest.approx(bits(0))
        assert result["bits_per_voxel"] == pytest.approx(bits(bound))
        assert result["max"] <= bound
        if bound < 255:
            assert bits(bound) <= target
        if bound > 0:
            assert bits(bound - 1) > target


def test_scans_of_the_same_name_and_series_of_one_folder_are_kept_apart(fvae, tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        store(tmp_path / place / "a.nii", body(QUICK, seed=len(place)))
    lines = ["ct,reconstruction,series", "one/a.nii,one/a.nii,1", "one/a.nii,one/a.nii,2"]
    (tmp_path / "list.csv").write_text("\n".join([*lines, "two/a.nii,two/a.nii,"]))
    code, _, err = fvae("report", tmp_path / "list.csv", "-o", tmp_path / "r.html")
    assert code == 0, err
    content = json.loads((tmp_path / "r.json").read_text())
    assert [scan["name"] for scan in content["scans"]] == ["a", "a (2)", "a (3)"]
    assert content["cohort"]["given"]["MAE"]["scans"] == 3


def test_the_table_of_a_report_does_not_replace_its_list(fvae, tmp_path):
    store(tmp_path / "a.nii", body(QUICK))
    before = "ct,reconstruction\na.nii,a.nii\n"
    (tmp_path / "list.csv").write_text(before)
    code, _, err = fvae(
        "report", tmp_path / "list.csv", "-o", tmp_path / "list.html", "--overwrite"
    )
    assert code == 2
    assert "apart from the input" in err
    assert (tmp_path / "list.csv").read_text() == before
