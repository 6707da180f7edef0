"""The command line as people meet it: help, quiet, reports, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from dicom_series import put, series

from fvae_deploy.version import __version__
from fvae_deploy.volume.open import open_volume

VERBS = ["encode", "decode", "reconstruct", "compare", "export"]
VERBS += ["models", "doctor", "bench", "phantom", "generate", "augment", "kernels"]
VERBS += ["report", "score", "serve", "token", "build", "triton", "selftest"]
VERBS += ["push", "pull"]


def voxels(path):
    return np.concatenate([*open_volume(path).slabs(16)])


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example_that_names_it(fvae, verb):
    code, out, err = fvae(verb, "--help")
    assert (code, err) == (0, "")
    assert f"Example: fvae {verb}" in out
    assert fvae(verb, "-h")[1] == out


def test_help_lists_every_verb(fvae):
    code, out, _ = fvae("--help")
    assert code == 0
    listed = re.findall(r"^│ ([a-z]+) ", out, re.MULTILINE)
    assert set(listed) == set(VERBS)


def test_the_version_is_that_of_the_package(fvae):
    assert fvae("--version") == (0, f"fvae {__version__}\n", "")


@pytest.mark.usefixtures("shipped_engines")
def test_doctor_names_every_engine_and_the_one_that_auto_takes(fvae):
    code, out, _ = fvae("doctor")
    assert code == 0
    for engine in ("openvino", "onnxruntime", "torch"):
        assert re.search(rf"^  {engine} +(runs: fp32|needs the package)", out, re.MULTILINE)
    assert re.search(r"^auto takes \w+, since ", out, re.MULTILINE)
    assert "fake" not in out


@pytest.mark.usefixtures("shipped_engines")
def test_doctor_says_what_each_engine_lacks_for_a_gpu(fvae):
    _, out, _ = fvae("doctor")
    found = out.partition("on a GPU")[2]
    for engine in ("tensorrt", "openvino", "onnxruntime", "torch"):
        assert re.search(
            rf"^  {engine} --device (cuda|gpu) +(needs .*: (pip|apt|install)|nothing is missing)",
            found,
            re.MULTILINE,
        )


def test_models_lists_the_built_in_with_licence_and_parity(fvae):
    code, out, _ = fvae("models")
    assert code == 0
    assert re.search(r"^tiny: .+", out, re.MULTILINE)
    assert re.search(r"4x8x8 voxels to 16 channels, licence \S+, weights [0-9a-f]{16}", out)
    assert "parity of tiny" in out


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["encode"], id="nothing to encode"),
        pytest.param(["reconstruct", "a.nii"], id="no output"),
        pytest.param(["conjure"], id="an unknown verb"),
        pytest.param(["encode", "a.nii", "-o", "z.zarr", "--fast"], id="an unknown option"),
        pytest.param(["encode", "a.nii", "-o", "z.zarr", "--step", "0"], id="steps of nothing"),
        pytest.param(["encode", "a.nii", "-o", "z.zarr", "--step", "x"], id="steps of letters"),
        pytest.param(["export", "-m", "a.pt", "-o", "b", "--opset", "11"], id="an old opset"),
    ],
)
def test_usage_errors_end_with_code_2(fvae, arguments):
    code, _, err = fvae(*arguments)
    assert code == 2
    assert "Traceback" not in err
    assert "Usage" in err


def test_quiet_verbs_print_nothing(fvae, fake, ct, tmp_path):
    f = tmp_path
    exact = ("--latent-dtype", "float32")
    assert fvae("encode", ct, "-o", f / "z.zarr", "--quiet", *exact, *fake) == (0, "", "")
    assert fvae("decode", f / "z.zarr", "-o", f / "a.nii", "-q", *fake) == (0, "", "")
    assert fvae("reconstruct", ct, "-o", f / "b.nii", "-q", *fake) == (0, "", "")
    assert fvae("compare", ct, f / "a.nii", "-q", "--json", f / "c.json") == (0, "", "")
    assert fvae("phantom", "-o", f / "p.nii", "--shape", "16,16,3", "-q") == (0, "", "")
    np.testing.assert_array_equal(voxels(f / "a.nii"), voxels(f / "b.nii"))
    assert json.loads((f / "c.json").read_text())["shape"] == [20, 13, 30]


def test_a_run_says_what_it_did_in_two_lines_and_then_what_to_know_about_the_input(
    fvae, fake, ct, tmp_path
):
    code, out, err = fvae("reconstruct", ct, "-o", tmp_path / "a.nii", *fake)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        r".*a\.nii: 30 slices of 20x13 in [\d.]+ s, [\d.]+ slices/s with fake fp32; "
        r"peak [\d.]+ [MG]iB beyond [\d.]+ [MG]iB of libraries\n"
        r"clipped to \[-1000, 1000\] HU: [\d.]+ % of voxels, which ranged from -1200 to 1099\n"
        r"sform and qform place voxels up to [\d.]+ mm apart; .*\n",
        out,
    )


def test_slices_of_a_latent_store_are_decoded(fvae, fake, ct, tmp_path):
    f = tmp_path
    fvae("encode", ct, "-o", f / "z.zarr", "--step", "2", "--protocol", "windows", *fake)
    fvae("decode", f / "z.zarr", "-o", f / "a.zarr", *fake)
    code, out, _ = fvae("decode", f / "z.zarr", "-o", f / "b.nii.gz", "--slices", "7:20", *fake)
    assert code == 0
    assert "13 slices of 20x13" in out
    np.testing.assert_array_equal(voxels(f / "b.nii.gz"), voxels(f / "a.zarr")[7:20])


def test_an_output_may_be_float32(fvae, fake, ct, tmp_path):
    assert fvae("reconstruct", ct, "-o", tmp_path / "a.nii", "--dtype", "float32", *fake)[0] == 0
    assert voxels(tmp_path / "a.nii").dtype == np.float32


def test_the_defaults_are_the_built_in_model_from_phantom_to_comparison(fvae, tmp_path):
    pytest.importorskip("openvino")
    f = tmp_path
    shape = ["--shape", "48,40,9", "--labels", f / "organs.nii.gz"]
    assert fvae("phantom", "-o", f / "ct.nii.gz", *shape)[0] == 0
    assert fvae("encode", f / "ct.nii.gz", "-o", f / "z.zarr", "--memory", "2GiB")[0] == 0
    assert fvae("decode", f / "z.zarr", "-o", f / "a.nii.gz")[0] == 0
    code, out, _ = fvae("compare", f / "ct.nii.gz", f / "a.nii.gz", "--labels", f / "organs.nii.gz")
    assert code == 0
    assert "PSNR" in out


REPORT = {  # field -> fields in it
    "fvae": None,
    "command": None,
    "input": None,
    "output": None,
    "model": {"name", "source", "weights_sha256"},
    "engine": None,
    "precision": None,
    "device": None,
    "engine_chosen_because": None,
    "kernels": None,
    "protocol": None,
    "as_published": None,
    "plan": {
        "latent_frames_per_step",
        "tiles",
        "tile_cells",
        "tile_overhead",
        "tile_borders",
        "states_in_a_file",
        "lean",
        "segments",
        "predicted_bytes",
        "budget_bytes",
    },
    "volume": {"shape", "slices", "resumed"},
    "clipped": {
        "voxels",
        "share",
        "below",
        "above",
        "minimum_hu",
        "maximum_hu",
        "window_hu",
    },
    "seconds": None,
    "slices_per_second": None,
    "memory": {"peak_rss_bytes", "baseline_bytes", "beyond_baseline_bytes"},
    "remarks": None,
    "machine": {"system", "processor", "cores", "python", "packages"},
}


@pytest.mark.parametrize("verb", ["encode", "decode", "reconstruct"])
def test_a_run_report_has_the_promised_fields(fvae, fake, ct, tmp_path, verb):
    source, target = ct, tmp_path / "out.zarr"
    if verb == "decode":
        source = tmp_path / "z.zarr"
        fvae("encode", ct, "-o", source, *fake)
    path = tmp_path / "report.json"
    code, _, err = fvae(verb, source, "-o", target, "--memory", "1.5GiB", "--json", path, *fake)
    assert code == 0, err
    report = json.loads(path.read_text())
    stored = {"latent_dtype", "bits_per_voxel"} if verb == "encode" else set()
    assert set(report) == {*REPORT, *stored}
    for name, fields in REPORT.items():
        assert fields is None or set(report[name]) == fields, name
    assert report["command"] == verb
    assert (report["input"], report["output"]) == (str(source), str(target))
    assert (report["engine"], report["precision"], report["device"]) == ("fake", "fp32", "cpu")
    assert report["volume"] == {"shape": [20, 13, 30], "slices": 30, "resumed": 0}
    assert report["plan"]["budget_bytes"] == 3 * 2**29
    assert report["slices_per_second"] == pytest.approx(30 / report["seconds"]["total"], rel=0.05)
    memory = report["memory"]
    assert memory["baseline_bytes"] > 16 << 20
    assert memory["peak_rss_bytes"] > 16 << 20
    beyond = memory["peak_rss_bytes"] - memory["baseline_bytes"]
    assert memory["beyond_baseline_bytes"] == max(beyond, 0)
    if verb == "decode":  # what was clipped before is not known any more
        assert (report["clipped"]["voxels"], report["clipped"]["minimum_hu"]) == (0, None)
    else:
        hu = np.concatenate([*open_volume(ct).slabs(8)])
        below, above = (hu < -1000).sum(), (hu > 1000).sum()
        assert (report["clipped"]["below"], report["clipped"]["above"]) == (below, above)
        assert report["clipped"]["voxels"] == below + above
        assert report["clipped"]["share"] == pytest.approx((below + above) / (20 * 13 * 30))
    assert not list(tmp_path.glob(".*"))  # no temporary file stays


def test_debug_shows_where_an_error_came_from(tmp_path):
    command = [sys.executable, "-m", "fvae_deploy", "reconstruct", str(tmp_path / "none.nii")]
    command += ["-o", str(tmp_path / "out.nii")]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == 3
    assert re.fullmatch(
        r"fvae: expected a volume at .*none\.nii, found nothing: .*\n", plain.stderr
    )
    traced = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert traced.returncode != 0
    assert "Traceback" in traced.stderr
    assert "VolumeError" in traced.stderr


def test_a_closed_pipe_is_no_traceback():
    """`fvae models | head -1`"""
    command = f"{sys.executable} -m fvae_deploy models | head -1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert found.stdout.startswith("tiny: ")
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("precision", ["", " , "])
def test_engines_in_no_precision_are_not_built(fvae, precision):
    pytest.importorskip("onnx", reason="needs the tensorrt extra")
    code, _, err = fvae("build", "tiny", "-t", "sm_89", "-p", precision)
    assert code == 2
    assert re.fullmatch(
        r"fvae: expected --precision such as fp16,bf16, found .*: name at least one\n", err
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["check", "-k", "winograd"], "kernels among causal_conv3d, .*, found 'winograd'"),
        (["check", "-t", "sm_11"], "GPU architectures among sm_80, .*, found 'sm_11'"),
        (["check", "-t", ""], "GPU architectures among sm_80, .*, found none: name one"),
        (["test", "-k", "winograd"], "kernels among causal_conv3d, .*, found 'winograd'"),
        (["bench", "-k", "winograd"], "kernels among causal_conv3d, .*, found 'winograd'"),
    ],
)
def test_kernels_and_chips_that_are_not_known_are_refused(fvae, options, said):
    pytest.importorskip("triton", reason="needs the kernels extra")
    code, _, err = fvae("kernels", *options)
    assert code == 2
    assert re.fullmatch(f"fvae: expected {said}\n", err)


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_list_prints_the_series_and_needs_no_output(fvae, tmp_path, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    series(tmp_path / "scans" / "a", 3)
    for k in range(4):
        put(tmp_path / "scans" / f"b{k}", k % 2, AcquisitionNumber=k // 2, SeriesInstanceUID="1.22")
    (tmp_path / "scans" / "notes.txt").write_text("x")
    (tmp_path / "scans" / "a" / "cut.dcm").write_bytes(b"")
    code, out, err = fvae(verb, tmp_path / "scans", "--list")
    assert (code, err) == (0, "")
    for words in ("3 series", "1.22#1", "1.22#2", "6x4", "0.5 x 0.75 x 2.5", "thorax", "1 file of",
                  "AcquisitionNumber 1", "cut.dcm cannot be read: it is empty"):  # fmt: skip
        assert words in " ".join(out.split()), out
    code, out, _ = fvae(verb, tmp_path / "scans", "--list", "--json", "-")
    listed = json.loads(out)["series"]
    assert code == 0
    assert [(one["series"], one["slices"]) for one in listed] == [
        ("1.22#1", 2),
        ("1.22#2", 2),
        ("1.2.840.1111", 3),
    ]
    assert fvae(verb, tmp_path / "none", "--list")[0] == 2
    assert fvae(verb, tmp_path / "scans" / "notes.txt", "--list")[0] == 2


def test_brackets_and_control_characters_in_tables_are_only_text(fvae, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    about = "[bold] [/b] :lung: [cpu]"
    series(tmp_path / "scans", 3, SeriesDescription=f"{about} \x1b[31mred")
    (tmp_path / "scans" / "\x1b[31mred.dcm").write_bytes(b"")
    code, out, err = fvae("encode", tmp_path / "scans", "--list")
    assert (code, err) == (0, "")
    assert f"{about} [31mred" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("made", "compared", "told"),
    [("soft", "ct", True), ("soft", "soft", False), ("ct", "soft", False), ("wide", "ct", False)],
)
def test_compare_says_if_hu_are_missing_that_it_compares(
    fvae, fake, ct, tmp_path, made, compared, told
):
    recon = tmp_path / "r.nii"
    assert fvae("reconstruct", ct, "-o", recon, "--hu-window", made, *fake)[0] == 0
    code, out, _ = fvae("compare", ct, recon, "--no-ssim", "--hu-window", compared)
    assert code == 0
    assert ("was made with the HU window -175:250" in out.replace("\n", " ")) == told
